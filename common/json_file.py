"""JSON that we or others wrote, read as a declared type: what doesn't fit is an error that names the file and the key.

A shape is any type that pydantic knows: `dict[str, Any]`, a TypedDict (of typing_extensions, which pydantic asks for
before Python 3.12), a dataclass, nested as deep as wanted. Nothing is converted: "5" is not a number, 5.0 not a whole
one (5 is a float, though). Keys that a shape does not name are dropped; a TypedDict under `@keep_others` keeps them.
"""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from common.errors import UserError
from common.os_errors import refusal
from common.regular_file import read_at_most

MOST_BYTES = 16 << 20  # of a file that we write ourselves; parsed, JSON takes up to 30 times as much
keep_others = with_config(ConfigDict(extra="allow"))
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Shape = TypeVar("Shape")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # by shape: making one takes milliseconds
_LONE_SURROGATE = ("surrogate in hex escape", "unexpected end of hex escape")  # in pydantic's messages
_TO_STAND_IN = 0x10F800 - 0xD800  # the last of Unicode's characters for private use
_WORDS = {
    "missing": "it is missing",
    "int_type": "it is not a whole number",
    "float_type": "it is not a number",
    "bool_type": "it is neither true nor false",
    "string_type": "it is not text",
    "list_type": "it is not a list",
    "tuple_type": "it is not a list",
    "dict_type": "it is not an object",
    "dataclass_type": "it is not an object",
    "none_required": "it is not null",
}


class BadJson(ValueError):
    """What is wrong with the contents of a JSON file, in words that follow its name."""


def read_json(path: Path | str, shape: type[Shape], *, most_bytes: int = MOST_BYTES) -> Shape:
    """The contents of a JSON file as `shape`.

    Raises OSError (NotAFile for a pipe, device or folder) where it can't be read, and BadJson where it is too large,
    not JSON, or of another shape.
    """
    try:
        return parse_json(read_at_most(path, most_bytes), shape)
    except OverflowError as error:
        raise BadJson(str(error)) from None


def read_json_for_user(path: Path | str, shape: type[Shape], advice: str, *, most_bytes: int = MOST_BYTES) -> Shape:
    """As `read_json`, with everything but FileNotFoundError as a UserError that ends in `advice`."""
    try:
        return read_json(path, shape, most_bytes=most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(refusal("read", error, path, otherwise=advice)) from None
    except BadJson as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from None


def parse_json(content: bytes, shape: type[Shape]) -> Shape:
    """A JSON text, UTF-8 with or without a byte order mark, as `shape`. Raises BadJson."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    adapter = _adapter(shape)
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as error:
        if not any(words in str(error) for words in _LONE_SURROGATE):
            raise BadJson(_in_words(error)) from None
    try:
        found = adapter.validate_json(_with_stand_ins(content), strict=True)
    except ValidationError as error:
        raise BadJson(_in_words(error)) from None
    shaped: Shape = _without_stand_ins(found)
    return shaped


def as_shape(value: Any, shape: type[Shape]) -> Shape:
    """A value that has been read from JSON, as `shape`. Raises BadJson."""
    try:
        return parse_json(json.dumps(value).encode(), shape)
    except (TypeError, RecursionError) as error:
        raise BadJson(str(error)) from None


def _adapter(shape: type[Shape]) -> TypeAdapter[Shape]:
    if shape not in _ADAPTERS:
        _ADAPTERS[shape] = TypeAdapter(shape)
    return _ADAPTERS[shape]


def _with_stand_ins(content: bytes) -> bytes:
    """The same JSON with a private character for every lone surrogate: Python writes undecodable bytes of names
    so, and pydantic refuses them.
    """
    try:
        text = json.dumps(json.loads(content), ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise BadJson(f"it is not JSON: {error}") from None
    return "".join(chr(ord(c) + _TO_STAND_IN) if "\ud800" <= c <= "\udfff" else c for c in text).encode()


def _without_stand_ins(value: Any) -> Any:
    """A value of any shape with the surrogates put back."""
    if isinstance(value, str):
        return "".join(chr(ord(c) - _TO_STAND_IN) if ord(c) >= 0xD800 + _TO_STAND_IN else c for c in value)
    if isinstance(value, dict):
        return {_without_stand_ins(key): _without_stand_ins(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        inside = map(_without_stand_ins, value)
        return value._make(inside) if hasattr(value, "_make") else type(value)(inside)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _without_stand_ins(getattr(value, field.name)) for field in fields(value)})
    return value


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    words = _WORDS.get(first["type"]) or f"{message[:1].lower()}{message[1:]}"
    return f"{place}: {words}" if place else words
