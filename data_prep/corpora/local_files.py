"""The user's own files: which ones of a folder are read (`file_walk.py`), and which of them are for training
(`split_names.py`); the files on this disk as a corpus reads them."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.os_errors import refusal
from common.regular_file import read_at_most
from common.yaml_file import BadYaml, parse_yaml
from data_prep.corpora.corpus import InputFile
from data_prep.corpora.fields import record_of, text_of
from data_prep.corpora.file_kinds import DAMAGE, KINDS, READABLE, fingerprint, kind_of, open_bytes, suffix_of
from data_prep.corpora.file_walk import LeftOut, Walk, describe_left_out
from data_prep.corpora.hub import config_patterns, matches
from data_prep.corpora.split_names import choose_training_files

CARD_BYTES, CARD_NODES = 16 << 20, 1_000_000  # of thousands of configurations with their columns
FIRST_LINE_BYTES = 64 << 20  # of a .json file, which may be one line of gigabytes


class LocalFiles:
    """Files that are already on this disk."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self.listed = tuple(self._look_at(name) for name in sorted(names))

    def _look_at(self, name: str) -> InputFile:
        path = self._folder / name
        try:
            return InputFile(name, path.stat().st_size, fingerprint(path))
        except OSError as error:
            raise UserError(refusal("read", error, path, otherwise="fetch it again, or remove it")) from None

    def path(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> Path:
        return self._folder / self.listed[index].name

    def done_with(self, index: int) -> None:
        """Does nothing: the files are the user's."""


@dataclass(frozen=True)
class LocalSource:
    """What was found: the files to read, those skipped by reason, and a note."""

    files: LocalFiles
    left_out: LeftOut
    note: str | None = None


def find_files(
    paths: Sequence[Path], field: str, *, all_splits: bool = False, suffixes: Collection[str] | None = None
) -> LocalSource:
    """All readable files that the paths name or contain, each once, named from their common folder.

    A link counts by its own name: its target's name may not show its kind (as in the hub's cache). A file
    that is named itself is read, hidden or not. One called .json has to hold lines with the field.

    Args: suffixes: of KINDS; only such files are read. None: all.

    Raises UserError where there is nothing to read, something can't be read, or it is unclear what to train on.
    """
    walk = Walk() if suffixes is None else Walk(suffixes=set(suffixes))
    for path in paths:
        if path.is_dir():
            walk.below(path)
        elif path.is_file():
            kind_of(path.name)
            if suffixes is not None and suffix_of(path.name) not in suffixes:
                raise UserError(f"{path} can't be read here: give {', '.join(sorted(suffixes))}")
            if problem := _json_problem(path, field):
                raise UserError(f"{path} can't be read: it is {problem}")
            walk.take(path)
        else:
            raise UserError(f"{path} is not a regular file" if path.exists() else f"there is no file or folder {path}")
    walk.follow_links()
    found: list[Path] = []
    for file in walk.each_once():
        if problem := _json_problem(file.path, field):
            walk.note(f"JSON, but {problem.split(' (')[0]}", file.shown)
        else:
            found.append(Path(os.path.abspath(file.path)))
    asked = ", ".join(map(str, paths))
    if not found:
        raise UserError(f"no files to read in {asked}{_reasons(walk)}: give some of {READABLE}")
    folder = _common_folder(found)
    choice = choose_training_files([path.relative_to(folder).as_posix() for path in found], asked, all_splits)
    taken = [folder / name for name in choice.names]
    folder = _common_folder(taken)
    names = [path.relative_to(folder).as_posix() for path in taken]
    return LocalSource(LocalFiles(folder, names), walk.left_out | choice.left_out, choice.note)


def local_parquet(folder: Path, config: str, *, all_splits: bool = False) -> LocalSource:
    """The parquet files of a folder to train on; of a copy of a data set with its README.md those of the configuration.

    Raises UserError where there are none, or it is unclear what to train on.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give --source one with parquet files")
    walk = Walk(suffixes={".parquet"})
    walk.below(folder)
    walk.follow_links()
    names = [file.path.relative_to(folder).as_posix() for file in walk.each_once()]
    note = None
    if (patterns := _patterns_of_card(folder / "README.md", config, all_splits)) is not None:
        outside = [name for name in names if not matches(name, patterns)]
        names = [name for name in names if matches(name, patterns)]
        for name in outside:
            walk.note(f"not of the configuration {config!r}" + " and for training" * (not all_splits), name)
    else:
        choice = choose_training_files(names, str(folder), all_splits)
        names, note = choice.names, choice.note
        walk.left_out |= choice.left_out
    if not names:
        raise UserError(f"{folder} has no parquet files (for the configuration {config!r}){_reasons(walk)}")
    return LocalSource(LocalFiles(folder, names), walk.left_out, note)


def _patterns_of_card(readme: Path, config: str, all_splits: bool) -> list[str] | None:
    """The file patterns of a configuration in a data set's card; None where there is no card that lists any."""
    if not readme.is_file():
        return None
    try:
        text = read_at_most(readme, CARD_BYTES).decode("utf-8-sig", "replace")
        parts = text.split("---\n", 2)
        card = parse_yaml(parts[1], most_nodes=CARD_NODES) if len(parts) == 3 and not parts[0] else None
    except (OSError, OverflowError, BadYaml) as error:
        raise UserError(f"{readme} is a data set's card that can't be read ({error}): remove it") from None
    if not isinstance(card, dict) or not card.get("configs"):
        return None
    return config_patterns(card, config, str(readme), all_splits=all_splits)


def _json_problem(path: Path, field: str) -> str | None:
    """What a .json file holds instead of lines with the field, judged by the first; None for lines, or another name."""
    suffix = suffix_of(path.name) or ""
    if suffix.split(".")[1:2] != ["json"]:
        return None
    try:
        with open_bytes(path, KINDS[suffix]) as file:
            line = b"\n"
            while line and not line.strip():
                line = file.readline(FIRST_LINE_BYTES)
        record = record_of(line) if line else {field: ""}
    except json.JSONDecodeError:
        record = None
    except (*DAMAGE, RecursionError):  # reading it will report it
        return None
    if not isinstance(record, dict):
        return "a document, not an object per line ('jq -c .' makes a line of an object, 'jq -c .[]' lines of a list)"
    try:
        text_of(record, field)
    except ValueError as error:
        return f"without the text: its first line has {error}"
    return None


def _reasons(walk: Walk) -> str:
    told = "; ".join(describe_left_out(walk.left_out))
    return f" (skipped: {told})" if told else ""


def _common_folder(paths: Iterable[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))
