"""Multiple-choice questions of one's own: a file of JSON lines with `context`, `endings` and `label`."""

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import parse_json
from common.os_errors import refusal
from common.publish import sha256_file
from common.regular_file import open_regular
from eval.hellaswag_task.examples import MOST_BYTES, Example

LEAST_ENDINGS = 2
ADVICE = 'a line is {"context": "…", "endings": ["…", "…"], "label": 0}'


class Row(TypedDict):
    """A line of the file. `label`: which ending is right, from 0."""

    context: str
    endings: list[str]
    label: int


@dataclass(frozen=True)
class OwnExamples:
    """The questions of a file, each with two endings or more."""

    sha256: str
    examples: tuple[Example, ...]


def read_own_examples(path: Path) -> OwnExamples:
    """Empty lines are passed over.

    Raises UserError where the file can't be read, holds no question, or a line is none, naming it.
    """
    try:
        with open_regular(path, most_bytes=MOST_BYTES) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(refusal("read", error, path)) from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(_example(parse_json(line, Row)))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no question ({error}): {ADVICE}") from None
    if not examples:
        raise UserError(f"{path} holds no question: {ADVICE}")
    return OwnExamples(sha256_file(path), tuple(examples))


def _example(row: Row) -> Example:
    endings = tuple(row["endings"])
    if len(endings) < LEAST_ENDINGS or not 0 <= row["label"] < len(endings):
        raise ValueError(f"{len(endings)} endings and the label {row['label']}")
    if empty := [index for index, ending in enumerate(endings) if not ending]:
        raise ValueError(f"ending {empty[0]} is empty")
    return Example(row["label"], row["context"], endings, row["context"], endings)
