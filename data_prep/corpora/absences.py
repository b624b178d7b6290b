"""Records without text in a source: counted by kind, the first of them named, as far as the shards rest on them."""

from typing import cast

from data_prep.corpora.encode_worker import Part
from data_prep.corpora.journal import Journal, SplitState
from data_prep.token_sets.manifest import SkippedRow

NAMED = 10


class Absences:
    """Counts a part's records without text in a split's state, if that counts them, each once and in their order."""

    def __init__(self, part: Part, journal: Journal, state: SplitState) -> None:
        self._part, self._journal, self._state = part, journal, state
        self._waiting = list(part.absent)

    def add_before(self, row: int | None) -> None:
        """Count those in rows before `row` that have not been counted; None: all."""
        if self._state.absent is None:
            return
        counts, first = self._state.absent["counts"], self._state.absent["first"]
        while self._waiting and (row is None or self._waiting[0].row < row):
            found = self._waiting.pop(0)
            counts[found.how] = counts.get(found.how, 0) + 1
            if len(first) < NAMED:
                first.append(cast(SkippedRow, self._journal.skipped.entry_of(self._part, found.row)))
