"""What a run's folder holds beside state and metrics, each file read as its declared type.

A missing file has nothing to read. One that is there and can't be read, or is something else,
is a UserError in one line with the file's name: views of a run leave that file out and pass the line on.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import BadJson, Count, Finite, keep_others, parse_json, read_json
from common.metrics_file import read_records
from common.metrics_table import MetricsTable, read_metrics_table
from common.os_errors import refusal
from common.run_folder import RunFolder
from common.yaml_file import BadYaml, read_yaml

PROVENANCE_BYTES = 128 << 20  # each start may quote 200,000 characters of changes
_TEXTS = ("time", "command", "revision", "diff", "python", "platform", "cuda", "resumed_from")  # of a start
Found = TypeVar("Found")
Shape = TypeVar("Shape")


class _Provenance(TypedDict):
    starts: list[dict[str, Any]]


@keep_others
class Score(TypedDict, total=False):
    """What eval/hellaswag.py writes, as far as a report reads it."""

    acc_norm: Finite
    examples: Count
    step: Count | None
    data: dict[str, Any]


def read_configuration(folder: RunFolder) -> dict[str, Any]:
    """The run's resolved configuration, of what JSON has, too; empty where it has none. Raises UserError."""
    return _read(folder.config, lambda path: _yaml_as(path, dict[str, Any]), {})


def read_configuration_as(folder: RunFolder, shape: type[Shape]) -> Shape:
    """The part of a run's resolved configuration that `shape` names. Raises UserError where part of it is missing."""
    try:
        return _yaml_as(folder.config, shape)
    except FileNotFoundError:
        raise UserError(f"{folder.config} is missing: give a run's folder, or put it back") from None
    except OSError as error:
        raise UserError(unreadable(folder.config, error)) from None
    except BadJson as error:
        raise UserError(f"{folder.config} is not a run's configuration ({error}): put it back") from None


def read_starts(provenance: Path) -> list[dict[str, Any]]:
    """What a `provenance.json` lists of each start, oldest first. Raises UserError.

    A value that is not text, or can't be part of a path, is left out.
    """
    nothing: _Provenance = {"starts": []}
    read = partial(read_json, shape=_Provenance, most_bytes=PROVENANCE_BYTES)
    return [_with_texts(start) for start in _read(provenance, read, nothing)["starts"]]


def read_samples(folder: RunFolder) -> list[dict[str, Any]]:
    """What the model generated, in the order of the file: `step`, `prompt`, `text`, `time`, of answers that were judged
    `reward`. Raises UserError.
    """
    return _read(folder.samples, read_records, [])


def reward_of(sample: Mapping[str, Any]) -> str:
    """A sample's reward as it is shown; "" where it has none."""
    reward = sample.get("reward")
    return f"{reward:.3g}" if isinstance(reward, int | float) and not isinstance(reward, bool) else ""


def read_score(folder: RunFolder) -> Score:
    """The HellaSwag score that was measured after training. Raises UserError."""
    nothing: Score = {}
    return _read(folder.report / "hellaswag.json", lambda path: read_json(path, Score), nothing)


def read_table(folder: RunFolder) -> MetricsTable:
    """The run's metrics; an empty table where it has none. Raises UserError."""
    return _read(folder.metrics, read_metrics_table, MetricsTable(folder.metrics))


def leniently(read: Callable[[], Found], complaints: list[str]) -> Found | None:
    """What `read` returns; None and one complaint more where it raises a UserError."""
    try:
        return read()
    except UserError as error:
        complaints.append(str(error))
        return None


def unreadable(path: Path, error: OSError) -> str:
    """The message for a file that the system can't read."""
    return refusal("read", error, path, otherwise="move it away")


def _read(path: Path, read: Callable[[Path], Found], nothing: Found) -> Found:
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return nothing
    except OSError as error:
        raise UserError(unreadable(path, error)) from None
    except BadJson as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from None


def _yaml_as(path: Path, shape: type[Shape]) -> Shape:
    """Raises OSError and BadJson."""
    try:
        content = json.dumps(read_yaml(path), default=str).encode()
    except (BadYaml, TypeError, ValueError, RecursionError) as error:
        raise BadJson(str(error)) from None
    return parse_json(content, shape)


def _with_texts(start: dict[str, Any]) -> dict[str, Any]:
    wrong = [key for key in _TEXTS if not isinstance(start.get(key, ""), str) or "\0" in start.get(key, "")]
    return {key: value for key, value in start.items() if key not in wrong}
