"""Which split a file belongs to, by its name: files that are named for testing must not become training data.

A word of a file's name decides, or else one of the nearest folder above that has one (`data/test-00000.parquet`,
`val/0.jsonl`, `c4-validation.00000.json.gz`). Where files are named for training, those named for another split are
left out. Where none is, a set that is named for one other split as a whole is read, as a test set prepared by itself;
else it is unclear what to train on, and it is refused. A text file may be called `test.txt` for what it is about, so
its name counts only beside one that is alike but for the word `train`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import UserError
from data_prep.corpora.file_kinds import KINDS, suffix_of

TRAIN = "train"
_WORDS = dict.fromkeys(("train", "training"), TRAIN)
_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), "test")
_TEXT_WORDS = {"train", "validation", "valid", "val", "dev", "test"}  # `training.md` is a chapter


@dataclass(frozen=True)
class _Named:
    """What a name shows: the split, and the name without its numbers and with a placeholder for the word."""

    split: str
    pattern: str


@dataclass(frozen=True)
class Choice:
    """The names to read, those left out by reason, and a note."""

    names: list[str]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str | None = None


def choose_training_files(names: Sequence[str], where: str, all_splits: bool = False) -> Choice:
    """The names to train on.

    Args:
        names: relative to what was asked for, with "/".
        where: what was asked for, for the message.
        all_splits: take all of them.

    Raises UserError where some are named for another split and none for training.
    """
    said = {name: found for name in names if (found := _named(name)) is not None}
    patterns = {found.pattern for found in said.values() if found.split == TRAIN}
    held_out = {
        name: found.split
        for name, found in said.items()
        if found.split != TRAIN and (_is_record(name) or found.pattern in patterns)
    }
    if all_splits or not held_out:
        return Choice(list(names))
    if not patterns:
        if held_out.keys() == {name for name in names if _is_record(name)} and len(set(held_out.values())) == 1:
            return Choice(list(names), note=f"all that is read is named for {min(held_out.values())}")
        first = min(held_out)
        raise UserError(
            f"{where}: {first} is named for {held_out[first]}, and nothing for {TRAIN}, so it is unclear what "
            "to train on: give only the files for training, or --all-splits to take everything"
        )
    left_out: dict[str, list[str]] = {}
    for name, split in held_out.items():
        left_out.setdefault(f"named for {split} (--all-splits takes everything)", []).append(name)
    return Choice([name for name in names if name not in held_out], left_out)


def _named(name: str) -> _Named | None:
    *folders, file = name.split("/")
    parts = [*folders, file[: len(file) - len(suffix_of(file) or "")]]
    for place in range(len(parts) - 1, -1, -1):
        words = [word for word in re.findall(r"[a-z]+", parts[place].lower()) if word in _WORDS]
        words = words if _is_record(name) else [word for word in words if word in _TEXT_WORDS]
        splits = {_WORDS[word] for word in words}
        if len(splits) == 1:
            shape = re.sub(r"\d+", "#", parts[place].lower())
            shape = re.sub(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", "{}", shape)
            return _Named(splits.pop(), "/".join([*parts[:place], shape]))
    return None


def _is_record(name: str) -> bool:
    return KINDS[suffix_of(name) or ".txt"].content != "text"
