"""What bench_step.py makes of its contestants' answers: rows, ratios, a table. Nothing here needs torch."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from common.progress import format_bytes, format_count
from model.counts import flops_per_token
from model.device_table import peak_flops
from train.benchmarks.step_cases import Case

LONGHAUL, TEXTBOOK, CEILING = "longhaul", "textbook", "ceiling"
OTHERS = (TEXTBOOK, "nanogpt", "transformers")


@dataclass
class Row:
    """A contestant's figures so far. Lists hold a number for each measured step, `losses` of the warm-up too."""

    contestant: str
    described: str = ""
    compiled: bool = False
    error: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    estimated_bytes: int | None = None  # Longhaul's own estimate of what is kept
    start_bytes: int | None = None  # before the first step
    peak_bytes: int | None = None
    peak_reserved_bytes: int | None = None  # of CUDA's allocator
    warm_up_seconds: list[float] = field(default_factory=list)
    turns: list[list[dict[str, float | None]]] = field(default_factory=list)  # of steps
    losses: list[float] = field(default_factory=list)

    def take(self, kind: str, answer: dict[str, Any]) -> None:
        """Take in an answer of `step_turns.take_turns`."""
        if kind == "error":
            self.error = answer["error"]
        elif kind == "facts":
            for name, value in answer.items():
                setattr(self, name, value)
        else:
            steps = answer["steps"]
            self.losses += [step["loss"] for step in steps if step["loss"] is not None]
            if kind != "trace":  # which costs time and memory of its own
                self.peak_bytes, self.peak_reserved_bytes = answer["peak_bytes"], answer["peak_reserved_bytes"]
            if kind == "warm_up":
                self.warm_up_seconds = [step["seconds"] for step in steps]
            elif kind == "turn":
                self.turns.append(steps)

    def all(self, what: str) -> list[float]:
        """One figure of all measured steps; [] where it is not there."""
        return [step[what] for turn in self.turns for step in turn if step[what] is not None]  # type: ignore[misc]

    def of_turns(self, what: str) -> list[float]:
        """One figure, summed over the steps of each turn."""
        return [sum(step[what] for step in turn) for turn in self.turns]  # type: ignore[misc]


def summary(row: Row, case: Case) -> dict[str, Any]:
    """A row as JSON has it."""
    tokens, seconds = case.config.batch.tokens_per_step, row.all("seconds")
    figures: dict[str, Any] = {
        name: value for name, value in asdict(row).items() if name not in ("machine", "turns", "losses")
    }
    figures["first_loss"] = row.losses[0] if row.losses else None
    figures["last_loss"] = row.losses[-1] if row.losses else None
    for what in ("seconds", "processor_seconds", "device_seconds"):
        figures[what] = spread(row.all(what))
        figures[f"turns_{what}"] = [] if figures[what] is None else row.of_turns(what)
    speed = tokens / statistics.median(seconds) if seconds else None
    figures["tokens_per_second"] = speed
    figures["mfu"] = mfu(speed, case, row) if row.contestant != CEILING else None
    figures["idle_share"] = None
    if seconds and figures["device_seconds"]:
        figures["idle_share"] = 1 - sum(row.all("device_seconds")) / sum(seconds)
    figures["compile_seconds"] = None
    if row.compiled and seconds and row.warm_up_seconds:
        figures["compile_seconds"] = max(0.0, row.warm_up_seconds[0] - statistics.median(seconds))
    return figures


def spread(values: list[float]) -> dict[str, float] | None:
    """Of some steps: the spread is from the fastest to the slowest, as a share of the median."""
    if not values:
        return None
    median, lowest = statistics.median(values), min(values)
    return {"median": median, "minimum": lowest, "spread": (max(values) - lowest) / median if median else 0.0}


def mfu(tokens_per_second: float | None, case: Case, row: Row) -> float | None:
    """Of the device's peak in bf16; None where that is unknown."""
    peak = peak_flops(row.machine.get("device", ""))
    if tokens_per_second is None or peak is None:
        return None
    return tokens_per_second * flops_per_token(case.config.model.architecture()) / peak


