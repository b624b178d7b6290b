"""A `tokenizer.json` as a tokenizer's spec carries it: compressed, and unpacked only up to a tokenizer's size.

A spec comes with a checkpoint or a token set, perhaps a stranger's: 1.4 MB of it may unpack to gigabytes, of text or of
lists that hold nothing.
"""

import base64
import json
import zlib
from collections.abc import Iterable
from typing import Any

from common.errors import UserError

MOST_BYTES = 64 << 20  # of the text: the largest in use, Gemma's, has 33 MB
MOST_PACKED_BYTES = 12 << 20  # a checkpoint's manifest, which carries it, is read up to 16 MiB
MOST_VALUES = 4_000_000  # in it: Gemma's 262,000 tokens and their merges are 2 million
MOST_GAPS = 1 << 16  # ids without a token
COPY_AGAIN = "copy the checkpoint or the token set again"


def pack(text: str) -> str:
    """A `tokenizer.json` as text that JSON carries: zlib, then base 64. Raises UserError where that is too large."""
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    if len(packed) > MOST_PACKED_BYTES:
        raise UserError(f"tokenizer.json has {len(packed):,} bytes, compressed: more than a checkpoint can carry")
    return packed


def unpack(packed: Any) -> str:
    """The text again. Raises UserError for what `pack` did not make, or what can't be a tokenizer's file."""
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(base64.b64decode(packed), MOST_BYTES)
        if unpacking.unconsumed_tail:
            raise UserError(f"the carried tokenizer.json has more than {MOST_BYTES:,} bytes: it can't be a tokenizer's")
        if not unpacking.eof:
            raise ValueError("it is truncated")
        return text.decode()
    except (TypeError, ValueError, zlib.error) as error:
        raise UserError(f"the carried tokenizer.json is damaged ({error}): {COPY_AGAIN}") from None


def parse(text: str) -> dict[str, Any]:
    """A parsed `tokenizer.json`. Raises UserError where it can't be one, or would take more memory than any."""
    check_extent(text)
    try:
        description = json.loads(text)
    except RecursionError:
        raise UserError("tokenizer.json is nested too deeply: it can't be a tokenizer's") from None
    except ValueError as error:
        raise UserError(f"tokenizer.json is damaged ({error}): {COPY_AGAIN}") from None
    if not isinstance(description, dict):
        raise UserError("tokenizer.json holds no object: it can't be a tokenizer's")
    return description


def merge_pairs(merges: Any) -> list[tuple[Any, ...]] | None:
    """A tokenizer.json's merges, which older files spell as "one other"; None for anything else."""
    if not isinstance(merges or [], list):
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or []]
    return list(map(tuple, pairs)) if all(isinstance(pair, list) for pair in pairs) else None


def check_extent(text: str) -> None:
    """Raises UserError for a text that takes more memory, parsed, than any tokenizer's."""
    values = sum(text.count(sign) for sign in ",[{")  # at most
    if len(text) > MOST_BYTES or values > MOST_VALUES:
        raise UserError(f"tokenizer.json has {len(text):,} characters and {values:,} values: it can't be a tokenizer's")


def vocabulary_size(ids: Iterable[int], count: int) -> int:
    """How many ids a vocabulary of `count` tokens has, gaps counted.

    Raises UserError for one without tokens, or with an id far beyond their number: every id takes memory.
    """
    size = max(ids, default=-1) + 1
    if not 0 < size <= count + MOST_GAPS:
        raise UserError(f"tokenizer.json has {count:,} tokens and {size:,} ids: it is damaged")
    return size


def check_id(number: Any, vocab_size: int, what: str) -> int:
    """`number` where it is one of a tokenizer's ids.

    Args:
        what: the text that the id stands for, for people.

    Raises UserError otherwise.
    """
    if type(number) is not int or not 0 <= number < vocab_size:
        raise UserError(
            f"the id that {what} is {number!r}, but the tokenizer has {vocab_size:,} ids, from 0 on: write the right "
            "one into the model's config.json, and import it again"
        )
    return number
