"""Text to token ids and back: GPT-2 BPE, characters or bytes, each with an identity that is stored with the data."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from common.errors import UserError
from data_prep.token_sets.manifest import token_dtype
from data_prep.tokenization.cached_files import place_gpt2_files, tokenizer_cache_folder
from data_prep.tokenization.gpt2_encoding import Gpt2Encoding

Ids = np.ndarray[Any, Any]
END_OF_TEXT = "<|endoftext|>"
# Where a text may be cut so that the ids of its pieces, joined, are those of the whole: GPT-2's pattern never lets a
# piece run from a visible character into white space, and only its white-space rules look ahead.
SAFE_BORDER = re.compile(r"(?<=\S)(?=[ \n])")
SEGMENT_CHARACTERS = 1 << 18  # longer texts are encoded in pieces, which bounds memory


class Tokenizer(ABC):
    """A reversible mapping of text to ids 0 … vocab_size - 1.

    `spec` is its identity as JSON: `kind`, `vocab_size`, `end_of_text_id` (None where there is none) and `sha256`,
    which covers the text every id stands for; for `char` also `symbols`.

    A document starts with `begin_of_text_id`. Where that is another id than `end_of_text_id`, the latter also ends
    the document; where they are the same, it comes before every document and so ends the one before.

    Attributes:
        begins_contexts: any text that the model continues starts with `begin_of_text_id`, in evaluations, too.
        other_end_ids: other ids by which the model may end a text.
        spaces_after_special: a text's first word gets a space before it after a special token, too, not only where the
            text starts (tokenizers that put one there at all).
        token_count: ids that stand for something: there are fewer than vocab_size where ids have gaps.
    """

    begins_contexts = False
    other_end_ids: tuple[int, ...] = ()
    spaces_after_special = False

    def __init__(
        self,
        kind: str,
        pieces: Sequence[bytes],
        end_of_text_id: int | None,
        *,
        begin_of_text_id: int | None = None,
        also: str = "",
        **details: Any,
    ) -> None:
        """`pieces[i]` are the UTF-8 bytes that id i stands for; the ids that start and end texts stand for none.

        Args:
            begin_of_text_id: None: the same as the end's.
            also: what else the identity covers.
        """
        self.vocab_size = self.token_count = len(pieces)
        self.end_of_text_id = end_of_text_id
        self.begin_of_text_id = end_of_text_id if begin_of_text_id is None else begin_of_text_id
        self.dtype = token_dtype(self.vocab_size)
        # int32 (V,): bytes of text per id, so that shards know how much text they hold
        self.piece_bytes = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self._piece_starts = np.cumsum(self.piece_bytes, dtype=np.int64) - self.piece_bytes  # (V,), in all their text:
        self._piece_text = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        digest = hashlib.sha256(f"{kind}:{self.vocab_size}:{end_of_text_id}:".encode())
        digest.update(b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces))
        digest.update(also.encode())
        self.spec: dict[str, Any] = {
            "kind": kind,
            "vocab_size": self.vocab_size,
            "end_of_text_id": end_of_text_id,
            "sha256": digest.hexdigest(),
            **({} if begin_of_text_id is None else {"begin_of_text_id": begin_of_text_id}),
            **details,
        }

    @abstractmethod
    def encode(self, text: str, *, continues: bool = False) -> Ids:
        """Token ids (n,) of the stored dtype (uint16 or uint32). Never yields the end-of-text id, whatever the text.

        Args:
            continues: the text continues one that was encoded before, cut where `cut` allows it. Tokenizers that
                put a space before a text's first word omit it there.
        """

    @abstractmethod
    def decode(self, ids: Ids | Sequence[int], *, continues: bool = False) -> str:
        """Text of token ids (n,); the end of a text shows as <|endoftext|>, broken UTF-8 as U+FFFD.

        Args:
            continues: the ids follow others of the same text. Tokenizers that put a space before a text's first word
                leave it out at the start of a text, and only there.

        Raises ValueError for an id outside the vocabulary.
        """

    @property
    def opening(self) -> Ids:
        """The ids before a document: (1,), or (0,) where the tokenizer marks no documents."""
        return np.array([] if self.begin_of_text_id is None else [self.begin_of_text_id], dtype=self.dtype)

    @property
    def closing(self) -> Ids:
        """The ids after a document: (0,), or (1,) where that is another id than the one before it."""
        return np.array([] if self.begin_of_text_id == self.end_of_text_id else [self.end_of_text_id], dtype=self.dtype)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text while it is generated."""
        return (() if self.end_of_text_id is None else (self.end_of_text_id,)) + self.other_end_ids

    @property
    def special_spellings(self) -> Mapping[str, int]:
        """The ids that no text gives, by their spelling in chat templates and exported files."""
        return {} if self.end_of_text_id is None else {END_OF_TEXT: self.end_of_text_id}

    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for, none for those that no text gives: vocab_size of them."""
        text, ends = self._piece_text.tobytes(), np.cumsum(self.piece_bytes, dtype=np.int64).tolist()
        return [text[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]

    def prompt(self, text: str) -> list[int]:
        """A prompt's ids: it starts a document, as documents of the training data do.

        Raises UserError for a character that the vocabulary lacks.
        """
        return [*self.opening.tolist(), *self.encode(text).tolist()]

    def cut(self, text: str, start: int) -> int | None:
        """The first place from `start` on where `text` may be cut: the ids of its pieces, joined, are the whole's.

        None: there is no such place.
        """
        found = SAFE_BORDER.search(text, start)
        return found.start() if found else None

    def text_bytes(self, ids: Ids) -> bytes:
        """The bytes of text that ids (n,) stand for, as many as their `piece_bytes` add up to."""
        lengths = self.piece_bytes[ids]
        ends = np.cumsum(lengths, dtype=np.int64)
        places = np.repeat(self._piece_starts[ids] - (ends - lengths), lengths)  # less the place in the result
        return bytes(self._piece_text[places + np.arange(len(places))].data)

    def _checked(self, ids: Ids | Sequence[int]) -> Ids:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(f"token ids must be in 0 … {self.vocab_size - 1}, got {array.min()} … {array.max()}")
        return array


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE: 50,257 ids, the last of them end of text (Radford et al. 2019).

    `gpt2-8k` has the bytes and GPT-2's first merges only, for small models, whose time would go into rare words.
    """

    SIZES: ClassVar[Mapping[str, int]] = {"gpt2": 50_257, "gpt2-8k": 8_192}

    def __init__(self, kind: str = "gpt2") -> None:
        place_gpt2_files()
        os.environ["TIKTOKEN_CACHE_DIR"] = str(tokenizer_cache_folder())
        self._encoding = Gpt2Encoding(self.SIZES[kind])
        end = self._encoding.end_of_text_id
        pieces = self._encoding.pieces()
        pieces[end] = b""
        super().__init__(kind, pieces, end)

    def encode(self, text: str, *, continues: bool = False) -> Ids:
        if len(text) <= SEGMENT_CHARACTERS:
            return self._encode_segment(text)
        return np.concatenate([self._encode_segment(segment) for segment in segments(text, self.cut)])

    def _encode_segment(self, text: str) -> Ids:
        try:
            ids = self._encoding.encode(text)
        except UnicodeEncodeError:  # lone surrogates, replaced as tiktoken's encode_ordinary does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._encoding.encode(text)
        return ids.astype(self.dtype)

    def decode(self, ids: Ids | Sequence[int], *, continues: bool = False) -> str:
        return self._encoding.decode(self._checked(ids).tolist())


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and end of text as id 256."""

    def __init__(self) -> None:
        super().__init__("byte", [bytes([i]) for i in range(256)] + [b""], 256)

    def encode(self, text: str, *, continues: bool = False) -> Ids:
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(self.dtype)

    def decode(self, ids: Ids | Sequence[int], *, continues: bool = False) -> str:
        parts = np.split(array := self._checked(ids), np.flatnonzero(array == 256))
        texts = [part[part != 256].astype(np.uint8).tobytes().decode("utf-8", "replace") for part in parts]
        return END_OF_TEXT.join(texts)


class CharTokenizer(Tokenizer):
    """One id per character of `symbols`, in their order; with `end_of_text` one more id that ends a text."""

    def __init__(self, symbols: str, *, end_of_text: bool = False) -> None:
        if not isinstance(symbols, str) or not symbols or len(set(symbols)) != len(symbols):
            raise UserError("a character vocabulary needs at least one symbol and each symbol once")
        pieces = [symbol.encode("utf-8", "surrogatepass") for symbol in symbols]
        end = len(symbols) if end_of_text else None
        super().__init__("char", pieces + [b""] * end_of_text, end, symbols=symbols)
        self._texts = np.array(list(symbols) + [END_OF_TEXT] * end_of_text, dtype=object)
        self._table = np.full(max(map(ord, symbols)) + 1, -1, dtype=np.int64)  # code point -> id
        self._table[[ord(symbol) for symbol in symbols]] = np.arange(len(symbols))

    def encode(self, text: str, *, continues: bool = False) -> Ids:
        """Raises UserError naming the first character outside the vocabulary."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        known = points < len(self._table)
        ids = np.where(known, self._table[np.where(known, points, 0)], -1)
        if (ids < 0).any():
            unknown = text[int(np.argmax(ids < 0))]
            raise UserError(
                f"the character {unknown!r} is not among the vocabulary's {len(self.spec['symbols'])} symbols"
            )
        return ids.astype(self.dtype)

    def decode(self, ids: Ids | Sequence[int], *, continues: bool = False) -> str:
        return "".join(self._texts[self._checked(ids)])


def segments(text: str, cut: Callable[[str, int], int | None]) -> Iterator[str]:
    """A long text in pieces, cut where `cut` allows it."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        stop = cut(text, start + SEGMENT_CHARACTERS) or len(text)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
