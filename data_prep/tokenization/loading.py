"""The tokenizer that a spec describes, which token sets and checkpoints record."""

import functools
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.tokenizer import ByteTokenizer, CharTokenizer, Gpt2Tokenizer, Tokenizer


def load_tokenizer(spec: Mapping[str, Any] | str) -> Tokenizer:
    """The tokenizer of a spec, or of a bare kind (`gpt2`, `byte`).

    Raises UserError where the kind is unknown, the spec is damaged, GPT-2's files aren't on this disk, or
    what is installed is another vocabulary than the one the spec was made with.
    """
    fields: Mapping[str, Any] = {"kind": spec} if isinstance(spec, str) else spec
    try:
        tokenizer = _tokenizer_of(fields)
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(
            f"the tokenizer's spec is damaged ({why}): copy the checkpoint or the token set again"
        ) from None
    kind = fields["kind"]
    if fields.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise UserError(
            f"the {kind} tokenizer has {tokenizer.vocab_size:,} ids, but its spec records "
            f"{fields['vocab_size']!r}: copy the checkpoint or the token set again"
        )
    if fields.get("sha256", tokenizer.spec["sha256"]) != tokenizer.spec["sha256"]:
        raise UserError(
            f"the {kind} tokenizer here (sha256 {tokenizer.spec['sha256'][:12]}…) is not the one the data were made "
            f"with ({str(fields['sha256'])[:12]}…): prepare the data again"
        )
    return tokenizer


def _tokenizer_of(fields: Mapping[str, Any]) -> Tokenizer:
    """Of a spec, unchecked. Raises UserError where its kind is unknown, and others where it is damaged."""
    kind = fields.get("kind")
    tokenizer: Tokenizer
    if isinstance(kind, str) and kind in Gpt2Tokenizer.SIZES:
        tokenizer = _gpt2_tokenizer(kind)
    elif kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "char" and "symbols" in fields:
        tokenizer = CharTokenizer(fields["symbols"], end_of_text=fields.get("end_of_text_id") is not None)
    elif kind == "huggingface" and "packed" in fields:
        tokenizer = HuggingFaceTokenizer.from_spec(fields)
    elif kind == "chat" and "base" in fields and fields["base"]["kind"] != "chat":
        tokenizer = ChatTokenizer.from_spec(fields, load_tokenizer(fields["base"]))
    else:
        raise UserError(f"unknown tokenizer {kind!r}: choose gpt2, byte, or char with its symbols")
    return tokenizer


@functools.cache
def _gpt2_tokenizer(kind: str) -> Gpt2Tokenizer:
    return Gpt2Tokenizer(kind)
