"""What a preparation skips because it can't be read: counted, named and recorded, up to an allowed number."""

from typing import Any

from common.errors import UserError
from data_prep.corpora.encode_worker import Part, Place, Skip
from data_prep.corpora.file_kinds import kind_of
from data_prep.corpora.readers import lines_before

NAMED = 5  # in messages


class Skipped:
    """Every skipped row, once, by its place, whichever split read it.

    An entry is `file` and `line`, or of parquet `row_group` and `row`, or of a compressed text its `block`; with `rest`
    nothing after that in the file, or the row group, could be read.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self._entries: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._lines: tuple[str, int, int] = ("", 0, 0)  # a file, a unit of it, and the lines before that

    def add(self, part: Part, last: Place | None) -> None:
        """Record a part's skipped rows, only up to the row `last` where that is the split's last one.

        Raises UserError where they are more than allowed.
        """
        for skip in part.skipped:
            key = (part.work.file, part.work.unit, skip.row)
            if key not in self._entries and (last is None or key <= last[:3]):
                self._entries[key] = self._entry(part, skip)
                if len(self._entries) > self.allowed:
                    words = describe_skipped(self.entries)
                    raise UserError(
                        f"more than --skip-bad {self.allowed} can't be read: {words} ({skip.why}): fix or "
                        "remove them, or allow more"
                    )

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The skipped rows in the source's order."""
        return [self._entries[key] for key in sorted(self._entries)]

    def to_store(self) -> dict[str, Any]:
        """The journal's entry: empty where nothing was skipped."""
        return {"skipped": [[key, self._entries[key]] for key in sorted(self._entries)]} if self._entries else {}

    def restore(self, stored: list[Any], files_read: int | None) -> None:
        """Take over what an interrupted run had skipped in the files that its shards rest on."""
        for key, entry in stored:
            if files_read is None or key[0] < files_read:
                self._entries[tuple(key)] = entry
        if len(self._entries) > self.allowed:
            raise UserError(
                f"the published shards have skipped {describe_skipped(self.entries)}: allow it with --skip-bad "
                f"{len(self._entries)}, or start again with --force"
            )

    def entry_of(self, part: Part, row: int) -> dict[str, Any]:
        """A row by its file and place in it."""
        return self._entry(part, Skip(row, "", False))

    def _entry(self, part: Part, skip: Skip) -> dict[str, Any]:
        work, kind = part.work, kind_of(part.work.name)
        if kind.content == "parquet":
            entry: dict[str, Any] = {"file": work.name, "row_group": work.unit, "row": skip.row}
        elif kind.content == "lines":
            known = self._lines[1:] if self._lines[0] == work.path and self._lines[1] <= work.unit else (0, 0)
            self._lines = (work.path, work.unit, lines_before(work.path, work.unit, known))
            entry = {"file": work.name, "line": self._lines[2] + skip.row + 1}
        else:
            entry = {"file": work.name, "block": skip.row}
        return entry | ({"rest": True} if skip.rest else {})


def describe_skipped(entries: list[dict[str, Any]]) -> str:
    """The first entries in words, and how many more there are."""
    words = []
    for entry in entries[:NAMED]:
        where = " ".join(f"{name.replace('_', ' ')} {entry[name]}" for name in entry if name not in ("file", "rest"))
        words.append(f"{entry['file']} {where}" + " and what follows it" * entry.get("rest", False))
    return ", ".join(words) + f" and {len(entries) - NAMED} more" * (len(entries) > NAMED)
