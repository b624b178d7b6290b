"""Seeded damage to JSON values, bytes and files."""

import json
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

HUGE, DEEP = 10**25, 3_000
STRANGE_TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "../../x",
    "/etc/passwd",
    "a" * 5_000,
    "\x1b[2J",
    "$x$",
    "ｘ",
    "None",
    "0x10",
]
STRANGE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, HUGE, -HUGE, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    [], {}, [[]], [None], {"": None}, *STRANGE_TEXTS,
]  # fmt: skip


def mutate_json(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A copy of a JSON value with one thing wrong in it, and what that is."""
    copy = deepcopy(value)
    places = list(_places(copy))
    if not places or rng.random() < 0.04:
        strange = rng.choice(STRANGE)
        return strange, f"the whole -> {_short(strange)}"
    container, key, path = rng.choice(places)
    act = rng.choice(["replace", "replace", "replace", "retype", "remove", "add", "swap", "deepen", "repeat"])
    if act == "remove":
        del container[key]
        return copy, f"{path} removed"
    if act == "add" and isinstance(container, dict):
        container[rng.choice(STRANGE_TEXTS)] = rng.choice(STRANGE)
        return copy, f"a key beside {path}"
    if act == "swap":
        other, other_key, other_path = rng.choice(places)
        container[key] = deepcopy(other[other_key])
        return copy, f"{path} -> {other_path}"
    if act == "repeat" and isinstance(container, list):
        container.extend([container[key]] * 3)
        return copy, f"{path} four times"
    if act == "deepen":
        container[key] = _Deep(container[key])
        return copy, f"{path} -> {DEEP} lists in each other"
    if act == "retype":
        container[key] = _of_another_type(rng, container[key])
    else:
        container[key] = rng.choice(STRANGE)
    return copy, f"{path} -> {_short(container[key])}"


def json_bytes(value: Any) -> bytes:
    """The text of a mutated value, as Python writes it, NaN and deep nesting included."""
    deep: list[_Deep] = []

    def stand_in(found: Any) -> str:
        deep.append(found)
        return f"deep-{len(deep) - 1}-deep"

    text = json.dumps(value, default=stand_in)
    for number, found in enumerate(deep):
        inside = json.dumps(found.value, default=str)
        text = text.replace(f'"deep-{number}-deep"', "[" * DEEP + inside + "]" * DEEP)
    return text.encode()


def mutate_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A file's bytes with one thing wrong, and what that is."""
    place = rng.randrange(len(content) + 1)
    act = rng.choice(["cut", "flip", "zeros", "insert", "empty", "bom", "utf-16", "double", "noise", "remove"])
    if act == "cut":
        return content[:place], f"cut after {place} bytes"
    if act == "flip":
        flipped = bytearray(content)
        for _ in range(min(rng.choice([1, 1, 4, 64]), len(content))):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(flipped), "bits flipped"
    if act == "zeros":
        return content[:place] + bytes(len(content) - place), f"zeros from byte {place}"
    if act == "insert":
        return content[:place] + rng.randbytes(rng.choice([1, 8, 100])) + content[place:], f"noise at byte {place}"
    if act == "empty":
        return b"", "empty"
    if act == "bom":
        return b"\xef\xbb\xbf" + content, "with a byte order mark"
    if act == "utf-16":
        return content.decode("latin-1").encode("utf-16"), "in UTF-16"
    if act == "double":
        return content + content, "twice"
    if act == "noise":
        return rng.randbytes(max(1, len(content))), "noise"
    end = min(len(content), place + rng.choice([1, 8, 100]))
    return content[:place] + content[end:], f"bytes {place} to {end} removed"


def replace_by(rng: random.Random, path: Path) -> str:
    """Put something else under a file's name; return what it is."""
    act = rng.choice(["folder", "pipe", "/dev/zero", "/dev/null", "dangling link", "link to itself", "missing", "huge"])
    remove(path)
    if act == "folder":
        path.mkdir()
        (path / "x").write_text("x", encoding="utf-8")
    elif act == "pipe":
        os.mkfifo(path)
    elif act.startswith("/dev"):
        path.symlink_to(act)
    elif act == "dangling link":
        path.symlink_to("nowhere")
    elif act == "link to itself":
        path.symlink_to(path.name)
    elif act == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 42)  # a sparse file: four tebibytes of zeros
    return f"{path.name}: {act}"


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Deep:
    """A value within many lists, which the standard library's writer could not walk through."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _places(value: Any, path: str = "") -> Any:
    """(container, key, path) of everything inside a value."""
    if isinstance(value, dict | list):
        for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
            name = f"{path}.{key}" if path else str(key)
            yield value, key, name
            yield from _places(inside, name)


def _of_another_type(rng: random.Random, value: Any) -> Any:
    """The same thing said otherwise: "5" for 5, [5] for 5."""
    choices: list[Any] = [str(value), [value], {"value": value}]
    if isinstance(value, int | float) and not isinstance(value, bool):
        choices += [value + 0.5, -value, value * 10**9, float(value)]
    return rng.choice(choices)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."
