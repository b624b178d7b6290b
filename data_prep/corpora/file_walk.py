"""Which files a folder holds for reading: regular ones of a known kind, each once, in an order of their own.

A file counts under its first name, one that no linked folder leads to where there is one. Hidden files and those of
other programs' bookkeeping are skipped. Whatever is skipped is recorded with its reason.
"""

import os
import stat
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.os_errors import refusal
from common.plain_text import printable
from data_prep.corpora.file_kinds import KINDS, suffix_of

BOOKKEEPING = {"__MACOSX", "_temporary", "_delta_log", "lost+found"}  # of archives, Spark, Delta tables, file systems
SHOWN_NAMES = 3
HIDDEN, OTHER_KIND, NOT_REGULAR, SAME_FILE, SAME_FOLDER, LOOP = (
    "hidden, or of another program's bookkeeping",
    "of a kind that is not read",
    "not regular files (pipes, sockets, devices)",
    "the same file under another name",
    "linked folders that are read under another name",
    "links that lead back to a folder above them",
)
LeftOut = dict[str, list[str]]  # names by reason


class Found(NamedTuple):
    """A file: whether a linked folder leads to it, where it is, and its name in messages."""

    linked: bool
    path: Path
    shown: str


@dataclass
class Walk:
    """The files below folders that have one of `suffixes`, and what was skipped."""

    suffixes: Collection[str] = frozenset(KINDS)
    _files: list[tuple[Found, os.stat_result]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=dict)
    _links: deque[tuple[Path, Path]] = field(default_factory=deque)  # a link to a folder, and the folder asked for
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def below(self, folder: Path) -> None:
        self._folder(folder, folder, linked=False)

    def follow_links(self) -> None:
        """Enter the linked folders: after all others, so that a link to one of them adds nothing."""
        while self._links:
            link, root = self._links.popleft()
            real, parent = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent))
            if real == parent or real in parent.parents:
                self.note(LOOP, _shown(link, root))
            elif _identity(os.stat(link)) in self._seen:
                self.note(SAME_FOLDER, _shown(link, root))
            else:
                self._folder(link, root, linked=True)

    def take(self, path: Path) -> None:
        """Add a file that was named itself."""
        self._files.append((Found(False, path, str(path)), path.stat()))

    def each_once(self) -> list[Found]:
        """Every file under its first name, in the order of their paths."""
        first: dict[Any, Found] = {}
        for file, status in sorted(self._files, key=lambda entry: entry[0]):
            # the size and time as well: a network file system's numbers may collide, and some have none
            number = status.st_ino or os.path.realpath(file.path)
            kept = first.setdefault((status.st_dev, number, status.st_size, status.st_mtime_ns), file)
            if os.path.abspath(kept.path) != os.path.abspath(file.path):
                self.note(SAME_FILE, file.shown)
        return sorted(first.values(), key=lambda file: file.path)

    def note(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def _folder(self, folder: Path, root: Path, *, linked: bool) -> None:
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            try:
                self._seen.add(_identity(os.stat(here)))
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError as error:
                raise UserError(refusal("read", error, here)) from None
            for entry in entries:
                path = here / entry.name
                found = self._look_at(entry, path, root)
                if found is None:
                    continue
                if not stat.S_ISDIR(found.st_mode):
                    self._files.append((Found(linked, path, _shown(path, root)), found))
                elif entry.is_symlink():
                    self._links.append((path, root))
                elif linked and _identity(found) in self._seen:
                    self.note(SAME_FOLDER, _shown(path, root))
                else:
                    waiting.append(path)

    def _look_at(self, entry: "os.DirEntry[str]", path: Path, root: Path) -> os.stat_result | None:
        """What a name leads to, where that is to be looked into."""
        shown = _shown(path, root)
        if entry.name.startswith(".") or entry.name in BOOKKEEPING:
            self.note(HIDDEN, shown + "/" * entry.is_dir(follow_symlinks=False))
            return None
        try:
            found = entry.stat()
        except OSError as error:  # a dangling link, perhaps: somebody misses that file
            if suffix_of(entry.name) not in self.suffixes:
                self.note(OTHER_KIND, shown)
                return None
            raise UserError(refusal("read", error, path, otherwise="if it is a dangling link, remove it")) from None
        if stat.S_ISDIR(found.st_mode):
            return found
        if not stat.S_ISREG(found.st_mode):
            self.note(NOT_REGULAR, shown)
        elif suffix_of(entry.name) not in self.suffixes:
            self.note(OTHER_KIND, shown)
        else:
            return found
        return None


def describe_left_out(left_out: LeftOut) -> list[str]:
    """A line for every reason: how many, why, and the first names."""
    lines = []
    for reason, names in sorted(left_out.items()):
        shown = ", ".join(sorted(names)[:SHOWN_NAMES]) + ", …" * (len(names) > SHOWN_NAMES)
        lines.append(printable(f"{len(names):,} {reason}: {shown}"))
    return lines


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
