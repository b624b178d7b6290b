"""Writing conversations: their tokens, and beside every shard of them one of marks.

Both travel together as one array: the mark in the two highest bits of 32, the token id below.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data_prep.token_sets.manifest import COUNTED, MARK_COUNT, NO_MARK, STARTS, ConversationCounts, Shard, marks_of
from data_prep.token_sets.sequences import Tokens
from data_prep.token_sets.shard_writer import ShardWriter, Stored
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import Ids

MARKED_DTYPE = np.dtype("<u4")
MARK_SHIFT = 30
BLOCK_TOKENS = 1 << 22


def with_marks(ids: Ids, counted: npt.NDArray[np.bool_]) -> Ids:
    """One conversation's ids (n,) with their marks, (n,) uint32. Args: counted: (n,) which are learned from."""
    marks = np.where(counted, COUNTED, NO_MARK).astype(MARKED_DTYPE)
    marks[:1] = STARTS  # nothing precedes it that could predict it
    marked: Ids = ids.astype(MARKED_DTYPE) | (marks << MARK_SHIFT)
    return marked


class _Marks:
    """What a `ShardWriter` asks of a tokenizer, of marks: their shards' documents are conversations."""

    piece_bytes = np.zeros(MARK_COUNT, dtype=np.int32)
    begin_of_text_id: int | None = STARTS

    def __init__(self, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.dtype = dtype


class MarkedWriter(ShardWriter):
    """A `ShardWriter` of tokens with their marks, which go to shards of their own.

    `finished_marks` are those that belong to `finished`. A shard's marks are published before its tokens.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Stored,
        shard_tokens: int,
        *,
        finished: Sequence[Shard] = (),
        finished_marks: Sequence[Shard] = (),
    ) -> None:
        super().__init__(folder, split, tokenizer, shard_tokens, finished=finished)
        marks = _Marks(tokenizer.dtype)
        self._marks = ShardWriter(folder, marks_of(split), marks, shard_tokens, finished=finished_marks)

    @property
    def marks(self) -> list[Shard]:
        """The published shards of marks."""
        return self._marks.shards

    def write(self, tokens: Ids) -> None:
        """Append ids with their marks (n,) uint32, as `with_marks` makes them."""
        self._marks.write((tokens >> MARK_SHIFT).astype(self._marks.dtype))
        super().write((tokens & ((1 << MARK_SHIFT) - 1)).astype(self.dtype))

    def close(self) -> tuple[Shard, ...]:
        self._marks.close()
        return super().close()

    def abandon(self) -> None:
        self._marks.abandon()
        super().abandon()


def count_conversations(marks: Tokens) -> ConversationCounts:
    """What a split's marks say of it."""
    conversations = counted = longest = 0
    begun = 0  # where the conversation starts that is being read
    for place in range(0, len(marks), BLOCK_TOKENS):
        block = marks.read(place, min(len(marks), place + BLOCK_TOKENS))
        counted += int(np.count_nonzero(block == COUNTED))
        starts = np.flatnonzero(block == STARTS) + place
        if len(starts):
            conversations += len(starts)
            longest = max(longest, int(np.diff(starts, prepend=begun).max()))
            begun = int(starts[-1])
    return {
        "conversations": conversations,
        "answer_tokens": counted,
        "longest": max(longest, len(marks) - begun),
    }


def check_marks(tokens: TokenSet, split: str) -> None:
    """Raises UserError where a split's marks are of other conversations or answers than its manifest counts."""
    marks, recorded = tokens.marks(split), (tokens.manifest.conversations or {}).get(split)
    if marks is not None and count_conversations(marks) != recorded:
        raise UserError(
            f"the marks of the {split} split of {tokens.folder} are not those that were prepared: copy it again, or "
            "prepare the set again with --force"
        )
