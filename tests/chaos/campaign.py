"""A series of faults on runs one after another, and what each cost."""

import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.metrics_file import read_json_lines
from common.metrics_table import read_metrics_table
from common.run_folder import RunFolder
from tests.chaos import disk, plan, spikes
from tests.chaos.faults import (
    GONE_SECONDS,
    HANG_LIMIT_SECONDS,
    HANG_SECONDS,
    Outcome,
    Victims,
    goes_on_without_room,
    inflict,
    silent_server,
)
from tests.chaos.kind import Kind
from tests.chaos.marks import OwnMark
from tests.chaos.phases import Trap
from tests.chaos.plan import Fault
from tests.chaos.rows import Row
from tests.chaos.starts import DEFAULT, EVENT_SECONDS, MAX_STEPS, SAVE_EVERY, Starts
from tests.chaos.trainer import Trainer
from tests.chaos.verdict import broken_checkpoints, compare, compare_closely, last_step, newest_whole, whole_records

MOST_LOST = 2 * SAVE_EVERY  # the save that was under way, and the steps since it began
FAILED_STARTS = 3  # in a row, without a fault, until a run is given up
FIRST_POSTPONED = 3  # faults that come before one whose time has not come
MOST_WITHOUT_IT = 12  # starts, until a fault whose phase no run has is given up


@dataclass
class Run:
    """A run under fire."""

    folder: RunFolder
    starts: int = 0
    failed_starts: int = 0
    seen_bytes: int = 0  # of metrics.jsonl
    reached: int = 0  # the last step its newest start recorded
    position: int = 0  # the step it must go on from
    failed_saves: int = 0  # which it was allowed to go on without, so that two saves are further apart
    damaged: set[Path] = field(default_factory=set)  # by the harness
    unnoticed: dict[Path, Row] = field(default_factory=dict)  # damage that no start has complained about yet


