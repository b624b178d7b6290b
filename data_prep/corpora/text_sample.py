"""A bounded sample of a corpus's text, drawn by a seeded hash of where each stretch stands, and text held back from it.

Long documents are cut into stretches. Documents that a preparation would choose for validation are held back, whatever
the seed: a vocabulary learned from the sample has not seen them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from common.errors import UserError
from common.progress import progress_bar
from data_prep.corpora.corpus import Files
from data_prep.corpora.encode_worker import ENCODING_ERRORS
from data_prep.corpora.preparation import VALIDATION_ONE_IN, chosen_for_validation
from data_prep.corpora.readers import UnitReader, units
from data_prep.token_sets.documents import documents_of
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import SAFE_BORDER

STRETCH_CHARACTERS = 1 << 16
BORDER_CHARACTERS = 1 << 10  # how far a place to cut at is looked for


class Document(NamedTuple):
    """A document or a part of one: where it stands, its text, whether validation would choose it."""

    place: str
    text: str
    held_back: bool


class Source(Protocol):
    """A corpus to sample from. `text_bytes` is about how much text it has, `held_bytes` how much of it is held back."""

    text_bytes: int
    held_bytes: int

    def documents(self) -> Iterator[Document]: ...


class FileSource:
    """The documents of files, as the preparations read them. Raises UserError where one can't be read."""

    def __init__(self, files: Files, field: str) -> None:
        self._files, self._field = files, field
        self.text_bytes = sum(
            unit.bytes for index in range(len(files.listed)) for unit in units(files.path(index), field)
        )
        self.held_bytes = self.text_bytes // VALIDATION_ONE_IN

    def documents(self) -> Iterator[Document]:
        reader = UnitReader()
        for index, listed in enumerate(self._files.listed):
            path = self._files.path(index)
            try:
                for number, unit in enumerate(units(path, self._field)):
                    for fragment in reader.read(str(path), number, self._field, 0, unit.rows):
                        held_back = chosen_for_validation(fragment.key, VALIDATION_ONE_IN)
                        yield Document(f"{listed.name}:{number}:{fragment.row}", fragment.text, held_back)
            except ENCODING_ERRORS as error:
                raise UserError(f"{path} can't be read ({error}): repair it, or leave it out") from None
        reader.close()


class TokenSetSource:
    """The text of a prepared token set: its training split; its validation split is held back."""

    def __init__(self, folder: Path) -> None:
        self._set = TokenSet.open(folder)
        self._tokenizer = load_tokenizer(self._set.tokenizer_spec)
        self.text_bytes = self._set.split("train").bytes
        self.held_bytes = self._set.split("val").bytes

    def documents(self) -> Iterator[Document]:
        for split in ("val", "train"):
            stream = self._set.split(split)
            for number, ids in enumerate(documents_of(stream, self._tokenizer.begin_of_text_id)):
                framed = np.isin(ids, [i for i in (self._tokenizer.begin_of_text_id, *self._tokenizer.end_ids) if i])
                text = self._tokenizer.decode(ids[~framed])
                yield Document(f"{split}:{number}", text, split == "val")


@dataclass
class Sample:
    """A sample that is being drawn, and what was drawn so far.

    Attributes:
        most_bytes: of text to learn from.
        most_distinct: bytes of distinct words in it, each counted once. No piece is longer than the words around it, so
            this bounds the memory of whoever counts pieces, also for text without spaces, where hardly any repeats.
        held_back: text that was not given out, most_held_bytes at most.
        ended_by: what ended it before the corpus ended, in words.
    """

    source: Source
    seed: int
    most_bytes: int
    most_distinct: int
    most_held_bytes: int
    bytes: int = 0
    stretches: int = 0
    distinct_bytes: int = 0
    held_back: list[str] = field(default_factory=list)
    held_back_bytes: int = 0
    ended_by: str | None = None

    def texts(self) -> Iterator[str]:
        """The stretches to learn from, in the source's order."""
        share = self.most_bytes / max(1, self.source.text_bytes)
        held_share = self.most_held_bytes / max(1, self.source.held_bytes)
        seen: set[str] = set()
        total = min(self.most_bytes, self.source.text_bytes)
        with progress_bar(total, "B", "sampling", scale=True) as bar:
            for document in self.source.documents():
                whole = len(document.text) <= STRETCH_CHARACTERS
                for number, text in enumerate(stretches_of(document.text)):
                    chance, other = self._chances(f"{document.place}:{number}")
                    # of a long text a part is held back, as there may be no second one
                    if document.held_back or (not whole and other < 1 / VALIDATION_ONE_IN):
                        self._hold_back(text, chance < held_share)
                    elif chance < share and document.text:
                        if not self._has_room(text, seen):
                            return
                        bar.update(len(text.encode("utf-8", "replace")))
                        yield text

    def _chances(self, place: str) -> tuple[float, float]:
        """Two numbers in 0 … 1, drawn from the seed and the place."""
        digest = hashlib.blake2b(f"{self.seed}:{place}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first, second = (int.from_bytes(digest[part : part + 8], "little") for part in (0, 8))
        return first / 2**64, second / 2**64

    def _hold_back(self, text: str, taken: bool) -> None:
        if taken and self.held_back_bytes < self.most_held_bytes:
            self.held_back.append(text)
            self.held_back_bytes += len(text.encode("utf-8", "replace"))

    def _has_room(self, text: str, seen: set[str]) -> bool:
        """Count a stretch, unless it would exceed one of the bounds."""
        size = len(text.encode("utf-8", "replace"))
        new = set(text.split()) - seen
        distinct = sum(len(word.encode("utf-8", "replace")) for word in new)
        if self.bytes + size > self.most_bytes:
            self.ended_by = "the sample is full"
        elif self.distinct_bytes + distinct > self.most_distinct:
            self.ended_by = "it has as many distinct words as --max-distinct allows"
        else:
            seen |= new
            self.bytes += size
            self.distinct_bytes += distinct
            self.stretches += 1
            return True
        return False


def stretches_of(text: str) -> Iterator[str]:
    """A text in stretches of about STRETCH_CHARACTERS, cut before white space where there is some."""
    start = 0
    while len(text) - start > STRETCH_CHARACTERS + BORDER_CHARACTERS:
        stop = start + STRETCH_CHARACTERS
        found = SAFE_BORDER.search(text, stop, stop + BORDER_CHARACTERS)
        stop = found.start() if found else stop
        yield text[start:stop]
        start = stop
    yield text[start:]
