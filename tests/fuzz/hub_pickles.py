"""Damage to PyTorch's pickled files of weights: to their bytes, their archive and what is pickled."""

import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.mutations import mutate_bytes

Act = Callable[[random.Random, Path], None]


def _damage_pickle(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.bin")))
    content = path.read_bytes()
    head = rng.choice([200, 1_500, len(content)])
    path.write_bytes(mutate_bytes(rng, content[:head])[0] + content[head:])


def _damage_members(rng: random.Random, folder: Path) -> None:
    """The archive is whole, what is in it is not."""
    path = rng.choice(sorted(folder.glob("*.bin")))
    if not zipfile.is_zipfile(path):
        return _damage_pickle(rng, folder)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([*members, *[name for name in members if name.endswith(".pkl")] * 5])
    act = rng.choice(["damage", "damage", "damage", "bomb", "drop", "rename", "pack"])
    if act == "damage":
        members[name] = mutate_bytes(rng, members[name])[0]
    elif act == "bomb":
        members[name] = bytes(1 << 28)
    elif act in ("drop", "rename"):
        content = members.pop(name)
        if act == "rename":
            members[rng.choice(["x", "../x", "/etc/x", "data.pkl", "é"])] = content
    compression = zipfile.ZIP_DEFLATED if act in ("bomb", "pack") else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return None


def _pickle_something(rng: random.Random, folder: Path) -> None:
    """Other things than plain tensors by name."""
    path = rng.choice(sorted(folder.glob("*.bin")))
    tensors: dict[Any, Any] = torch.load(path, weights_only=True)
    name, tensor = rng.choice(sorted(tensors.items()))
    things: list[Callable[[], Any]] = [
        lambda: tensor[:1].expand(10**9, *tensor.shape[1:]),
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(1).expand(tensor.shape),
        tensor.to_sparse,
        lambda: tensor.to("meta"),
        lambda: torch.nn.Parameter(tensor),
        lambda: [tensor],
        lambda: {"x": tensor},
        lambda: {"x": 5},
        lambda: None,
        lambda: "x" * 1_000_000,
        lambda: _nested(100),
        lambda: tensor.conj() if tensor.is_complex() else torch.complex(tensor, tensor).conj(),
        lambda: torch.zeros(0),
        lambda: 10**400,
    ]
    tensors[name] = rng.choice(things)()
    act = rng.choice(["", "", "", "key", "list", "module", "alone"])
    if act == "key":
        tensors[rng.choice([5, None, (1, 2), b"x"])] = tensors.pop(name)
    whole = {"list": list(tensors.values()), "alone": tensor, "module": {"model": tensors}}.get(act, tensors)
    torch.save(whole, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


PICKLE_ACTS: list[tuple[str, Act]] = [
    *[("bytes of a pickle", _damage_pickle)] * 3,
    *[("members of an archive", _damage_members)] * 3,
    *[("pickled", _pickle_something)] * 3,
]
