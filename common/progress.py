"""Progress of long work, and numbers as people read them."""

import math
import sys
from typing import Any

from tqdm import tqdm

from common.plain_text import bar_file, one_line

LINE_SECONDS = 10.0  # how often a bar writes a line where standard error is no terminal


def progress_bar(total: int | None, unit: str, description: str, *, scale: bool = False, **options: Any) -> "tqdm[Any]":
    """A bar with rate and ETA on standard error; in a log file a line every 10 seconds.

    `scale` writes large counts as 1.2M. The caller closes it (it is a context manager).
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=unit,
        desc=one_line(description),
        unit_scale=scale,
        dynamic_ncols=True,
        mininterval=0.1 if terminal else LINE_SECONDS,
        maxinterval=LINE_SECONDS,
        file=bar_file(),
        **options,
    )


def format_duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 3 h 07 min, 2 d 4 h; "unknown" for what isn't a time."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def format_count(number: float) -> str:
    """950, 12.3K, 124.4M, 10.0B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.1f}"


def format_bytes(number: float) -> str:
    """512 B, 1.5 MiB, 14.7 GiB."""
    for size, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(number) >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
