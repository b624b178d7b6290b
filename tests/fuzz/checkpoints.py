"""Checkpoint folders with something wrong in them, given to all that begin with one."""

import hashlib
import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common.publish import canonical_json, sha256_file
from tests.fuzz.bases import copy_base, make_base
from tests.fuzz.cases import Case
from tests.fuzz.judge import PROJECT
from tests.fuzz.mutations import json_bytes, mutate_bytes, mutate_json, remove, replace_by
from tests.helpers.ranks import RankGroup

OLDER = PROJECT / "tests" / "fixtures" / "format_1" / "runs"
RUNS = ("one", "one", "one", "lora", "lora", "older-gpt2", "older-llama", "older-lora")
OPTIONS = ["--config", "tiny.yaml", "--run.root", "runs"]
ADAPTERS = ["--lora.rank", "2", "--run.name", "lora"]
EVALUATIONS: dict[str, list[str]] = {
    "eval/generate.py": ["--prompt", "Once", "--max-tokens", "4", "--device", "cpu"],
    "eval/perplexity.py": ["--data", "data", "--tokens", "64", "--device", "cpu"],
    "eval/hellaswag.py": ["--data", "hellaswag.jsonl", "--device", "cpu"],
    "eval/export_hf.py": ["exported"],
}
WEIGHTS = [6, 3, 1, 1]  # how often each: hellaswag and export take seconds
SIZES = [-1, 0, 1, 2, 3, 17, 1_000, 10**6, 10**9, 2**31, 2**40, 2**62, 2**63, 10**25, 0.5, 16.0, "16", None, [16], True]
DTYPES = [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float64,
          torch.float8_e4m3fn, torch.uint8]  # fmt: skip
EMPTY = hashlib.sha256(b"").hexdigest()
Manifest = dict[str, Any]


def prepare(bases: Path) -> None:
    make_base(bases)
    lora = ["runs/one", *OPTIONS, *ADAPTERS, "--run.max_steps=4"]
    assert RankGroup(1, bases / "store", _finetune_in, bases, lora).join() == [0]
    for name in ("gpt2", "llama", "lora"):
        shutil.copytree(OLDER / name, bases / "runs" / f"older-{name}")
    example = {"ind": 0, "activity_label": "A", "ctx_a": "b", "ctx_b": "", "ctx": "b", "endings": [*"cdef"], "label": 1}
    (bases / "hellaswag.jsonl").write_text(json.dumps(example) + "\n", encoding="utf-8")


def cases(rng: random.Random, count: int, bases: Path) -> Iterator[Case]:
    for _ in range(count):
        run, seed = rng.choice(RUNS), rng.randrange(1 << 60)
        name, act = rng.choice(ACTS)
        place = _place(random.Random(seed), bases / "runs" / run)
        arguments = _arguments(rng, run, place, evaluated=act is _change_numbers)
        label = f"{run}: {name} {seed}"
        yield Case("checkpoints", label, arguments, partial(_make, bases, run, place, act, seed), stopped=True)


def _finetune_in(folder: Path, arguments: list[str]) -> None:
    from common.errors import exit_on_user_error
    from train import finetune

    os.chdir(folder)
    sys.argv = ["train/finetune.py", *arguments]
    exit_on_user_error(finetune.main)


def _place(rng: random.Random, run: Path) -> str:
    """The checkpoint's folder that is damaged, within the run."""
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    newest = max(name for name in names if name.startswith("step-"))
    return rng.choice([newest, newest, newest, *names])


def _arguments(rng: random.Random, run: str, place: str, *, evaluated: bool) -> list[str]:
    checkpoint = f"runs/{run}/checkpoints/{place}"
    given = rng.choice([f"runs/{run}", checkpoint])
    kind = rng.choice(["resume", "resume", "branch", "finetune", "evaluate", "evaluate", "evaluate"])
    if kind == "evaluate" or evaluated or run.startswith("older"):
        entry = rng.choices(list(EVALUATIONS), WEIGHTS)[0]
        return [entry, given, *EVALUATIONS[entry]]
    if kind == "resume" and run == "lora":
        return ["train/finetune.py", "runs/one", *OPTIONS, *ADAPTERS, "--run.max_steps=5"]
    if kind == "resume":
        return ["train/pretrain.py", *OPTIONS, "--run.name=one", "--run.max_steps=5"]
    if kind == "branch":
        return ["train/pretrain.py", *OPTIONS, f"--resume={given}", "--run.name=new", "--run.max_steps=5"]
    rank = rng.choice(["0", "2"])
    return ["train/finetune.py", given, *OPTIONS, "--run.name=new", "--run.max_steps=2", f"--lora.rank={rank}"]


