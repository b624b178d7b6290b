"""The file of an own vocabulary, as data_prep/train_tokenizer.py writes it: a tokenizer.json with an end of text."""

from pathlib import Path

from common.errors import UserError
from common.os_errors import refusal
from common.regular_file import read_at_most
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.packed_tokenizer import MOST_BYTES, parse
from data_prep.tokenization.tokenizer import END_OF_TEXT


def read_tokenizer_file(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a file.

    Raises UserError where it can't be read, is no tokenizer.json, or has no token that ends a text.
    """
    try:
        text = read_at_most(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise UserError(refusal("read", error, path)) from None
    except (OverflowError, UnicodeDecodeError):
        raise UserError(f"{path} is no tokenizer.json: give one that data_prep/train_tokenizer.py wrote") from None
    try:
        added = parse(text).get("added_tokens") or []
        ends = [token["id"] for token in added if token["content"] == END_OF_TEXT]
    except (AttributeError, KeyError, TypeError, UserError):
        raise UserError(f"{path} is no tokenizer.json: give one that data_prep/train_tokenizer.py wrote") from None
    if not ends:
        raise UserError(
            f"{path} has no token {END_OF_TEXT}: import the model that it belongs to with eval/import_hf.py"
        )
    return HuggingFaceTokenizer.of(text, ends[0])
