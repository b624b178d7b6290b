"""What a study has to train, and what that costs: `--dry-run`."""

from collections.abc import Mapping, Sequence

from common.progress import format_count, format_duration
from eval.comparison.measured_runs import MeasuredRun
from train.studies.planning import PlannedRun, Waiting
from train.studies.progress_view import seconds_per_flop


def describe_plan(
    runs: Sequence[PlannedRun], waiting: Sequence[Waiting], results: Mapping[str, MeasuredRun], jobs: int
) -> str:
    """A line for each variant, size and budget; sums; the time by finished runs, if there are any."""
    groups: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.size, run.budget, "trials" if run.trial else ""), []).append(run)
    lines = []
    for (variant, size, budget, trials), members in groups.items():
        done = sum(run.name in results for run in members)
        what = " ".join(filter(None, (variant, size, budget, trials)))
        one = members[0]
        lines.append(
            f"{what}: {_count(len(members), 'run')}, {done} done; {one.steps:,} steps, "
            f"{format_count(one.tokens)} tokens, {_flops(one.flops)} each"
        )
    for variant, size in dict.fromkeys((entry.variant, entry.size) for entry in waiting):
        count = sum((entry.variant, entry.size) == (variant, size) for entry in waiting)
        lines.append(f"{' '.join(filter(None, (variant, size)))}: {_count(count, 'run')} after its trials")
    left = [run for run in {run.name: run for run in runs}.values() if run.name not in results]
    tokens, flops = sum(run.tokens for run in left), sum(run.flops for run in left)
    lines += ["", f"to do: {_count(len(left), 'run')}, {format_count(tokens)} tokens, {_flops(flops)}"]
    if waiting:
        lines[-1] += f", and {_count(len(waiting), 'run')} whose options trials choose"
    speeds = [speed for run in runs if (speed := seconds_per_flop(run, results.get(run.name))) is not None]
    if speeds and left:
        seconds = flops * sum(speeds) / len(speeds)
        lines.append(
            f"time: {format_duration(seconds / jobs)} with {jobs} at a time, {format_duration(seconds)} of one, by "
            f"{_count(len(speeds), 'finished run')} (without starts and validations)"
        )
    elif left:
        lines.append("time: unknown before a run has finished")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _flops(value: float) -> str:
    return f"{value:.3g} FLOPs"
