"""How long the same compilation took the last time: nothing else tells when this one will end.

The seconds are kept in a small file beside the kernels that torch keeps on this machine: every run of the same model
finds them, and they go when the kernels go.
"""

import contextlib
import hashlib
from pathlib import Path

from common.json_file import BadJson, read_json
from common.publish import write_json_whole

Kept = dict[str, float]


def last_seconds(work: str) -> float | None:
    """None where it was never compiled here, or can't be known. Args: work: all that decides what is compiled."""
    with contextlib.suppress(OSError, BadJson):
        seconds = read_json(_file(work), Kept).get("seconds", 0.0)
        return seconds if 0 < seconds < float("inf") else None
    return None


def keep_seconds(work: str, seconds: float) -> None:
    """For the next time. A folder that can't be written keeps nothing."""
    with contextlib.suppress(OSError):
        file = _file(work)
        file.parent.mkdir(exist_ok=True)
        write_json_whole(file, {"seconds": seconds})


def _file(work: str) -> Path:
    """Raises OSError."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # makes the folder

    return Path(cache_dir()) / "longhaul" / f"{hashlib.sha256(work.encode()).hexdigest()[:24]}.json"
