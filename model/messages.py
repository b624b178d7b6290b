"""What ranks send each other, as JSON: reading it makes values of a few named kinds, and executes nothing.

JSON's own values stand for themselves (floats in the shortest digits that give the same bits; NaN and infinities).
Every other value is an object with its kind as its only key: {"tuple": […]}, {"dict": [[key, value]]}, {"Path": "…"},
{"Progress": {"step": 3, …}}.
"""

import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

Kind = type[Any]  # a dataclass, or an exception that takes its message first and what it carries by keyword


def encode(value: Any, kinds: Iterable[Kind] = ()) -> bytes:
    """The message from which `decode` makes an equal value, types included.

    Args:
        value: None, bool, int, float, str, Path; lists, tuples and dicts of such; a UserError or one of `kinds`.
        kinds: which others may occur. A value of another kind is sent as the nearest of its bases that is among them.

    Raises TypeError for anything else.
    """
    return json.dumps(_plain(value, _by_name(kinds))).encode("ascii")


def decode(message: bytes, kinds: Iterable[Kind] = ()) -> Any:
    """The value that was encoded with these kinds. Raises ValueError where the message is none of `encode`'s."""
    try:
        return _value(json.loads(message), _by_name(kinds))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a message between ranks: {error!r}") from None


def _by_name(kinds: Iterable[Kind]) -> dict[str, Kind]:
    return {"UserError": UserError} | {kind.__name__: kind for kind in kinds}


def _plain(value: Any, kinds: dict[str, Kind]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"Path": str(value)}
    if type(value) is list:
        return [_plain(item, kinds) for item in value]
    if type(value) is tuple:
        return {"tuple": [_plain(item, kinds) for item in value]}
    if type(value) is dict:
        return {"dict": [[_plain(key, kinds), _plain(item, kinds)] for key, item in value.items()]}
    name = next((base.__name__ for base in type(value).__mro__ if kinds.get(base.__name__) is base), None)
    if name is None:
        raise TypeError(f"a {type(value).__name__} can't be sent between ranks: make it JSON, or name its kind")
    if isinstance(value, Exception):
        carried = vars(value) if type(value) is kinds[name] else {}
        return {name: [str(value), {key: _plain(item, kinds) for key, item in carried.items()}]}
    assert is_dataclass(value)
    return {name: {field.name: _plain(getattr(value, field.name), kinds) for field in fields(value)}}


def _value(plain: Any, kinds: dict[str, Kind]) -> Any:
    if isinstance(plain, list):
        return [_value(item, kinds) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((name, content),) = plain.items()
    if name == "Path":
        return Path(content)
    if name == "tuple":
        return tuple(_value(item, kinds) for item in content)
    if name == "dict":
        return {_value(key, kinds): _value(item, kinds) for key, item in content}
    kind = kinds[name]
    if issubclass(kind, Exception):
        text, carried = content
        return kind(text, **{key: _value(item, kinds) for key, item in carried.items()})
    return kind(**{key: _value(item, kinds) for key, item in content.items()})
