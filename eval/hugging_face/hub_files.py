"""The JSON files of a Hugging Face folder, read as declared types: anything else is a UserError."""

import os
from pathlib import Path
from typing import TypeVar

from common.errors import UserError
from common.json_file import BadJson, parse_json, read_json_for_user
from common.os_errors import refusal
from common.regular_file import read_at_most, what_stands_at
from data_prep.tokenization.packed_tokenizer import MOST_BYTES, check_extent
from eval.hugging_face.hub_shapes import TokenizerDescription

AGAIN = "download the model again"
Shape = TypeVar("Shape")


def stands(path: Path) -> bool:
    """Whether anything has this name; a dangling link counts: a cache that lost a file has such ones."""
    return os.path.lexists(path)


def read_described(path: Path, shape: type[Shape]) -> Shape:
    """A JSON file as `shape`. Raises UserError where it is missing, or of another shape."""
    try:
        return read_json_for_user(path, shape, AGAIN)
    except FileNotFoundError:
        raise _missing(path) from None


def read_tokenizer_json(path: Path) -> tuple[str, TokenizerDescription]:
    """A `tokenizer.json` as text and parsed, after a check of its size: 1 MB of brackets would take
    gigabytes. Raises UserError where it can't be one."""
    content = read_content(path, MOST_BYTES)
    text = content.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    check_extent(text)
    try:
        description = parse_json(content, TokenizerDescription)
    except BadJson as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
    return text, description


def read_content(path: Path, most_bytes: int) -> bytes:
    """A file of at most so many bytes, without a byte order mark. Raises UserError where it can't be read."""
    try:
        return read_at_most(path, most_bytes).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise UserError(refusal("read", error, path, otherwise=AGAIN)) from None
    except OverflowError as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None


def _missing(path: Path) -> UserError:
    what = what_stands_at(path)
    return UserError(f"{path} can't be read ({f'it is {what}' if what else 'there is no such file'}): {AGAIN}")
