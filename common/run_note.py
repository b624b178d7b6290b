"""A worker's note to its launcher on the same machine: who it is, and which run it trains while it does."""

import contextlib
import os
from pathlib import Path

from typing_extensions import TypedDict

from common.json_file import BadJson, Count, Finite, read_json
from common.publish import write_json_whole

NOTES_FOLDER = "LONGHAUL_NOTES"  # where the launcher looks for them


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
