"""A stream of tokens cut into sequences of a model's length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Tokens(Protocol):
    """A split's tokens as one long stream."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Tokens start … stop - 1: (stop - start,)."""
        ...


@dataclass(frozen=True)
class Rows:
    """Sequences to learn from. Shapes: n sequences, T tokens."""

    inputs: npt.NDArray[np.int64]  # (n, T)
    targets: npt.NDArray[np.int64]  # (n, T), the tokens that follow; -100 counts for nothing
    document_ids: npt.NDArray[np.int64] | None  # (n, T), where attention is to stay inside documents


class Sequences(Protocol):
    """What a run reads: `count` sequences of `block_size` tokens by their numbers, in any order."""

    @property
    def count(self) -> int: ...
    @property
    def block_size(self) -> int: ...

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Sequence numbers (n,) to their tokens."""
        ...

    def target_count(self, numbers: npt.NDArray[np.int64]) -> int:
        """How many targets the sequences (n,) have, without reading them."""
        ...


class JoinedSequences:
    """The sequences of several sources, numbered one source after another."""

    def __init__(self, parts: dict[str, Sequences]) -> None:
        """Args: parts: by the sources' names, all of one length."""
        self.parts, self._list = parts, list(parts.values())
        self.block_size = self._list[0].block_size
        self._ends = np.cumsum([part.count for part in self._list])
        self._starts = self._ends - [part.count for part in self._list]

    @property
    def count(self) -> int:
        return int(self._ends[-1])

    def sources(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of each one's source, (n,)."""
        return np.searchsorted(self._ends, numbers, side="right")

    def _by_source(
        self, numbers: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Sequences, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Each source that has some of the numbers (n,): where they are among them, and its own numbers."""
        sources = self.sources(numbers)
        own = numbers - self._starts[sources]  # (n,)
        order = np.argsort(sources, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(sources[order])) + 1):
            if len(places):
                yield self._list[int(sources[places[0]])], places, own[places]

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """As each source reads its own."""
        shape = len(numbers), self.block_size
        inputs, targets, documents = (np.empty(shape, dtype=np.int64) for _ in range(3))
        masked = False
        for part, places, own in self._by_source(numbers):
            rows = part.rows(own)
            inputs[places], targets[places] = rows.inputs, rows.targets
            if rows.document_ids is not None:
                documents[places], masked = rows.document_ids, True
        return Rows(inputs, targets, documents if masked else None)

    def target_count(self, numbers: npt.NDArray[np.int64]) -> int:
        return sum(self.target_counts(numbers))

    def target_counts(self, numbers: npt.NDArray[np.int64]) -> tuple[int, ...]:
        """How many targets of each source the sequences (n,) have."""
        sources = self.sources(numbers)
        own = numbers - self._starts[sources]
        return tuple(part.target_count(own[sources == source]) for source, part in enumerate(self._list))


def document_ids(tokens: npt.NDArray[np.int64], begin_of_text_id: int) -> npt.NDArray[np.int64]:
    """Which document of its row each token belongs to, counted from 0 or 1: (..., T) to (..., T).

    The token starts the document that it precedes (most vocabularies have end of text there); a row's first tokens may
    continue an earlier one.
    """
    return np.cumsum(tokens == begin_of_text_id, axis=-1)


class Windows:
    """A stream cut into sequences of T inputs and their T targets; sequence i starts at token i·stride.

    With stride T, the default, each token is a target once, except the stream's first and the fewer than T at its end
    that fill no sequence. With a smaller one sequences overlap: with stride 1 every token starts a sequence.
    """

    def __init__(
        self, stream: Tokens, block_size: int, stride: int | None = None, *, split_documents_at: int | None = None
    ) -> None:
        """Args: split_documents_at: the id that starts a document, where `rows` shall tell documents apart."""
        self._stream = stream
        self._split_documents_at = split_documents_at
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        assert 1 <= self.stride <= block_size, f"stride {stride}: tokens between sequences would never be read"
        self.count = max(0, (len(stream) - 1 - block_size) // self.stride + 1)

    def read(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sequence numbers (n,) to their tokens (n, T+1) int64; a sequence's last token is its last target."""
        tokens = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        for row, window in zip(tokens, windows, strict=True):
            start = int(window) * self.stride
            row[:] = self._stream.read(start, start + self.block_size + 1)
        return tokens

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Sequence numbers (n,) to inputs and targets."""
        tokens = self.read(numbers)  # (n, T+1)
        inputs, border = tokens[:, :-1], self._split_documents_at
        return Rows(inputs, tokens[:, 1:], None if border is None else document_ids(inputs, border))

    def target_count(self, numbers: npt.NDArray[np.int64]) -> int:
        """Every token of the sequences (n,) has one."""
        return len(numbers) * self.block_size
