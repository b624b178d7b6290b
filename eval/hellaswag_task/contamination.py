"""HellaSwag's examples by what data_prep/contamination.py found of them in the training text. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import Count, Sha256, keep_others, read_json_for_user
from common.publish import sha256_file
from eval.hellaswag_task.examples import MOST_BYTES, HellaSwag

AGAIN = "write it with data_prep/contamination.py --json"
Side = Literal["clean", "found", "unchecked"]


class Against(TypedDict):
    """The evaluation's file that was searched for."""

    sha256: Sha256
    items: Count


@keep_others
class Entry(TypedDict):
    """An example that was found."""

    item: Count


@keep_others
class StoredReport(TypedDict):
    """What data_prep/contamination.py writes, as far as it is read here."""

    data_identity: Sha256
    against: Against
    found: list[Entry]
    unchecked: list[Count]


@dataclass(frozen=True)
class Contamination:
    """Reports on a file's examples, one for each token set: those found in any of them, and those too short to judge.

    Attributes:
        reports: of each file its SHA-256 and the identity of the token set that was searched.
    """

    reports: tuple[tuple[str, str], ...]
    found: frozenset[int]
    unchecked: frozenset[int]

    def sides(self, count: int) -> dict[Side, npt.NDArray[np.int64]]:
        """The numbers (n,) of the first `count` examples, by side."""
        by_side: dict[Side, list[int]] = {"clean": [], "found": [], "unchecked": []}
        for number in range(count):
            side: Side = "found" if number in self.found else "unchecked" if number in self.unchecked else "clean"
            by_side[side].append(number)
        return {side: np.array(numbers, dtype=np.int64) for side, numbers in by_side.items()}

    def note(self, manifest: Mapping[str, Any]) -> str | None:
        """What to know where the reports are about other data than a checkpoint was trained on."""
        searched = {identity for _, identity in self.reports}
        if mix := manifest.get("mix"):
            left = [name for name, identity in mix["sets"] if identity not in searched]
            return (
                f"no contamination report is of {', '.join(left)}, which this checkpoint was trained on"
                if left
                else None
            )
        if manifest.get("data_identity") in (None, *searched):
            return None
        return "the contamination report is of another token set than the one that this checkpoint was trained on"


def read_contamination(paths: Sequence[Path], data: HellaSwag) -> Contamination:
    """Reports on these examples. Raises UserError where one can't be read, or is on another file."""
    stored = [_read(path, data) for path in paths]
    return Contamination(
        tuple((sha256_file(path), report["data_identity"]) for path, report in zip(paths, stored, strict=True)),
        frozenset(entry["item"] for report in stored for entry in report["found"]),
        frozenset(number for report in stored for number in report["unchecked"]),
    )


def _read(path: Path, data: HellaSwag) -> StoredReport:
    try:
        stored = read_json_for_user(path, StoredReport, AGAIN, most_bytes=MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: {AGAIN}") from None
    if stored["against"]["sha256"] != data.sha256:
        raise UserError(f"{path} is about another file than {data.path}: run data_prep/contamination.py against that")
    return stored
