"""A tokenizer out of a Hugging Face `tokenizer.json`, read by the package `tokenizers`."""

import base64
import copy
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from data_prep.byte_level import BYTE_SHOWN_AS, shown_bytes
from data_prep.tokenization import END_OF_TEXT, Ids, Tokenizer, segments

SPACE_AFTER_TEXT = re.compile(
    r"(?<=\S)(?= )"
)  # no pattern in use lets a piece run from visible characters into a space
AROUND = 128  # characters on each side of a cut that its check looks at
SHOWN_AS = {byte: character for character, byte in BYTE_SHOWN_AS.items()}


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level tokenizer out of a `tokenizer.json` of Hugging Face's, which its spec carries along, packed."""

    def __init__(self, packed: str, end_of_text_id: int) -> None:
        self.json = zlib.decompress(base64.b64decode(packed)).decode()
        description = json.loads(self.json)
        self._tokenizer = _built(description)
        without = without_space_before(description)
        self._going_on = self._tokenizer if without == description else _built(without)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [shown_bytes(self.text_of(i)) for i in range(max(vocabulary.values()) + 1)]
        pieces[end_of_text_id] = b""
        self._merged_with_space = {
            token[found - 1] for token in vocabulary if (found := token.find(SHOWN_AS[32], 1)) > 0
        }
        super().__init__("huggingface", pieces, end_of_text_id, packed=packed)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        return cls(spec["packed"], int(spec["end_of_text_id"]))

    @classmethod
    def of(cls, text: str, end_of_text_id: int) -> "HuggingFaceTokenizer":
        """Of the text of a `tokenizer.json`. Raises UserError where its tokens don't stand for bytes."""
        if '"ByteLevel"' not in json.dumps(json.loads(text).get("decoder") or {}):
            raise UserError("tokenizer.json is of no byte-level tokenizer: Longhaul can't carry it along")
        return cls(base64.b64encode(zlib.compress(text.encode(), 9)).decode(), end_of_text_id)

    @staticmethod
    def normal_form(text: str) -> dict[str, Any]:
        """A `tokenizer.json` as the installed `tokenizers` would write it."""
        import tokenizers

        form: dict[str, Any] = json.loads(tokenizers.Tokenizer.from_str(text).to_str())
        return form

    def text_of(self, token: int | None) -> str:
        """What stands for an id in the vocabulary; nothing where the ids have a gap."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    def encode(self, text: str, *, continues: bool = False) -> Ids:
        ids: list[int] = []
        for segment in segments(_clean(text), self.cut):
            tokenizer = self._going_on if continues else self._tokenizer
            ids += tokenizer.encode(segment, add_special_tokens=False).ids
            continues = True
        return np.array(ids, dtype=self.dtype)

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
        if SHOWN_AS[left[-1].encode()[-1]] in self._merged_with_space:
            return False
        whole, before, after = (
            self._going_on.encode(text, add_special_tokens=False).ids for text in (left + right, left, right)
        )
        return bool(whole == before + after)

    def decode(self, ids: Ids | Sequence[int]) -> str:
        array = self._checked(ids)
        parts = np.split(array, np.flatnonzero(array == self.end_of_text_id))
        texts = [part[part != self.end_of_text_id].tolist() for part in parts]
        return END_OF_TEXT.join(self._tokenizer.decode(part, skip_special_tokens=False) for part in texts)


def without_space_before(description: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that puts no space before a text's first word, and else does what this one does."""
    changed: dict[str, Any] = copy.deepcopy(dict(description))
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
    try:
        import tokenizers
    except ImportError:
        raise UserError("this model's tokenizer needs the package tokenizers: pip install tokenizers") from None
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the package raises this type itself
        raise UserError(f"tokenizer.json can't be read: {str(error)[:150]}") from None
    built.encode_special_tokens = True  # what a text holds is text, whatever it looks like
    built.no_truncation()
    built.no_padding()
    return built


def _clean(text: str) -> str:
    """Without lone surrogates, which `tokenizers` doesn't take."""
    return text.encode("utf-8", "replace").decode()