def _make(
    bases: Path, run: str, place: str, act: Callable[[random.Random, Path], None], seed: int, folder: Path
) -> None:
    copy_base(bases, folder)
    shutil.copy(bases / "hellaswag.jsonl", folder / "hellaswag.jsonl")
    rng = random.Random(seed)
    checkpoints = folder / "runs" / run / "checkpoints"
    if rng.random() < 0.7 and place != "base":  # else an older one is taken in its place
        for other in checkpoints.glob("*-*"):
            if other.name != place:
                shutil.rmtree(other)
    act(rng, checkpoints / place)


def _change_manifest(rng: random.Random, checkpoint: Path) -> None:
    manifest = _read(checkpoint)
    keys = [key for key in ("config", "model", "files", "tokenizer", "base", "lora", "position_in") if key in manifest]
    if rng.random() < 0.5:  # where most of the places are little else gets its turn
        key = rng.choice(keys)
        manifest[key], _ = mutate_json(rng, manifest[key])
    else:
        least = {key: value for key, value in manifest.items() if key not in ("config", "model")}
        changed, _ = mutate_json(rng, least)
        manifest = {**manifest, **changed} if isinstance(changed, dict) else changed
        if isinstance(changed, dict):
            manifest = {key: value for key, value in manifest.items() if key in changed or key not in least}
    _write(checkpoint, manifest)


def _change_size(rng: random.Random, checkpoint: Path) -> None:
    """Of the model, of the adapters or of what the run has counted."""
    manifest = _read(checkpoint)
    part = rng.choice([part for part in ("model", "model", "lora", None) if part is None or part in manifest])
    values = manifest if part is None else manifest[part]
    sizes = [key for key, value in values.items() if value is None or isinstance(value, int | float)]
    for key in rng.sample(sizes, rng.choice([1, 1, 2])):
        values[key] = rng.choice(SIZES)
    if part == "model" and "config" in manifest and rng.random() < 0.5:
        manifest["config"]["model"].update(values)
    _write(checkpoint, manifest)