def ratios(rows: dict[str, Row]) -> dict[str, Any]:
    """Longhaul beside the others: medians over turns of what the two needed in the same turn.

    Above 1 Longhaul is faster. `share_of_ceiling` is the part of its time that the matrix products would need; memory
    is Longhaul's peak over the other's. Null where one of the two has no figures.
    """
    result: dict[str, Any] = {
        f"tokens_per_second_vs_{name}": paired(rows, name, "seconds") for name in OTHERS
    } | {"share_of_ceiling": share_of_ceiling(rows, "seconds")}  # fmt: skip
    for name in OTHERS:
        result[f"peak_memory_vs_{name}"] = peak_memory_vs(rows, name)
    result["by_processor_time"] = {
        f"tokens_per_second_vs_{name}": paired(rows, name, "processor_seconds") for name in OTHERS
    } | {"share_of_ceiling": share_of_ceiling(rows, "processor_seconds")}
    return result


def paired(rows: dict[str, Row], other: str, what: str) -> float | None:
    """How many times as long the other took in the same turn: the median over turns."""
    ours, theirs = (rows[name].of_turns(what) if name in rows else [] for name in (LONGHAUL, other))
    pairs = [their / our for our, their in zip(ours, theirs, strict=False) if our > 0]
    return statistics.median(pairs) if pairs else None


def share_of_ceiling(rows: dict[str, Row], what: str) -> float | None:
    return paired(rows, CEILING, what)


def peak_memory_vs(rows: dict[str, Row], other: str) -> float | None:
    ours, theirs = (rows[name].peak_bytes if name in rows else None for name in (LONGHAUL, other))
    return ours / theirs if ours and theirs else None


def table(case: Case, rows: dict[str, Row]) -> str:
    """One case for the terminal."""
    machine: dict[str, Any] = next((row.machine for row in rows.values() if row.machine), {})
    where = ", ".join(str(machine[key]) for key in ("dtype", "device") if key in machine)
    step = f"{case.accumulation} x {case.micro_batch} x {case.config.model.block_size} tokens a step"
    lines = [f"{case.name}: {step}, {where}, {case.threads} threads, {case.turns} turns of {case.steps}"]
    lines.append(
        f"{'contestant':<13}{'median':>9}{'minimum':>9}{'spread':>7}{'processor':>10}{'tokens/s':>10}{'MFU':>7}"
        f"{'peak':>11}{'estimate':>11}{'last loss':>10}"
    )
    lines += [_line(summary(row, case)) for row in rows.values()]
    found = ratios(rows)
    by_processor = found["by_processor_time"]
    for name in OTHERS:
        speed, memory = found[f"tokens_per_second_vs_{name}"], found[f"peak_memory_vs_{name}"]
        if speed is not None:
            processor = by_processor[f"tokens_per_second_vs_{name}"]
            lines.append(f"  {speed:.2f} times the tokens/s of {name} ({processor:.2f} by processor time), "
                         f"{_ratio(memory)} of its memory")  # fmt: skip
    if found["share_of_ceiling"] is not None:
        share, processor = found["share_of_ceiling"], by_processor["share_of_ceiling"]
        lines.append(f"  {share:.2f} of the ceiling's tokens/s ({processor:.2f} by processor time)")
    return "\n".join(lines)


def _line(figures: dict[str, Any]) -> str:
    name, seconds = figures["contestant"], figures["seconds"]
    if seconds is None:
        return f"{name:<13}{figures['error'] or 'no turn yet'}"
    share = "-" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    estimate = "-" if figures["estimated_bytes"] is None else format_bytes(figures["estimated_bytes"])
    loss = "-" if figures["last_loss"] is None else f"{figures['last_loss']:.4f}"
    line = (
        f"{name:<13}{seconds['median']:>7.3f} s{seconds['minimum']:>7.3f} s{seconds['spread']:>7.0%}"
        f"{figures['processor_seconds']['median']:>8.3f} s{format_count(figures['tokens_per_second']):>10}{share:>7}"
        f"{format_bytes(figures['peak_bytes'] or 0):>11}{estimate:>11}{loss:>10}"
    )
    return f"{line}  then: {figures['error']}" if figures["error"] else line


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
