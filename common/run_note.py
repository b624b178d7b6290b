"""What a launcher and its workers on the same machine tell each other.

A worker leaves a note: who it is, and which run it trains while it does. A launcher tells when it started.
"""

import contextlib
import os
import time
from pathlib import Path

from typing_extensions import TypedDict

from common.json_file import BadJson, Count, Finite, read_json
from common.processes import wall_time_of_start
from common.publish import write_json_whole

NOTES_FOLDER = "LONGHAUL_NOTES"  # where the launcher looks for them
LAUNCHED = "LONGHAUL_LAUNCHED"  # when the launcher started, in seconds since the epoch


class RunNote(TypedDict):
    """run: the folder's path, while the ranks watch each other there. limit_seconds: `run.hang_limit_seconds`."""

    run: str | None
    rank: Count
    world_size: Count
    limit_seconds: Finite


def leave_note(run: Path | None, rank: int, world_size: int, limit_seconds: float) -> None:
    """Tell the launcher, where there is one. It can do without.

    Args: run: None before this rank has met the others and the run is its own, and once that is over.
    """
    if folder := os.environ.get(NOTES_FOLDER):
        note: RunNote = {
            "run": str(run.resolve()) if run is not None else None,
            "rank": rank,
            "world_size": world_size,
            "limit_seconds": limit_seconds,
        }
        with contextlib.suppress(OSError):
            write_json_whole(Path(folder) / f"{os.getpid()}.json", note)


def read_note(folder: Path, pid: int) -> RunNote | None:
    """What a worker has left; None as long as that is nothing."""
    try:
        return read_json(folder / f"{pid}.json", RunNote)
    except (OSError, BadJson):
        return None


def launched_at() -> float:
    """When this start of a run was launched, in seconds since the epoch: its launcher, or without one this process."""
    own, text = wall_time_of_start(os.getpid()) or time.time(), os.environ.get(LAUNCHED, "")
    try:
        given = float(text)
    except ValueError:  # nobody's launcher wrote it
        return own
    return given if 0 < given <= own else own
