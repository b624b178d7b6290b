"""A tokenizer out of a Hugging Face `tokenizer.json`, read by the package `tokenizers`."""

import copy
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from common.errors import UserError
from common.publish import canonical_json
from data_prep.tokenization.byte_level import BYTE_SHOWN_AS, shown_bytes
from data_prep.tokenization.faster_encoding import FasterEncoding
from data_prep.tokenization.packed_tokenizer import check_id, merge_pairs, pack, parse, unpack, vocabulary_size
from data_prep.tokenization.tokenizer import END_OF_TEXT, Ids, Tokenizer, segments

SPACE_AFTER_TEXT = re.compile(
    r"(?<=\S)(?= )"
)  # no pattern in use lets a piece run from visible characters into a space
AROUND = 128  # characters on each side of a cut that its check looks at
SPELT_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE_SHOWN_AS = "▁"  # in SentencePiece's vocabularies
NORMALIZERS = ("Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase")
PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")
MOST_GROWTH = 1 << 12  # of a text by its normalizer: those in use put one character for another
SHOWN_AS = {byte: character for character, byte in BYTE_SHOWN_AS.items()}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer out of a `tokenizer.json` of Hugging Face's, which its spec carries along, packed.

    Two kinds of BPE: byte-level, and SentencePiece's, in which ▁ stands for a space and what no piece has is spelt in
    bytes (Llama 2's, Mistral's).
    """

    def __init__(self, packed: str, end_of_text_id: int, framing: "Framing | None" = None) -> None:
        self.json = unpack(packed)
        description = parse(self.json)
        _check_harmless(description)
        self._tokenizer = _built(description)
        without = without_space_before(description)
        self._going_on = self._tokenizer if without == description else _built(without)
        self._faster = FasterEncoding(description)
        self._byte_level = is_byte_level(description)
        self._space = SHOWN_AS[32] if self._byte_level else SPACE_SHOWN_AS
        splitters = _parts(without.get("pre_tokenizer"), "pretokenizers")
        self._has_pattern = any(part.get("type") != "Metaspace" for part in splitters)
        self._strips_space = not self._byte_level and strips_space(description)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        as_bytes = shown_bytes if self._byte_level else sentence_piece_bytes
        size = vocabulary_size(vocabulary.values(), len(vocabulary))
        self._pieces = [as_bytes(self.text_of(i)) for i in range(size)]
        self._pieces[check_id(end_of_text_id, size, "ends a text")] = b""
        self._merged_with_space = {
            token[found - 1] for token in vocabulary if (found := token.find(self._space, 1)) > 0
        }
        if framing is None:
            super().__init__("huggingface", self._pieces, end_of_text_id, packed=packed)
            self.token_count = len(set(vocabulary.values()))
            return
        self._pieces[check_id(framing.begin_of_text_id, size, "starts a text")] = b""
        self.begins_contexts, self.other_end_ids = framing.begins_contexts, tuple(framing.other_end_ids)
        facts = asdict(framing) | {"other_end_ids": list(framing.other_end_ids)}
        also = canonical_json([facts, hashlib.sha256(canonical_json(description).encode()).hexdigest()])
        super().__init__("huggingface", self._pieces, end_of_text_id, also=also, packed=packed, **facts)
        self.token_count = len(set(vocabulary.values()))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        """Specs of an older Longhaul have no framing: one id starts and ends texts."""
        names = [field.name for field in fields(Framing)]
        framing = Framing(**{name: spec[name] for name in names}) if names[0] in spec else None
        return cls(spec["packed"], spec["end_of_text_id"], framing)

    @classmethod
    def of(cls, text: str, end_of_text_id: int, framing: "Framing | None" = None) -> "HuggingFaceTokenizer":
        """Make it from the text of a `tokenizer.json`. Raises UserError for one that Longhaul can't use."""
        try:
            check_carried(parse(text))
            return cls(pack(text), end_of_text_id, framing)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {str(error)[:100]}"
            raise UserError(f"tokenizer.json is damaged ({why}): download the model again") from None

    @staticmethod
    def normal_form(text: str) -> dict[str, Any]:
        """A `tokenizer.json` as the installed `tokenizers` would write it. Raises UserError for one it can't read."""
        form: dict[str, Any] = json.loads(_package_tokenizer(text).to_str())
        return form

    @property
    def special_spellings(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        named = {token.content: number for number, token in added.items() if token.special}
        ends = (self.begin_of_text_id, self.end_of_text_id)
        return named | {self.text_of(number): number for number in ends if number is not None}

    @functools.cached_property
    def spaces_after_special(self) -> bool:  # type: ignore[override]
        if self._going_on is self._tokenizer:
            return False
        special = self.text_of(self.end_of_text_id)
        self._tokenizer.encode_special_tokens = False
        after = self._tokenizer.encode(f"{special}a", add_special_tokens=False).ids[1:]
        self._tokenizer.encode_special_tokens = True
        return bool(after == self.encode("a").tolist())

    def text_of(self, token: int | None) -> str:
        """The token of an id; none where the ids have a gap."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    def encode(self, text: str, *, continues: bool = False) -> Ids:
        ids = [np.array([], dtype=self.dtype)]
        for segment in segments(_clean(text), self.cut):
            found = self._faster.encode(segment)
            if found is None:
                tokenizer = self._going_on if continues else self._tokenizer
                # as a batch: only so it leaves out each token's place, which takes three quarters of the time
                found = tokenizer.encode_batch_fast([segment], add_special_tokens=False)[0].ids
            ids.append(np.array(found, dtype=self.dtype))
            continues = True
        return np.concatenate(ids)

    def cut(self, text: str, start: int) -> int | None:
        """Before a space that follows something visible, where the tokenizer itself finds a border: no token of the
        vocabulary could cover both, and the text around has the same ids whole and cut."""
        for found in SPACE_AFTER_TEXT.finditer(text, start):
            place = found.start()
            if place + AROUND > len(text):
                return None
            if self._is_border(_clean(text[max(0, place - AROUND) : place]), _clean(text[place : place + AROUND])):
                return place
        return None

    def _is_border(self, left: str, right: str) -> bool:
        last = SHOWN_AS[left[-1].encode()[-1]] if self._byte_level else left[-1]
        if last in self._merged_with_space or last == self._space:
            return False
        whole, before, after = (
            self._going_on.encode(text, add_special_tokens=False).ids for text in (left + right, left, right)
        )
        return bool(whole == before + after) and (not self._has_pattern or self._is_split(left, right))

    def _is_split(self, left: str, right: str) -> bool:
        """Whether the pattern has a border between the two, wherever to the left a piece of it starts: the same ids
        might result from pieces that run across, and later pieces would differ."""
        normalizer, splitter = self._going_on.normalizer, self._going_on.pre_tokenizer
        if normalizer is not None:
            left, right = normalizer.normalize_str(left), normalizer.normalize_str(right)
        for length in range(1, len(left) + 1):
            pieces = splitter.pre_tokenize_str(left[-length:] + right)
            if not any(start == length for _, (start, _) in pieces):
                return False
        return True

    def decode(self, ids: Ids | Sequence[int], *, continues: bool = False) -> str:
        array = self._checked(ids)
        texts = []
        for number, document in enumerate(np.split(array, np.flatnonzero(array == self.end_of_text_id))):
            document = document[document != self.end_of_text_id]
            begins = np.flatnonzero(document == self.begin_of_text_id)
            parts = [part[part != self.begin_of_text_id].tolist() for part in np.split(document, begins)]
            goes_on = [continues and number == 0, *(False for _ in begins)]
            texts.append("".join(self._text(part, going) for part, going in zip(parts, goes_on, strict=True)))
        return END_OF_TEXT.join(texts)

    def _text(self, ids: list[int], continues: bool) -> str:
        if self._byte_level:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
            return text
        text = b"".join(self._pieces[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space and not continues else text


@dataclass(frozen=True)
class Framing:
    """What a tokenizer's spec records of the ids around a text, beyond the one that ends it.

    Attributes: as Tokenizer has them.
    """

    begin_of_text_id: int
    begins_contexts: bool = False
    other_end_ids: Sequence[int] = ()


def check_carried(description: Mapping[str, Any]) -> None:
    """Raises UserError for a tokenizer.json in which some texts have no ids, or not always the same."""
    model = description.get("model") or {}
    vocabulary = model.get("vocab")
    sentence_piece = (
        bool(model.get("byte_fallback"))
        and isinstance(vocabulary, dict)
        and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    )
    if model.get("type", "BPE") != "BPE" or not (is_byte_level(description) or sentence_piece):
        raise UserError(
            "tokenizer.json is neither a byte-level BPE nor one that spells unknown text in bytes "
            "(byte_fallback): Longhaul can't use it"
        )
    if model.get("dropout"):
        raise UserError("tokenizer.json has a dropout, which makes ids random: set it to null")
    for part in _parts(description.get("normalizer"), "normalizers"):
        if part.get("type") not in NORMALIZERS:
            raise UserError(f"tokenizer.json has the normalizer {part.get('type')}: Longhaul can't use it")
    for part in _parts(description.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") not in PRE_TOKENIZERS or part.get("behavior") == "Removed":
            raise UserError(
                f"tokenizer.json has the pre-tokenizer {part.get('type')}, which drops parts of a text: Longhaul can't "
                "use it"
            )


def _check_harmless(description: Mapping[str, Any]) -> None:
    """Raises UserError for what would end the process in the package `tokenizers`: a panic, or endless texts."""
    model = description.get("model") or {}
    pairs = merge_pairs(model.get("merges")) or []
    if any(_is_cut_within(str(pair[-1]), model.get("continuing_subword_prefix")) for pair in pairs if pair):
        raise UserError("tokenizer.json's merges don't fit its continuing_subword_prefix: it is damaged")
    for step, inner in (("normalizer", "normalizers"), ("decoder", "decoders")):
        if math.prod(map(_growth, _parts(description.get(step), inner))) > MOST_GROWTH:
            raise UserError(
                f"tokenizer.json's {step} makes texts over {MOST_GROWTH:,} times as long: it can't be a tokenizer's"
            )


def _growth(step: Mapping[str, Any]) -> int:
    """How many characters one may become. A pattern that matches nothing, as regular ones may, is found before each."""
    put = len(str(step.get("content", step.get("prepend", ""))))
    pattern = step.get("pattern")
    only = isinstance(pattern, Mapping) and bool(pattern.get("String"))
    return put + 1 if pattern is not None and not only else max(1, put)


def _is_cut_within(token: str, prefix: Any) -> bool:
    """Whether a token is shorter than the prefix that `tokenizers` takes from it, by as many bytes as the prefix has
    characters, or has a character across that place: there it panics, which prints a page."""
    taken = len(prefix) if isinstance(prefix, str) else 0
    spelt = token.encode("utf-8", "replace")
    return len(spelt) < taken or (len(spelt) > taken and spelt[taken] & 0xC0 == 0x80)


def is_byte_level(description: Mapping[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _parts(description.get("decoder"), "decoders"))


def strips_space(description: Mapping[str, Any]) -> bool:
    """Whether decoding takes away the space that encoding puts before a text."""
    parts = _parts(description.get("decoder"), "decoders")
    stripping = any(part.get("type") == "Strip" and part["content"] == " " and part["start"] >= 1 for part in parts)
    return stripping or any(part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)


def sentence_piece_bytes(token: str) -> bytes:
    """The UTF-8 bytes of a piece."""
    if found := SPELT_BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(SPACE_SHOWN_AS, " ").encode()


def without_space_before(description: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that puts no space before a text's first word, and else does what this one does."""
    changed: dict[str, Any] = copy.deepcopy(dict(description))
    kept = [part for part in _parts(changed.get("normalizer"), "normalizers") if part.get("type") != "Prepend"]
    if len(kept) < len(_parts(changed.get("normalizer"), "normalizers")):
        changed["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for part in _parts(changed.get("pre_tokenizer"), "pretokenizers"):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
    return changed


def _parts(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, which may hold others, or the only one."""
    if not step:
        return []
    return [part for inner in step[key] for part in _parts(inner, key)] if key in step else [step]


def _built(description: Mapping[str, Any]) -> Any:
    built = _package_tokenizer(json.dumps(description))
    built.encode_special_tokens = True  # special tokens in a text are plain text, too
    built.no_truncation()
    built.no_padding()
    return built


def _package_tokenizer(text: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError("this tokenizer needs the package tokenizers: pip install tokenizers") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # preparations have a process per core
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the package raises plain Exception, and its panics are BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"tokenizer.json can't be read: {str(error)[:150]}") from None


def _clean(text: str) -> str:
    """Without lone surrogates, which `tokenizers` doesn't take."""
    return text.encode("utf-8", "replace").decode()
