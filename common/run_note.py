"""A worker's note to its launcher on the same machine: which run it trains, as soon as it does."""

import contextlib
import os
from pathlib import Path

from typing_extensions import TypedDict

from common.json_file import BadJson, Count, Finite, read_json
from common.publish import write_json_whole

NOTES_FOLDER = "LONGHAUL_NOTES"  # where the launcher looks for them


class RunNote(TypedDict):
    """run: the folder's path. limit_seconds: `run.hang_limit_seconds`."""

    run: str
    rank: Count
    world_size: Count
    limit_seconds: Finite


def leave_note(run: Path, rank: int, world_size: int, limit_seconds: float) -> None:
    """Tell the launcher, where there is one. It can do without."""
    if folder := os.environ.get(NOTES_FOLDER):
        note: RunNote = {
            "run": str(run.resolve()),
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
