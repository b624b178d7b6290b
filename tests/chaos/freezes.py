"""Freeze any rank in every phase: it must be named within a minute, and end the run at the limit.

    python tests/chaos/freezes.py --freezes 50 --seed 1 --json freezes.json

Each run of two gloo ranks under the real launcher gets one SIGSTOP, to one rank. After that the same command resumes
the run, which is compared with an undisturbed one to the bit. `run.hang_seconds` is left as it is; the limit, 600 s by
default, is shortened. A frozen process costs nothing: several runs are under way at a time. With a report that is there
already, only what it lacks is done. Exit status 1 if any rank was not named within 60 s or not ended, or a run differs.
Linux only.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import write_json_whole
from common.run_folder import RunFolder
from tests.chaos import preloaded
from tests.chaos.faults import has_met, why_not_hung
from tests.chaos.marks import OwnMark, send
from tests.chaos.phases import (
    BEFORE_CONFIGURATION,
    ENTRIES,
    FIRST_RANK_ONLY,
    MARK_VARIABLE,
    MORE_ENTRIES,
    NO_MARK,
    Moment,
    Trap,
)
from tests.chaos.starts import EVENT_SECONDS, Starts
from tests.chaos.trainer import Trainer
from tests.chaos.verdict import compare
from train.launching.rank_watch import LIMIT_SECONDS

NAMED_SECONDS = 60.0
LOOK_SECONDS = 0.5  # from one look at a run to the next
AFTER_SECONDS = 30.0  # beyond the limit, by which a frozen rank has ended the run
GONE_SECONDS = 60.0  # after that, until torchrun has killed the frozen process


@dataclass
class Freeze:
    """One frozen rank: a line of the report. Seconds are since its SIGSTOP; None where it did not come to that."""

    number: int
    rank: int
    phase: str
    entry: int
    moment: str
    step: int = 0
    named_seconds: float | None = None
    named: str = ""
    ended_seconds: float | None = None
    gone_seconds: float | None = None
    status: int | None = None
    reason: str = ""
    resumed_from: int = 0
    differing_steps: int = 0
    complaint: str = ""

    @property
    def trap(self) -> Trap:
        moment: Moment = "after" if self.moment == "after" else "before"
        return Trap(self.rank, self.phase, self.entry, moment)

    def limit_seconds(self, configured: float) -> float:
        """After which the run must end."""
        early = self.phase == "start" and self.entry <= BEFORE_CONFIGURATION
        return LIMIT_SECONDS if early else configured

    def describe(self) -> str:
        what = f"named after {self.named_seconds} s, ended after {self.ended_seconds} s"
        what = f"FAILED: {self.complaint}" if self.complaint else what
        return f"{self.number}: rank {self.rank}, {self.moment} {self.phase} (step {self.step}): {what}"


def draw(count: int, seed: int) -> list[Freeze]:
    """Every phase and rank equally often, and what is left over in the first moments of a start."""
    chance = random.Random(f"freezes {seed}")
    entries = ENTRIES | MORE_ENTRIES
    places = [(phase, rank) for phase in entries for rank in ((0, 0) if phase in FIRST_RANK_ONLY else (0, 1))]
    freezes = []
    for number in range(1, count + 1):
        phase, rank = places[(number - 1) % len(places)]
        entry = chance.randint(1 if phase != "start" else BEFORE_CONFIGURATION + 1, entries[phase])
        if number > count // len(places) * len(places):
            phase, rank, entry = "start", number % 2, BEFORE_CONFIGURATION
        freezes.append(Freeze(number, rank, phase, entry, chance.choice(("before", "after"))))
    freezes.sort(key=lambda freeze: freeze.entry > BEFORE_CONFIGURATION or freeze.phase != "start")  # the longest first
    return freezes


class Course:
    """The course of one freeze, from its start to the end of the resumed run."""

    def __init__(self, freeze: Freeze, starts: Starts, run: RunFolder, forked: OwnMark, limit: float) -> None:
        self._freeze = freeze
        self._starts = starts
        self._run = run
        self._forked = forked
        self._option = f"--run.hang_limit_seconds={limit:g}"
        self._limit, self._configured = freeze.limit_seconds(limit), limit

    def proceed(self, reference: RunFolder) -> Iterator[None]:
        """Do it; yields while there is something to wait for."""
        freeze = self._freeze
        # a fork that has not read its configuration does not look like a rank to the launcher
        forked = self._forked if self._limit == self._configured else None
        trainer = self._starts.start(self._run, freeze.trap, forked=forked, more=(self._option,))
        try:
            yield from self._until_reached(trainer)
            if not freeze.complaint:
                yield from self._frozen(trainer)
        finally:
            trainer.close()
        again = self._starts.start(self._run, None, forked=self._forked, more=(self._option,))
        try:
            until = time.monotonic() + EVENT_SECONDS
            while again.status is None and time.monotonic() < until:
                again.next_event(0.01)
                yield
        finally:
            again.close()
        found = compare(reference, self._run)
        freeze.differing_steps = len(found.differing_steps)
        if resumed := re.search(r"resuming after step (\d+)", again.said()):
            freeze.resumed_from = int(resumed[1])
        if found.differing_steps or not found.same_parameters:
            freeze.complaint = freeze.complaint or f"the resumed run differs: steps {found.differing_steps}"

    def _until_reached(self, trainer: Trainer) -> Iterator[None]:
        until = time.monotonic() + EVENT_SECONDS
        while time.monotonic() < until:
            event = trainer.next_event(0.01)
            if event is not None and event.kind == "reached":
                self._freeze.step = event.step
                return
            if event is not None and event.kind == "ended":
                break
            yield
        self._freeze.complaint = "the moment never came"

    def _frozen(self, trainer: Trainer) -> Iterator[None]:
        freeze, started = self._freeze, time.monotonic()
        send(trainer.pids[freeze.rank], signal.SIGSTOP)
        trainer.go_on()
        until = started + self._limit + AFTER_SECONDS + GONE_SECONDS
        while trainer.status is None and time.monotonic() < until:
            trainer.next_event(0.01)
            said, seconds = trainer.said(), round(time.monotonic() - started, 1)
            if freeze.named_seconds is None and (line := re.search(r"training hangs, and waits for: (.*)", said)):
                freeze.named_seconds, freeze.named = seconds, line[1]
            if freeze.ended_seconds is None and "failed: hung for" in said:
                freeze.ended_seconds = seconds
            yield
        alive = trainer.wait_until_gone(1.0)
        freeze.gone_seconds, freeze.status = round(time.monotonic() - started, 1), trainer.status
        state = self._run.read_state() or {}
        freeze.reason = str(state.get("reason", ""))
        freeze.complaint = self._judge(trainer.said(), state, alive)

    def _judge(self, said: str, state: dict[str, Any], alive: dict[int, str]) -> str:
        freeze = self._freeze
        if alive:
            return f"left alive: {sorted(alive.values())}"
        if why := why_not_hung(freeze.rank, said, state, watched_by_peers=has_met(freeze.trap)):
            return why
        if freeze.named_seconds is None or freeze.named_seconds > NAMED_SECONDS:
            return f"named after {freeze.named_seconds} s"
        if freeze.ended_seconds is None or freeze.ended_seconds > self._limit + AFTER_SECONDS:
            return f"ended after {freeze.ended_seconds} s, at a limit of {self._limit:g} s"
        return "the launcher's exit status was 0" if freeze.status == 0 else ""


def main() -> int:
    arguments = _arguments()
    if os.environ.get(MARK_VARIABLE) != NO_MARK:  # forks write their mark over this one: it must be there from exec on
        environment = {**os.environ, MARK_VARIABLE: NO_MARK, "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    preloaded.preload()
    folder = Path(tempfile.mkdtemp(prefix="freezes-"))
    starts, forked = Starts(folder, folder / "runs"), OwnMark()
    done = _read(arguments.json)
    have = {freeze.number for freeze in done}
    waiting = [freeze for freeze in draw(arguments.freezes, arguments.seed) if freeze.number not in have]
    reference = starts.undisturbed(forked)
    started, under_way = time.monotonic(), list[tuple[Freeze, Iterator[None]]]()
    while waiting or under_way:
        while waiting and len(under_way) < arguments.at_once:
            freeze = waiting.pop(0)
            run = RunFolder(folder / "runs" / f"run-{freeze.number:02d}")
            course = Course(freeze, starts, run, forked, arguments.limit_seconds)
            under_way.append((freeze, course.proceed(reference)))
        for freeze, steps in list(under_way):
            try:
                next(steps)
            except StopIteration:
                under_way.remove((freeze, steps))
                done.append(freeze)
                print(f"[{len(done)}/{arguments.freezes}] {freeze.describe()}", flush=True)
                _write(arguments, done, time.monotonic() - started)
        time.sleep(LOOK_SECONDS / 10)
    return _finish(done)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--freezes", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn (default 1)")
    parser.add_argument("--at-once", type=int, default=8, help="runs under way at a time (default 8)")
    parser.add_argument("--limit-seconds", type=float, default=70.0, help="run.hang_limit_seconds (default 70)")
    parser.add_argument("--json", type=Path, help="the report, rewritten after each; what it has is not done again")
    return parser.parse_args()


def _read(report: Path | None) -> list[Freeze]:
    if report is None or not report.exists():
        return []
    return [Freeze(**row) for row in json.loads(report.read_text(encoding="utf-8"))["rows"]]


def _write(arguments: argparse.Namespace, done: list[Freeze], seconds: float) -> None:
    if arguments.json is not None:
        facts = {"seed": arguments.seed, "limit_seconds": arguments.limit_seconds, "seconds": round(seconds, 1)}
        write_json_whole(arguments.json, {**summary(done), **facts, "rows": [asdict(freeze) for freeze in done]})


def summary(done: list[Freeze]) -> dict[str, Any]:
    """What became of all."""
    named = sorted(freeze.named_seconds for freeze in done if freeze.named_seconds is not None)
    return {
        "freezes": len(done),
        "named": len(named),
        "named_within_a_minute": sum(seconds <= NAMED_SECONDS for seconds in named),
        "named_seconds_median": named[len(named) // 2] if named else None,
        "named_seconds_most": named[-1] if named else None,
        "ended": sum(freeze.ended_seconds is not None for freeze in done),
        "differing_runs": sum(freeze.differing_steps > 0 for freeze in done),
        "failed": sum(bool(freeze.complaint) for freeze in done),
    }


def _finish(done: list[Freeze]) -> int:
    found = summary(done)
    for freeze in done:
        if freeze.complaint:
            print(f"FAILED {freeze.describe()}")
    print(
        f"{found['freezes']} freezes: {found['named_within_a_minute']} named within {NAMED_SECONDS:.0f} s (median "
        f"{found['named_seconds_median']} s, at most {found['named_seconds_most']} s), {found['ended']} ended, "
        f"{found['differing_runs']} resumed runs differ, {found['failed']} not as promised"
    )
    return int(found["failed"] > 0)


if __name__ == "__main__":
    exit_on_user_error(main)
