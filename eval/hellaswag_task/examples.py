"""HellaSwag's examples (Zellers et al. 2019) out of a file, with the two contexts under which they are scored.

Two forms are read, each also as .bz2. The official JSONL has the fields `activity_label`, `ctx_a`, `ctx_b`, `ctx`,
`endings` and `label`. The six-line text form has context, label and four endings on a line each; its activity label and
its two sentences can't be told apart, so its context is used as it is.
"""

import bz2
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from common.cache_folder import hellaswag_file
from common.errors import UserError
from common.json_file import parse_json
from common.os_errors import refusal
from common.publish import sha256_file
from common.regular_file import open_regular

ENDINGS = 4
FULL_SIZE = 10_042  # validation examples
MOST_BYTES = 256 << 20  # of examples: all of HellaSwag has 70 MB
_TEXT_LINES = 6


class Row(TypedDict):
    """A line of the official JSONL, as far as it is read. Some copies write the label as text."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: list[str]
    label: int | str


@dataclass(frozen=True)
class Example:
    """A context and four endings, one of which is right.

    Attributes:
        label: the right ending, 0 … 3.
        context, endings: without the activity label, as nanoGPT's kin score them.
        harness_context, harness_endings: as lm-evaluation-harness scores them.
    """

    label: int
    context: str
    endings: tuple[str, ...]
    harness_context: str
    harness_endings: tuple[str, ...]


@dataclass(frozen=True)
class HellaSwag:
    """The examples of a file. `official`: from the JSONL, so that scores compare with published ones."""

    path: Path
    sha256: str
    official: bool
    examples: tuple[Example, ...]


def read_hellaswag(path: Path | None = None) -> HellaSwag:
    """Read a file, or the one that `data_prep/prepare_offline.py` fetched.

    Raises UserError where it is missing or holds something else, naming the line.
    """
    path = require_hellaswag(path)
    try:
        text = _content(path).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, EOFError, ValueError, OverflowError) as error:  # undecodable text, a truncated bzip2 file
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(refusal("read", error, path)) from None
        raise UserError(f"{path} can't be read ({error}): fetch it again, or save it as UTF-8") from None
    lines = text.rstrip("\n").split("\n")
    official = lines[0].lstrip().startswith("{")
    examples = _read_json_lines(lines, path) if official else _read_text(lines, path)
    return HellaSwag(path, sha256_file(path), official, examples)


def _content(path: Path) -> bytes:
    """The bytes of a file, of a bzip2 one decompressed. Raises OverflowError for more than all examples have."""
    with open_regular(path) as file:
        content: bytes = (bz2.BZ2File(file) if path.suffix == ".bz2" else file).read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OverflowError(f"it has more than {MOST_BYTES:,} bytes, more than HellaSwag has")
    return content


def require_hellaswag(path: Path | None) -> Path:
    """The file's path. Raises UserError in one line where there is no such file."""
    if path is None:
        path = hellaswag_file()
        if not path.is_file():
            raise UserError(
                f"there is no HellaSwag at {path}: run 'python data_prep/prepare_offline.py' where there is a network, "
                "or name a file of your own (--data; in training eval.hellaswag_data)"
            )
    elif not path.is_file():
        raise UserError(
            f"there is no file {path}: give HellaSwag's JSONL, or run 'python data_prep/prepare_offline.py'"
        )
    return path


def evenly_spaced(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """`count` of a file's, always the same: HellaSwag's first third is about another kind of text."""
    total = len(examples)
    count = min(count, total)
    return tuple(examples[index * total // count] for index in range(count))


def _read_json_lines(lines: list[str], path: Path) -> tuple[Example, ...]:
    examples = []
    for number, line in enumerate(lines, 1):
        try:
            examples.append(_official_example(parse_json(line.encode(), Row)))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is not a HellaSwag example ({error}): correct it, or fetch the file again"
            ) from None
    return tuple(examples)


def _official_example(row: Row) -> Example:
    label, endings = int(row["label"]), tuple(row["endings"])
    if len(endings) != ENDINGS or not 0 <= label < ENDINGS:
        raise ValueError(f"{len(endings)} endings and the label {label}")
    prompt = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Example(label, row["ctx"], endings, harness_text(prompt), tuple(harness_text(ending) for ending in endings))


def harness_text(text: str) -> str:
    """A text as lm-evaluation-harness 0.4 cleans it: WikiHow's marks in brackets are taken out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _read_text(lines: list[str], path: Path) -> tuple[Example, ...]:
    if len(lines) % _TEXT_LINES:
        raise UserError(f"{path} has {len(lines):,} lines, not six for each example: fetch it again")
    examples = []
    for start in range(0, len(lines), _TEXT_LINES):
        context, label, *endings = lines[start : start + _TEXT_LINES]
        if label.strip() not in {str(index) for index in range(ENDINGS)}:
            raise UserError(f"{path}, line {start + 2} is {label[:40]!r}, not a label from 0 to 3: fetch it again")
        examples.append(Example(int(label), context, tuple(endings), context, tuple(endings)))
    return tuple(examples)
