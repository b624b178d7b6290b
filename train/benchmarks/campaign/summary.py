"""A campaign's record for the terminal: each check, then each figure with its prediction beside it."""

import math
from typing import Any

from common.progress import format_count

NAME, FIGURE = 20, 44  # columns


def line_of(row: dict[str, Any]) -> str:
    """A check, when it has ended."""
    seconds = "" if row["seconds"] is None else f" in {row['seconds']:.0f} s"
    reason = f" ({row['reason']})" if "reason" in row else ""
    lines = [f"{row['name']}: {row['status']}{seconds}{reason}"]
    if row["status"] in ("failed", "out of time"):
        lines += [f"    {line}" for line in row["last_lines"]]
    return "\n".join(lines)


def table(record: dict[str, Any]) -> str:
    """All figures that were found or predicted, and how many checks ended how."""
    facts = record["facts"] or {}
    device = f"{facts.get('device', 'unknown device')}, torch {facts.get('packages', {}).get('torch', 'unknown')}"
    lines = [
        f"\npart {record['part']} on {device}",
        f"{'check':<{NAME}}{'figure':<{FIGURE}}{'predicted':>12}{'found':>12}",
    ]
    for row in record["checks"]:
        name = row["name"]
        for figure in row["figures"]:
            mark = "  beyond its limits" if figure["holds"] is False else ""
            values = f"{shown(figure['predicted']):>12}{shown(figure['measured']):>12}"
            lines.append(f"{name:<{NAME}}{figure['name']:<{FIGURE}}{values}{mark}")
            name = ""
    statuses = [row["status"] for row in record["checks"]]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    if value and (abs(value) >= 10_000 or not math.isfinite(value)):
        return format_count(value) if math.isfinite(value) else str(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
