"""Where the time of a few profiled steps went, as `profile/steps-….json` in a run's folder holds it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from common.json_file import Count, keep_others, read_json_for_user
from common.run_folder import RunFolder

# Every moment of a step is one of these. The order is that of tables and pictures.
PARTS = {
    "matrix_products": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise, norms, copies",
    "head": "head and loss",
    "optimizer": "clipping and optimizer",
    "communication": "communication",
    "data": "waiting for data",
    "idle": "idle",
}

Seconds = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]


@keep_others
class Operator(TypedDict):
    """An operator or kernel, and the seconds it took in all profiled steps."""

    name: str
    part: str
    seconds: Seconds


class TimeByPart(TypedDict):
    """Seconds of all profiled steps together. `parts` has those of each of `PARTS`, which add up to `seconds`; `shares`
    are fractions of them."""

    measured: str  # main thread, or device: whose time it is
    seconds: Seconds
    parts: dict[str, Seconds]
    shares: dict[str, Share]
    hidden_communication_seconds: Seconds  # while something else was computed
    largest: list[Operator]


@keep_others
class StepProfile(TimeByPart):
    """What a table's file holds: one rank's time, and where it is from."""

    first_step: Count
    last_step: Count
    rank: Count
    world_size: Count
    device: str
    traces: list[str]  # files beside this one, a rank each


def table_name(first_step: int, last_step: int) -> str:
    return f"steps-{first_step:05d}-{last_step:05d}.json"


def trace_name(first_step: int, last_step: int, rank: int) -> str:
    return f"steps-{first_step:05d}-{last_step:05d}-rank-{rank:05d}.json.gz"


def table_files(folder: RunFolder) -> list[Path]:
    """The tables of a run's profiles, by step. Raises OSError where the folder can't be read."""
    return sorted(path for path in folder.profile.glob("steps-*.json") if "-rank-" not in path.name)


def read_step_profiles(folder: RunFolder) -> list[StepProfile]:
    """A run's profiles, by step; none of a run without. Raises UserError."""
    return [read_json_for_user(path, StepProfile, "move it away") for path in table_files(folder)]


def profile_lines(profile: StepProfile) -> list[str]:
    """A profile as people read it: a line each for the steps and for every part that took any time."""
    first, last = profile["first_step"], profile["last_step"]
    steps = max(1, last - first + 1)
    which = f"steps {first} to {last}" if last > first else f"step {first}"
    rank = f"rank {profile['rank']} of {profile['world_size']}" if profile["world_size"] > 1 else "rank 0"
    took = f"{_milliseconds(profile['seconds'] / steps)} a step"
    title = f"profile of {which}: {took} ({profile['measured']} of {rank})"
    width = max(map(len, PARTS.values()))
    lines = [title]
    for part, label in PARTS.items():
        if (share := profile["shares"].get(part, 0.0)) > 0:
            seconds = profile["parts"].get(part, 0.0) / steps
            lines.append(f"  {label:<{width}} {_milliseconds(seconds):>12} {share:7.1%}  {'█' * round(40 * share)}")
    if (hidden := profile["hidden_communication_seconds"] / steps) > 0:
        lines.append(f"  communication beside computing, in none of these: {_milliseconds(hidden)} a step")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