def _damage_manifest(rng: random.Random, checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_bytes(mutate_bytes(rng, path.read_bytes())[0])


def _damage_tensors(rng: random.Random, checkpoint: Path) -> None:
    path = _tensor_file(rng, checkpoint)
    content = path.read_bytes()
    head = rng.choice([8, 64, 1_000, len(content)])  # the header is where it hurts
    path.write_bytes(mutate_bytes(rng, content[:head])[0] + content[head:])
    _list_again(checkpoint, path)


def _change_header(rng: random.Random, checkpoint: Path) -> None:
    path = _tensor_file(rng, checkpoint)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, _ = mutate_json(rng, json.loads(content[8 : 8 + length]))
    text = json_bytes(header)
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    _list_again(checkpoint, path)


def _change_tensors(rng: random.Random, checkpoint: Path) -> None:
    """Other dtypes, shapes, names."""
    path = _tensor_file(rng, checkpoint)
    tensors = load_file(str(path))
    for name in rng.sample(sorted(tensors), min(len(tensors), rng.choice([1, 1, 100]))):
        act = rng.choice(["dtype", "shape", "rename", "drop", "scalar", "empty"])
        tensor = tensors.pop(name)
        if act == "dtype":
            tensors[name] = tensor.to(rng.choice(DTYPES))
        elif act == "shape":
            tensors[name] = tensor.reshape(-1, 1)
        elif act == "rename":
            tensors[rng.choice(["", "x", "/", f"{name}/foo", "h.0.foo", name.replace("0", "1"), "exp_avg"])] = tensor
        elif act == "scalar":
            tensors[name] = torch.tensor(1.0)
        elif act == "empty":
            tensors[name] = tensor.flatten()[:0].clone()
    save_file(tensors, str(path))
    _list_again(checkpoint, path)


def _change_numbers(rng: random.Random, checkpoint: Path) -> None:
    """For evaluations; a run that goes on from such weights ends as one whose loss is no number does, and says so."""
    path = rng.choice(sorted(checkpoint.glob("weights-*")))
    tensors = load_file(str(path))
    name = rng.choice(sorted(tensors))
    tensors[name] = torch.full_like(tensors[name], rng.choice([float("nan"), float("inf"), -1e38, 0.0]))
    save_file(tensors, str(path))
    _list_again(checkpoint, path)


def _replace_something(rng: random.Random, checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    path = rng.choice(
        [*files, *files, checkpoint / "checkpoint.json", checkpoint, checkpoint.parent, run / "config.yaml"]
    )
    name = path.name
    replace_by(rng, path)
    if name in ("checkpoint.json", "config.yaml", checkpoint.name, "checkpoints") or rng.random() < 0.5:
        return
    manifest = _read(checkpoint)  # lists it as it is now
    manifest["files"][name] = {"bytes": rng.choice([0, 4096, path.stat().st_size if path.exists() else 0]),
                               "sha256": EMPTY}  # fmt: skip
    if not path.exists() or path.stat().st_size < 1 << 40:
        _write(checkpoint, manifest)


def _add_something(rng: random.Random, checkpoint: Path) -> None:
    name = rng.choice(
        ["weights-00001-of-00002.safetensors", "optimizer-x", "x", "weights-00000-of-00001.safetensors.old"]
    )
    path = checkpoint / name
    path.write_text("x", encoding="utf-8")
    replace_by(rng, path)
    if rng.random() < 0.6:
        manifest = _read(checkpoint)
        listed = rng.choice([name, name, "../x", "/dev/zero", "..", "", "a\x00b", "../../../x", "weights-/dev/zero"])
        manifest["files"][listed] = {"bytes": rng.choice([0, 1]), "sha256": EMPTY}
        _write(checkpoint, manifest)


def _damage_config(rng: random.Random, checkpoint: Path) -> None:
    path = checkpoint.parents[1] / "config.yaml"
    path.write_bytes(mutate_bytes(rng, path.read_bytes())[0])


def _say_otherwise(rng: random.Random, checkpoint: Path) -> None:
    """What no single wrong value makes: facts that contradict each other."""
    manifest = _read(checkpoint)
    manifest |= rng.choice(
        [
            {"warm_up": {"start": 10**6, "steps": 5}},
            {"warm_up": {"start": 0, "steps": 2**62}},
            {"step": 2**62, "tokens": 2**62, "sequences": 2**62},
            {"sequences": 2**62},
            {"step": 0},
            {"tokens": 0, "sequences": 1},
            {"lora": {"rank": 2**40, "alpha": 1.0, "dropout": 0.0, "targets": ["c_attn"]}},
            {"lora": {"rank": 1, "alpha": 1.0, "dropout": 0.0, "targets": ["c_attn"]}},
            {"lora": None},
            {"base": {"identity": "x"}},
            {"base": {"identity": "0" * 64, "folder": ".", "sha256": "0" * 64}},
            {"base": {"identity": "0" * 64, "folder": "../one/checkpoints/step-00000004", "sha256": "0" * 64}},
            {"scaler": {"scale": 65536.0}},
            {"world_size": 0},
            {"imported": {"architectures": 5}},
            {"weights_only": True},
            {"format_version": rng.choice([0, 2, "1", 1.0, True, None, 10**25])},
            {"format_version": 2, "optimizer": rng.choice(["adamw", "muon", "a" * 99, "\x1b", 2, None])},
            {"val_loss": 3, "val_step": "4"},
        ]
    )
    _write(checkpoint, manifest)


ACTS: list[tuple[str, Callable[[random.Random, Path], None]]] = [
    *[("manifest", _change_manifest)] * 10,
    *[("sizes", _change_size)] * 5,
    *[("manifest's bytes", _damage_manifest)] * 2,
    *[("bytes of tensors", _damage_tensors)] * 2,
    *[("header of tensors", _change_header)] * 3,
    *[("tensors", _change_tensors)] * 3,
    ("numbers", _change_numbers),
    *[("something else in its place", _replace_something)] * 3,
    *[("something beside it", _add_something)] * 2,
    *[("contradiction", _say_otherwise)] * 3,
    ("config.yaml", _damage_config),
]


def _tensor_file(rng: random.Random, checkpoint: Path) -> Path:
    return rng.choice(sorted(checkpoint.glob("*.safetensors")))


def _read(checkpoint: Path) -> Manifest:
    manifest: Manifest = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    return manifest


def _list_again(checkpoint: Path, path: Path) -> None:
    """Put a file's size and hash as they are now into the manifest, as somebody who means harm would."""
    manifest = _read(checkpoint)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    _write(checkpoint, manifest)


def _write(checkpoint: Path, manifest: Any) -> None:
    """Write a manifest with the hash of itself, and for the adapters that stand beside it, theirs of it."""
    content = json_bytes(manifest)
    try:
        read = json.loads(content)
        if isinstance(read, dict):
            read.pop("manifest_sha256", None)
            own = hashlib.sha256(canonical_json(read).encode()).hexdigest()
            content = json.dumps({**read, "manifest_sha256": own}).encode()
    except (ValueError, RecursionError):
        pass
    path = checkpoint / "checkpoint.json"
    remove(path)
    path.write_bytes(content)
    if checkpoint.name == "base":
        for adapters in checkpoint.parent.glob("*-*"):
            theirs = _read(adapters)
            theirs["base"]["sha256"] = sha256_file(path)
            _write(adapters, theirs)
