"""Slurm's short form of a list of nodes, `n[01-03,7],login1`, in words; a container has no scontrol to ask."""

import itertools
import re

_PART = re.compile(r"\[([^][]*)\]|([^][]+)")


def expand(text: str) -> list[str]:
    """The names, in their order; none of "", "(null)" and what is no such list."""
    if text in ("", "(null)"):
        return []
    names = []
    for item in re.findall(r"(?:[^,[]|\[[^]]*\])+", text):  # commas inside brackets are a part of an item
        parts = [_numbers(group) if group else [plain] for group, plain in _PART.findall(item)]
        names += ["".join(words) for words in itertools.product(*parts)]
    return list(dict.fromkeys(names))


def _numbers(group: str) -> list[str]:
    """What `01-03,7` stands for."""
    found = []
    for piece in group.split(","):
        first, dash, last = piece.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        else:
            found.append(piece)
    return found
