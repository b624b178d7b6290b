"""What each fault cost, a row each, as lines and as a table."""

from collections import defaultdict
from dataclasses import dataclass

from tests.chaos.phases import PHASES
from tests.chaos.plan import BETWEEN_STARTS


@dataclass
class Row:
    """One line of the report. steps_lost: steps recorded before the fault that had to be done again."""

    number: int
    run: str
    phase: str
    fault: str
    target: str
    rank: int | None
    ranks: int
    moment: str
    start: str  # by exec or by fork
    step: int
    steps_lost: int
    seconds_to_detect: float
    outcome: str
    complaint: str

    @property
    def ok(self) -> bool:
        return not self.complaint


def describe(row: Row) -> str:
    """A row in one line."""
    who = f" {row.target}" + (f" (rank {row.rank} of {row.ranks})" if row.rank is not None else "")
    what = f"FAILED: {row.complaint}" if row.complaint else row.outcome
    return (
        f"{row.run} step {row.step}: {row.fault},{who}, {row.moment} {row.phase} [{row.start}]: {what}, "
        f"{row.seconds_to_detect:.1f} s"
    )


def table(rows: list[Row]) -> str:
    """By phase and fault: how many, the most steps lost, the longest time to detection."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row.fault, row.phase, row.target)].append(row)
    order = [*PHASES, BETWEEN_STARTS]
    lines = [
        "| fault | phase | target | faults | steps lost, mean | most | seconds to detect, median | most | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fault, phase, target in sorted(groups, key=lambda key: (key[0], order.index(key[1]), key[2])):
        group = groups[(fault, phase, target)]
        lost = [row.steps_lost for row in group if row.steps_lost is not None]
        seconds = sorted(row.seconds_to_detect for row in group)
        mean = f"{sum(lost) / len(lost):.1f}" if lost else ""
        lines.append(
            f"| {fault} | {phase} | {target} | {len(group)} | {mean} | {max(lost, default='')} | "
            f"{seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f} | {sum(not row.ok for row in group)} |"
        )
    return "\n".join(lines)
