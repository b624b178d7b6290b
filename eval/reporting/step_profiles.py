"""Where the profiled steps of runs went: a picture of bars and a table."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from common.progress import format_duration
from common.step_profile import PARTS, StepProfile
from eval.reporting import drawing
from eval.reporting.drawing import Picture, draw, short
from eval.reporting.html_parts import folded, note, table
from eval.reporting.run_data import RunData

PART_COLORS = ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#F0E442", "#DDDDDD")
SHOWN_PROFILES = 12  # of a run's, the newest
SMALLEST_LABEL = 0.07  # of a step, below which a bar has no figure


def shown_profiles(runs: Sequence[RunData]) -> list[tuple[str, StepProfile]]:
    """What each bar and column is called, and its profile."""
    return [
        (f"{f'{run.name}, ' if len(runs) > 1 else ''}{_steps(profile)}", profile)
        for run in runs
        for profile in run.profiles[-SHOWN_PROFILES:]
    ]


def _steps(profile: StepProfile) -> str:
    first, last = profile["first_step"], profile["last_step"]
    return f"steps {first:,} to {last:,}" if last > first else f"step {first:,}"


def profile_picture(runs: Sequence[RunData]) -> Picture | None:
    """A bar for each profile, cut into its parts; None where no run was profiled."""
    found = shown_profiles(runs)
    if not found:
        return None

    def paint(axes: Axes) -> None:
        left, rows = np.zeros(len(found)), range(len(found))
        for (part, label), color in zip(PARTS.items(), PART_COLORS, strict=True):
            shares = np.array([100 * profile["shares"].get(part, 0.0) for _, profile in found])
            if shares.max() < 0.05:
                continue
            bars = axes.barh(rows, shares, 0.6, left, color=color, label=label, edgecolor="white", linewidth=0.5)
            texts = [f"{share:.0f} %" if share >= 100 * SMALLEST_LABEL else "" for share in shares]
            axes.bar_label(bars, texts, label_type="center", fontsize=9, color=drawing.ink_on(color))
            left += shares
        axes.set_yticks(rows, [short(name, 28) for name, _ in found])
        axes.set_xlim(0, 100)
        axes.set_axisbelow(True)
        axes.set_xlabel("% of the profiled steps")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    return draw(paint, "Where the profiled steps went", size=(drawing.SIZE_INCHES[0], 2.3 + 0.3 * len(found)))


def profile_tables(runs: Sequence[RunData]) -> Markup:
    """Seconds and shares by part, and the operators that took the most, as HTML; empty where no run was profiled."""
    found = shown_profiles(runs)
    if not found:
        return Markup()
    parts = [part for part in PARTS if any(profile["shares"].get(part, 0.0) > 0 for _, profile in found)]
    rows = [[PARTS[part], *(_of_a_step(profile, part) for _, profile in found)] for part in parts]
    rows.append(["a step", *(format_duration(profile["seconds"] / _count(profile)) for _, profile in found)])
    rows.append(["communication beside computing", *(_hidden(profile) for _, profile in found)])
    rows.append(["whose time", *(_whose(profile) for _, profile in found)])
    slower = note(
        "Profiled steps are slower than others: each operator is recorded. The traces are in the run's profile folder."
    )
    largest = [folded(f"{name}: the operators that took the most", _largest(profile)) for name, profile in found]
    whole = table(["", *(name for name, _ in found)], rows, numbers=range(1, len(found) + 1))
    return whole + slower + Markup().join(largest)


def _count(profile: StepProfile) -> int:
    return max(1, profile["last_step"] - profile["first_step"] + 1)


def _of_a_step(profile: StepProfile, part: str) -> str:
    seconds = profile["parts"].get(part, 0.0) / _count(profile)
    return f"{1000 * seconds:,.1f} ms ({profile['shares'].get(part, 0.0):.1%})"


def _hidden(profile: StepProfile) -> str:
    return f"{1000 * profile['hidden_communication_seconds'] / _count(profile):,.1f} ms"


def _whose(profile: StepProfile) -> str:
    return f"{profile['measured']} of rank {profile['rank']} of {profile['world_size']} ({profile['device']})"


def _largest(profile: StepProfile) -> Markup:
    rows = [
        [entry["name"], PARTS.get(entry["part"], entry["part"]), f"{1000 * entry['seconds'] / _count(profile):,.1f} ms"]
        for entry in profile["largest"]
    ]
    return table(["operator or kernel", "part", "a step"], rows, numbers=[2])
