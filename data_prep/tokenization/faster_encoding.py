"""Byte-level vocabularies that `tokenizers` made, encoded by tiktoken: the same ids, several times as fast.

tiktoken merges any two neighbours that make a token, `tokenizers` only the pairs that its file lists. The ids are the
same where each token arises from its bytes by exactly the merge that is listed for it, and later tokens have higher
ids. A vocabulary that was learned by merging is so; it is checked, token by token, before tiktoken is used.
"""

import functools
import itertools
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.tokenization.bpe_training import PATTERNS
from data_prep.tokenization.byte_level import BYTE_SHOWN_AS, shown_bytes
from data_prep.tokenization.gpt2_encoding import MARK, PATTERN, marked
from data_prep.tokenization.packed_tokenizer import merge_pairs

# Those of bpe_training without look-ahead: a mark stands before every last of several white-space characters.
WITHOUT_LOOK_AHEAD = {
    "gpt2": PATTERN,
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}\x10]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}\x10]+[\r\n]*|\s*[\r\n]+|\s+"
    ),
}
WORTH_IT = 1 << 18  # characters: before that, the check and tiktoken's tables would take longer than they save
UNLISTED = 1 << 62


class FasterEncoding:
    """Encodes a text where that is possible and pays, once so much text has come that it does."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        """`description`: a parsed tokenizer.json."""
        self._description: Mapping[str, Any] | None = description
        self._characters = 0
        self._encoding: Any = None
        self._newlines = True

    def encode(self, text: str) -> npt.NDArray[np.uint32] | None:
        """Ids (n,) as `tokenizers` gives them; None where it has to do the work itself."""
        if self._description is not None:
            self._characters += len(text)
            if self._characters < WORTH_IT:
                return None
            description, self._description = self._description, None
            self._build(description)
        # characters that one Unicode version knows and another doesn't may be letters for one of both packages only
        if self._encoding is None or MARK in text or not (text.isascii() or _assigned(text)):
            return None
        ids: npt.NDArray[np.uint32] = self._encoding.encode_to_numpy(
            marked(text, newlines=self._newlines), disallowed_special=()
        )
        return ids

    def _build(self, description: Mapping[str, Any]) -> None:
        name, ranks = pattern_of(description), ranks_of(description)
        if name is None or ranks is None:
            return
        from tiktoken import Encoding  # here, so that byte and character sets need no tiktoken

        self._newlines = name == "gpt2"
        self._encoding = Encoding("own", pat_str=WITHOUT_LOOK_AHEAD[name], mergeable_ranks=ranks, special_tokens={})


def pattern_of(description: Mapping[str, Any]) -> str | None:
    """Which of PATTERNS cuts a text into pieces; None where anything else is done to it."""
    steps: dict[str, Any] = description.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = steps.get("pretokenizers") or []
    split, as_bytes = parts if len(parts) == 2 else ({}, {})
    known = {
        name
        for name, pattern in PATTERNS.items()
        if split == {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    }
    plain = as_bytes.get("type") == "ByteLevel" and not as_bytes.get("add_prefix_space", True)
    plain = plain and not as_bytes.get("use_regex", True)
    found_in_text = [token for token in description.get("added_tokens") or [] if not token.get("special")]
    if not known or not plain or found_in_text or description.get("normalizer"):
        return None
    return known.pop()


def ranks_of(description: Mapping[str, Any]) -> dict[bytes, int] | None:
    """Token to id, where merging by these alone gives what the listed merges give; None for another vocabulary."""
    model = description["model"]
    others = (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    pairs = merge_pairs(model.get("merges")) or []
    vocabulary = model["vocab"]
    ids = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if (
        any(model.get(name) for name in others)
        or not BYTE_SHOWN_AS.keys() <= vocabulary.keys()
        or len(vocabulary) != len(BYTE_SHOWN_AS) + len(pairs)
        or any(later <= earlier for earlier, later in itertools.pairwise([-1, *ids]))
    ):
        return None
    ranks = {shown_bytes(token): number for token, number in vocabulary.items()}
    if len(ranks) != len(vocabulary) or not all(map(functools.partial(_arises, ranks), pairs)):
        return None
    return ranks


def _arises(ranks: Mapping[bytes, int], pair: tuple[str, str]) -> bool:
    """Whether the bytes of two tokens become these two by the merges of all tokens that have lower ids than both's."""
    left, right = map(shown_bytes, pair)
    most = ranks[left + right]
    parts = [bytes([byte]) for byte in left + right]
    while len(parts) > 1:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], UNLISTED), i) for i in range(len(parts) - 1))
        if rank >= most:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts == [left, right]


@functools.cache
def _assigned_points() -> npt.NDArray[np.bool_]:
    """(0x110000,): which code points were characters when this Python was made, and so have a lasting category."""
    categories = map(unicodedata.category, map(chr, range(0x110000)))
    return np.fromiter((category != "Cn" for category in categories), dtype=np.bool_, count=0x110000)


def _assigned(text: str) -> bool:
    return bool(_assigned_points()[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].all())
