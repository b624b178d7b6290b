"""The examples of an evaluation, as text that might stand in training data.

Of multiple-choice examples (HellaSwag's JSONL or six-line form, or a file of one's own with `context`, `endings` and
`label`) that is the context with the right ending; of other JSON lines the fields that are named.
"""

import bz2
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.os_errors import refusal
from common.publish import sha256_file
from common.regular_file import open_regular

MOST_BYTES = 256 << 20
TEXT_LINES = 6  # of an example in HellaSwag's text form: context, label, four endings
WIKIHOW_MARKS = re.compile(r"\[(?:header|title|step|substeps)\]")  # HellaSwag's own; no page has them


@dataclass(frozen=True)
class Evaluation:
    """A file's examples as text, in its order."""

    name: str
    sha256: str
    texts: tuple[str, ...]


def read_evaluation(path: Path, fields: Sequence[str] = ()) -> Evaluation:
    """The examples of a file. `fields`: those of its JSON lines to take; by default a multiple-choice example's.

    Raises UserError where it can't be read, or a line is no example, naming it.
    """
    try:
        with open_regular(path) as file:
            content: bytes = (bz2.BZ2File(file) if path.suffix == ".bz2" else file).read(MOST_BYTES + 1)
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(refusal("read", error, path)) from None
        raise UserError(f"{path} can't be read ({error}): fetch it again") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES >> 20} MiB: give the evaluation's examples only")
    if lines[0].lstrip().startswith("{"):
        texts = [_of_record(line, fields, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    elif len(lines) % TEXT_LINES == 0:
        texts = [
            _of_lines(lines[start : start + TEXT_LINES], path, start) for start in range(0, len(lines), TEXT_LINES)
        ]
    else:
        raise UserError(f"{path} is neither JSON lines nor HellaSwag's six lines an example: give one of these")
    return Evaluation(path.name, sha256_file(path), tuple(WIKIHOW_MARKS.sub(" ", text) for text in texts))


def _of_record(line: str, fields: Sequence[str], where: str) -> str:
    try:
        record: dict[str, Any] = json.loads(line)
        if fields:
            return " ".join(_joined(record[field]) for field in fields)
        context = record["ctx"] if "ctx" in record else record["context"]
        return f"{context} {record['endings'][int(record['label'])]}"
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is no example ({type(error).__name__}: {error}): it needs ctx or context, endings and label, or "
            "name its fields with --fields"
        ) from None


def _joined(value: Any) -> str:
    return " ".join(map(_joined, value)) if isinstance(value, list) else str(value)


def _of_lines(lines: Sequence[str], path: Path, start: int) -> str:
    context, label, *endings = lines
    if label.strip() not in {str(number) for number in range(len(endings))}:
        raise UserError(f"{path}, line {start + 2} is {label[:40]!r}, not a label from 0 to 3: fetch it again")
    return f"{context} {endings[int(label)]}"