class Campaign:
    """Inflicts faults and collects rows. `on_row` is called after each."""

    def __init__(
        self,
        folder: Path,
        runs: Path,
        faults: list[Fault],
        forked: OwnMark | None,
        on_row: Callable[[], None],
        options: Sequence[str] = (),
        kind: Kind = DEFAULT,
    ) -> None:
        """Made once.

        Args:
            folder: for logs and data. runs: for the runs, on a disk of their own. forked: where forks may be.
            options: of every trainer. kind: of the runs.
        """
        self._folder = folder
        self._runs = runs
        self._queue = deque(faults)
        self._forked = forked
        self._on_row = on_row
        self._run: Run | None = None
        self._run_count = 0
        self.rows: list[Row] = []
        self.differing_steps: list[tuple[str, int]] = []
        self.lost_runs: list[str] = []
        self.complaints: list[str] = []  # about starts without a fault
        self.largest_difference = 0.0  # relative, of a loss; of runs whose number of ranks changes
        self._kind, self._of_ranks = kind, random.Random("ranks of starts without a fault")
        self._starts = Starts(folder, runs, options, kind)
        executed = forked is None or any(fault.executed for fault in faults)
        self._reference = self._starts.undisturbed(None if executed else forked)
        self.rollbacks = len(read_metrics_table(self._reference.metrics).rollbacks)
        assert self.rollbacks == (spikes.ROLL_BACKS if kind.spiked else 0), "the spikes are not where they were planted"

    def proceed(self) -> None:
        """Inflict every fault, finish every run."""
        while self._queue:
            fault = self._queue.popleft()
            if fault.trap is not None:
                self._attempt(fault)
            elif not self._damage(fault):
                self._queue.insert(min(FIRST_POSTPONED, len(self._queue)), fault)
                if all(other.trap is None for other in self._queue):
                    self._progress()
        while self._run is not None:
            self._plain_start()

    def _current(self) -> Run:
        if self._run is None:
            self._run_count += 1
            first = self._kind.first_step
            self._run = Run(RunFolder(self._runs / f"run-{self._run_count:02d}"), reached=first, position=first)
            self._starts.forget_plans()
        return self._run

    # faults while it runs ----------------------------------------------------------------------------------------

    def _attempt(self, fault: Fault) -> None:
        """Start until the fault has happened; a run that is done first makes room for a new one.

        Raises AssertionError where many starts come by without it.
        """
        for _ in range(MOST_WITHOUT_IT):
            run = self._current()
            outcome = self._try(fault, run)
            if outcome is not None:
                self._add_row(fault, run, outcome)
                if (run.folder.read_state() or {}).get("status") == "done":
                    self._finish(run)  # there is nothing left in it to disturb
                return
            self._after_plain_end(run)
        raise AssertionError(
            f"{MOST_WITHOUT_IT} starts ended without reaching {fault.trap}: is its phase part of them?"
        )

    def _try(self, fault: Fault, run: Run) -> Outcome | None:
        """One start with a fault; None if the run ended before it."""
        more: tuple[str, ...] = ()
        environment: dict[str, str] = {}
        if fault.kind == plan.DISK_FULL and not goes_on_without_room(fault):
            more = ("--checkpoint.on_failure=stop",)
        if fault.kind in (plan.FREEZE, plan.SLOW):
            more = (f"--run.hang_seconds={HANG_SECONDS:g}", f"--run.hang_limit_seconds={HANG_LIMIT_SECONDS:g}")
        with silent_server() as url:
            if fault.kind in (plan.WANDB_SILENT, plan.WANDB_STOPPED):
                more = ("--log.wandb=true",)
                environment = {"WANDB_MODE": "offline"}
            if fault.kind == plan.WANDB_SILENT:
                environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
            forked = None if fault.executed else self._forked
            trainer = self._starts.start(
                run.folder, fault.trap, forked=forked, world_size=fault.ranks, more=more, environment=environment
            )
            run.starts += 1
            outcome = None
            try:
                while (event := trainer.next_event(EVENT_SECONDS)) is not None and event.kind != "ended":
                    if event.kind == "reached":
                        second, first = self._second_starter(run, forked), self._kind.first_step
                        victims = Victims(trainer, run.folder, second, first_step=first, last_step=MAX_STEPS)
                        outcome = inflict(fault, victims)
                        break
                if event is None:
                    outcome = Outcome(EVENT_SECONDS, "", "the start hung before the fault came")
            finally:
                trainer.close()
        self._learn(run, trainer)
        return outcome

    def _second_starter(self, run: Run, forked: OwnMark | None) -> Callable[[int], Trainer]:
        return lambda world_size: self._starts.start(run.folder, None, forked=forked, world_size=world_size)

    def _saved_step(self, run: Run) -> int:
        return max(newest_whole(run.folder.checkpoints), self._kind.first_step)

    def _add_row(self, fault: Fault, run: Run, outcome: Outcome) -> Row:
        complaint = outcome.complaint
        for path, why in broken_checkpoints(run.folder.checkpoints).items():
            if path not in run.damaged:
                complaint = complaint or f"{path.name} was published broken: {why}"
        reached, position = run.reached, self._saved_step(run)
        run.failed_saves += outcome.failed_saves
        allowed = 0 if outcome.nothing_lost else MOST_LOST + run.failed_saves * SAVE_EVERY
        if reached - position > allowed:
            complaint = complaint or f"lost {reached - position} steps, at most {allowed} are promised"
        run.position = run.reached = position
        row = Row(
            number=fault.number,
            run=run.folder.path.name,
            phase=fault.phase,
            fault=fault.kind,
            target=fault.target,
            rank=fault.trap.rank if fault.trap else None,
            ranks=fault.ranks,
            moment=fault.trap.moment if fault.trap else "",
            start="exec" if fault.executed or self._forked is None else "fork",
            step=reached,
            steps_lost=reached - position,
            seconds_to_detect=round(outcome.seconds_to_detect, 2),
            outcome=outcome.outcome,
            complaint=complaint,
        )
        self.rows.append(row)
        self._on_row()
        return row

    def _learn(self, run: Run, trainer: Trainer) -> None:
        """What the start that has just ended tells about earlier faults: where it went on, what it complained about."""
        said = trainer.said()
        noticed = [path for path in run.unnoticed if f"skipped: {path}" in said]
        if not run.folder.metrics.exists():
            return
        with open(run.folder.metrics, "rb") as file:
            file.seek(run.seen_bytes)
            new = file.read()
        run.seen_bytes += len(new)
        records = whole_records(new)
        start = next((record for record in records if record.get("kind") == "start"), None)
        if start is None:
            return
        if start["step"] != run.position:
            self.complaints.append(
                f"{run.folder.path.name}, start {run.starts}: went on from step {start['step']}, though the newest "
                f"whole checkpoint was of step {run.position}"
            )
        run.reached = max(start["step"], last_step(records) or 0)
        for path, row in run.unnoticed.items():
            row.seconds_to_detect = round(start["time"] - trainer.started_time, 2)
            if path not in noticed or start["step"] >= int(path.name[5:]):
                row.complaint = row.complaint or f"the damage to {path.name} was not noticed"
        run.unnoticed.clear()
        self._on_row()

    # faults between starts ---------------------------------------------------------------------------------------

    def _damage(self, fault: Fault) -> bool:
        """Damage a file while nothing runs; False if there is nothing yet that may be damaged."""
        chance = random.Random(fault.seed)
        run = self._current()
        hurt = disk.truncate if fault.kind in (plan.CHECKPOINT_TRUNCATED, plan.SHARD_TRUNCATED) else disk.flip_bit
        if fault.kind in (plan.SHARD_TRUNCATED, plan.SHARD_FLIPPED):
            self._damage_shard(fault, run, hurt, chance)
            return True
        broken = broken_checkpoints(run.folder.checkpoints)
        whole = [path for path in sorted(run.folder.checkpoints.glob("step-????????")) if path not in broken]
        if len(whole) < 2 or run.unnoticed:
            return False
        files = sorted(path for path in whole[-1].iterdir() if path.stat().st_size)
        victim = chance.choice(files)
        content = victim.read_bytes()
        while whole[-1] not in broken_checkpoints(run.folder.checkpoints):  # a bit of the hash's own name means nothing
            victim.write_bytes(content)
            hurt(victim, chance)
        run.damaged.add(whole[-1])
        row = self._add_row(fault, run, Outcome(0.0, f"{victim.name} of {whole[-1].name}"))
        run.unnoticed[whole[-1]] = row
        return True

    def _damage_shard(self, fault: Fault, run: Run, hurt: Callable[..., None], chance: random.Random) -> None:
        shard = chance.choice(self._starts.shards())
        content = shard.read_bytes()
        before = read_json_lines(run.folder.metrics)
        hurt(shard, chance)
        forked = None if fault.executed else self._forked
        trainer = self._starts.start(run.folder, None, forked=forked, world_size=fault.ranks)
        alive = trainer.wait_until_gone(GONE_SECONDS)
        seconds = time.monotonic() - trainer.started
        trainer.close()
        shard.write_bytes(content)
        errors = [line for line in trainer.said().splitlines() if line.startswith("error:")]
        complaint = ""
        if alive or trainer.status == 0 or len(errors) != 1 or shard.name not in errors[0]:
            complaint = f"the damage to {shard.name} was not refused: status {trainer.status}, {errors}"
        elif read_json_lines(run.folder.metrics) != before:
            complaint = "the refused start wrote into the run"
        self._learn(run, trainer)
        self._add_row(fault, run, Outcome(seconds, f"refused, naming {shard.name}", complaint, nothing_lost=True))

    # without a fault ---------------------------------------------------------------------------------------------

    def _progress(self) -> None:
        """Go on for some steps, so that there is something to damage."""
        trap, ranks = Trap(0, "forward", 16, "before"), self._of_ranks.choice(self._kind.ranks)
        self._try(Fault(0, plan.STOP_FILE, "forward", "", trap, 0.0, False, 0, ranks), self._current())

    def _plain_start(self) -> None:
        run = self._current()
        ranks = self._of_ranks.choice(self._kind.ranks)
        trainer = self._starts.start(run.folder, None, forked=self._forked, world_size=ranks)
        trainer.wait_until_gone(EVENT_SECONDS)
        trainer.close()
        self._learn(run, trainer)
        self._after_plain_end(run)

    def _after_plain_end(self, run: Run) -> None:
        """Judge a start that ended by itself."""
        state = run.folder.read_state() or {}
        if state.get("status") == "done":
            self._finish(run)
            return
        run.failed_starts += 1
        self.complaints.append(f"{run.folder.path.name}: start {run.starts} ended by itself, state {state}")
        if run.failed_starts >= FAILED_STARTS:
            self._lose(run, "it does not come to its end")

    def _finish(self, run: Run) -> None:
        """Compare a run that is done with the undisturbed one."""
        comparison = (compare if len(self._kind.ranks) == 1 else compare_closely)(self._reference, run.folder)
        self.largest_difference = max(self.largest_difference, comparison.largest_difference)
        self.differing_steps += [(run.folder.path.name, step) for step in comparison.differing_steps]
        if not comparison.same_parameters:
            self._lose(run, "its final parameters differ")
        elif comparison.differing_steps:
            self._keep(run)
        else:
            shutil.rmtree(run.folder.path)
        self._run = None
        self._on_row()

    def _lose(self, run: Run, why: str) -> None:
        self.lost_runs.append(f"{run.folder.path.name}: {why}")
        self._keep(run)
        self._run = None

    def _keep(self, run: Run) -> None:
        """Move a bad run where it survives the harness's disk."""
        if run.folder.path.exists():
            shutil.copytree(run.folder.path, self._folder / "bad" / run.folder.path.name, dirs_exist_ok=True)
            shutil.rmtree(run.folder.path)

    def summary(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        return {
            "faults": len(self.rows),
            "differing_steps": len(self.differing_steps),
            "lost_runs": len(self.lost_runs),
            "failed_rows": sum(not row.ok for row in self.rows),
            "runs": self._run_count,
            "rollbacks_a_run": self.rollbacks,
            "starts": self._starts.count,
            "kind": asdict(self._kind),
            "largest_relative_difference": self.largest_difference,
            "complaints": self.complaints,
            "lost": self.lost_runs,
            "differing": self.differing_steps,
            "rows": [asdict(row) for row in self.rows],
        }
