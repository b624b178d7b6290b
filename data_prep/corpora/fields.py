"""Where a document's text is in a record: a key or column, or one inside another (`meta.text`)."""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def record_of(line: bytes) -> Any:
    """What a line of JSON holds; it is UTF-8, with or without a byte order mark.

    Raises ValueError for another text, and RecursionError for one that is nested too deeply.
    """
    if b"\0" in line:  # json.loads would take such bytes for UTF-16 or UTF-32
        raise ValueError("NUL bytes in it: it is damaged, or in UTF-16 (save the file as UTF-8)")
    return json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"))


WHOLE_RECORD = ""  # in place of a field: the record, as JSON
CONVERSATION_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")  # of parquet files that are read so


class MissingFieldError(ValueError):
    """A record lacks the field with the text."""


def text_of(record: Any, field: str) -> str | None:
    """The text of a JSON record; None where it, or what it is in, is null.

    Raises MissingFieldError where it is missing, ValueError where it is no text.
    """
    if field == WHOLE_RECORD:
        return json.dumps(record, ensure_ascii=False)
    if not isinstance(record, dict):
        raise ValueError(f"no field {field!r} (there is: no object); choose one with --field")
    try:
        value = _value_of(record, field)
    except KeyError:
        raise MissingFieldError(
            f"no field {field!r} (there is: {', '.join(_keys(record))}); choose one with --field"
        ) from None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {field!r} holds {type(value).__name__}, not text")
    return value


def _value_of(record: dict[str, Any], field: str) -> Any:
    if field in record:
        return record[field]
    for place, letter in enumerate(field):
        if letter == "." and field[:place] in record:
            inner = record[field[:place]]
            if inner is None:
                return None
            if isinstance(inner, dict):
                return _value_of(inner, field[place + 1 :])
    raise KeyError(field)


def _keys(record: dict[str, Any], within: str = "") -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{within}{key}.")
        else:
            yield f"{within}{key}"


def column_path(schema: pa.Schema, field: str) -> tuple[str, ...]:
    """The names that lead to a column, none to whole records. Raises ValueError where it isn't there, or holds no
    text.
    """
    if field == WHOLE_RECORD:
        if not record_columns(schema):
            raise ValueError(f"none of the columns {', '.join(CONVERSATION_COLUMNS)}: give files of conversations")
        return ()
    found = _find(schema, field)
    if found is None:
        raise ValueError(f"no column {field!r}: choose one of {', '.join(_columns(schema))} with --field")
    names, kind = found
    if not _is_text(kind):
        raise ValueError(f"{kind}, not text, in its column {field!r}: choose another with --field")
    return names


def record_columns(schema: pa.Schema) -> list[str]:
    """The columns that a record of a conversation is made of."""
    return [name for name in CONVERSATION_COLUMNS if name in schema.names]


def _find(fields: Iterable[pa.Field], name: str) -> tuple[tuple[str, ...], pa.DataType] | None:
    for field in fields:
        if field.name == name:
            return (name,), field.type
    for field in fields:
        within = name.startswith(f"{field.name}.") and pa.types.is_struct(field.type)
        if within and (found := _find(_inner(field), name[len(field.name) + 1 :])):
            return (field.name, *found[0]), found[1]
    return None


def _columns(fields: Iterable[pa.Field], within: str = "") -> Iterator[str]:
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _columns(_inner(field), f"{within}{field.name}.")
        else:
            yield f"{within}{field.name}"


def _inner(field: pa.Field) -> list[pa.Field]:
    return [field.type.field(number) for number in range(field.type.num_fields)]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    of_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_it(kind) for is_it in of_text)


def column_of(batch: pa.RecordBatch, path: tuple[str, ...]) -> pa.Array:
    """A batch's column by the names that lead to it; null where what it is in is null. No names: records as JSON."""
    if not path:
        return pa.array([json.dumps(record, ensure_ascii=False, default=str) for record in batch.to_pylist()])
    column = batch.column(batch.schema.names.index(path[0]))
    for name in path[1:]:
        column = pc.struct_field(column, name)
    return column
