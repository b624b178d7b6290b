"""Inflicting one fault on a running trainer, and saying whether the trainer met it as it should."""

import contextlib
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.metrics_file import read_json_lines
from common.run_folder import RunFolder
from tests.chaos import disk, plan
from tests.chaos.marks import marked, send
from tests.chaos.phases import BEFORE_MEETING, Trap
from tests.chaos.plan import Fault
from tests.chaos.trainer import Trainer
from tests.chaos.verdict import last_step, newest_whole
from train.launching.rank_watch import LOOK_SECONDS, STILL_SECONDS

GONE_SECONDS = 60.0  # a dead rank takes everything with it within this time
NO_RECORD = "metrics.jsonl can't be written"
GAVE_UP = "saves in a row have failed"
REFUSED_SECONDS = 120.0
WANDB_SECONDS = 120.0
STEPS_UNTIL_STOPPED = 3  # until ranks have agreed on a signal
STEPS_WITHOUT_LAUNCHER = 12  # of half a second, until ranks have noticed that it is gone
HANG_SECONDS, HANG_LIMIT_SECONDS = 5.0, 20.0  # of runs in which a rank is frozen or slowed
HUNG_SECONDS = 60.0  # after that torchrun has asked a frozen rank to leave, and killed it
SLOWED_SECONDS = 3.0  # how long a rank is slowed
STEPS_BESIDE_A_FAULT = 3  # that a fault which concerns no rank must leave the run free to do


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    seconds_to_detect: from the fault until all processes were gone (or the second trainer was refused).
    complaint: what was not as it should be; "" for nothing. nothing_lost: the trainer stopped cleanly, or never began.
    failed_saves: for want of room, where the run may go on without them.
    """

    seconds_to_detect: float
    outcome: str
    complaint: str = ""
    nothing_lost: bool = False
    failed_saves: int = 0


class Victims:
    """A running trainer and its run, as faults see them."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        second: Callable[[int], Trainer],
        *,
        first_step: int,
        last_step: int,
    ) -> None:
        """Args: first_step: where the run started, which may be a branch."""
        self.trainer = trainer
        self.first_step = first_step
        self.run = run
        self.start_second = second
        self.last_step = last_step

    def recorded_step(self) -> int:
        return last_step(read_json_lines(self.run.metrics)) or self.first_step

    def saved_step(self) -> int:
        return max(newest_whole(self.run.checkpoints), self.first_step)

    def reached_step(self) -> int:
        """The last step of the newest start, or where it began, which may be behind what an earlier one recorded."""
        records = read_json_lines(self.run.metrics)
        starts = [number for number, record in enumerate(records) if record.get("kind") == "start"]
        if not starts:
            return self.first_step
        return last_step(records[starts[-1] :]) or int(records[starts[-1]]["step"])

    def wait_for_steps(self, count: int, seconds: float) -> bool:
        """Wait until so many more steps are recorded, or the run ends; False if neither happens in time."""
        wanted = self.recorded_step() + count
        deadline = time.monotonic() + seconds
        while self.recorded_step() < wanted and self.trainer.status is None:
            if time.monotonic() > deadline:
                return False
            self.trainer.next_event(0.05)
        return True

    def stop(self) -> Outcome:
        """Stop the run by a signal to one rank, and see that it does so cleanly."""
        return _asked_to_stop(self, lambda: send(self.trainer.pids[0], signal.SIGTERM), may_be_unheard=False)


def inflict(fault: Fault, victims: Victims) -> Outcome | None:
    """Do it, the moment being now, and wait for what comes of it; None if the run was done before."""
    if fault.delay_seconds:
        time.sleep(fault.delay_seconds)
    if fault.kind == plan.KILL:
        return _kill(fault, victims)
    if fault.kind == plan.FREEZE:
        return _freeze(fault, victims)
    if fault.kind == plan.SLOW:
        return _slow(fault, victims)
    if fault.kind in plan.SIGNALS:
        number = getattr(signal, fault.kind)
        return _asked_to_stop(
            victims,
            lambda: [send(pid, number) for pid in _targets(fault, victims.trainer)],
            may_be_unheard=fault.phase == "start" and (fault.target != plan.LAUNCHER or fault.ranks == 1),
        )
    if fault.kind == plan.STOP_FILE:
        outcome = _asked_to_stop(victims, victims.run.stop_file.touch, may_be_unheard=False)
        victims.run.stop_file.unlink(missing_ok=True)  # of a run that ended before it looked
        return outcome
    if fault.kind == plan.DISK_FULL:
        return _fill_disk(fault, victims)
    if fault.kind == plan.SECOND_TRAINER:
        return _start_second(fault, victims)
    if fault.kind in (plan.WANDB_SILENT, plan.WANDB_STOPPED):
        return _hang_wandb(fault, victims)
    raise AssertionError(fault.kind)


def _targets(fault: Fault, trainer: Trainer) -> list[int]:
    assert fault.trap is not None
    if fault.target == plan.ONE_RANK:
        return [trainer.pids[fault.trap.rank]]
    if fault.target == plan.ALL_RANKS:
        return list(trainer.pids.values())
    if fault.target == plan.LAUNCHER:
        # train/launch.py, or torchrun below it; only the first is to be asked to stop
        return [trainer.agent() if fault.kind == plan.KILL and fault.seed % 2 else trainer.pid]
    return list(marked(trainer.mark))


def _kill(fault: Fault, victims: Victims) -> Outcome | None:
    trainer, before = victims.trainer, victims.recorded_step()
    started = time.monotonic()
    trainer.kill(_targets(fault, trainer))
    trainer.go_on()
    alive = trainer.wait_until_gone(GONE_SECONDS)
    seconds = time.monotonic() - started
    complaint = _orphans(alive)
    if trainer.status == 0 and (victims.run.read_state() or {}).get("status") == "done":
        return None
    if trainer.status == 0:
        complaint = complaint or "the launcher's exit status was 0"
    after = victims.recorded_step() - before
    if fault.target == plan.LAUNCHER and after > STEPS_WITHOUT_LAUNCHER:
        complaint = complaint or f"the ranks did {after} steps after their launcher was gone"
    return Outcome(seconds, f"all gone, status {trainer.status}", complaint)


def _freeze(fault: Fault, victims: Victims) -> Outcome | None:
    """Stop a rank's process: it must be named, and end the run at the limit, as one that can be resumed."""
    assert fault.trap is not None
    trainer, rank = victims.trainer, fault.trap.rank
    started = time.monotonic()
    send(trainer.pids[rank], signal.SIGSTOP)
    trainer.go_on()
    alive = trainer.wait_until_gone(launcher_patience(fault.trap) + HANG_LIMIT_SECONDS + HUNG_SECONDS)
    seconds = time.monotonic() - started
    state = victims.run.read_state() or {}
    if not alive and trainer.status == 0 and state.get("status") == "done":
        return None
    complaint = _orphans(alive) or why_not_hung(rank, trainer.said(), state, watched_by_peers=has_met(fault.trap))
    if trainer.status == 0:
        complaint = complaint or "the launcher's exit status was 0"
    return Outcome(seconds, f"named and ended, status {trainer.status}", complaint)


def has_met(trap: Trap) -> bool:
    """Whether a trapped rank has met the others, which watch each other then, and not parted from them."""
    return trap.phase != "end" and (trap.phase != "start" or trap.entry > BEFORE_MEETING)


def launcher_patience(trap: Trap) -> float:
    """Seconds until the launcher looks at what no other rank does."""
    return 0.0 if has_met(trap) else STILL_SECONDS + LOOK_SECONDS


def why_not_hung(rank: int, said: str, state: Mapping[str, Any], *, watched_by_peers: bool) -> str:
    """What is wrong with the end of a run whose `rank` was frozen; "" for nothing.

    Args:
        said: all that was on the terminal. state: the run's.
        watched_by_peers: the rank had met the others, so that `state` must show it, too.
    """
    if f"training hangs, and waits for: rank {rank} on " not in said:
        return f"rank {rank} was not named"
    if not re.search(f"failed: hung for [0-9]+ s: rank {rank} on ", said):
        return f"the run was not ended for rank {rank}"
    found = (state.get("status"), state.get("failure"))
    if watched_by_peers and (found != ("failed", "hung") or f": rank {rank} on " not in state["reason"]):
        return f"state is {found[0]}, {found[1]} ({state.get('reason')})"
    return ""


def _slow(fault: Fault, victims: Victims) -> Outcome:
    """Let a rank run only now and then for a while: it is no hang, and nothing is lost."""
    assert fault.trap is not None
    trainer, chance = victims.trainer, random.Random(fault.seed)
    pid, started = trainer.pids[fault.trap.rank], time.monotonic()
    trainer.go_on()
    while trainer.status is None and time.monotonic() < started + SLOWED_SECONDS:
        send(pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.05, 0.5))
        send(pid, signal.SIGCONT)
        trainer.next_event(chance.uniform(0.02, 0.1))
    stopped = victims.stop()
    if "training hangs" in trainer.said():
        return replace(stopped, complaint=stopped.complaint or "a slow rank was taken for one that hangs")
    return stopped


def _asked_to_stop(victims: Victims, ask: Callable[[], object], *, may_be_unheard: bool) -> Outcome:
    """Ask, and expect a clean stop: everything saved, `state` saying so, no process left."""
    trainer, before = victims.trainer, victims.recorded_step()
    started = time.monotonic()
    ask()
    trainer.go_on()
    alive = trainer.wait_until_gone(GONE_SECONDS)
    seconds = time.monotonic() - started
    if alive:
        return Outcome(seconds, "", _orphans(alive))
    state = victims.run.read_state() or {}
    saved = victims.saved_step()
    recorded, reached = victims.recorded_step(), victims.reached_step()
    if recorded - before > STEPS_UNTIL_STOPPED and may_be_unheard and state.get("status") == "done":
        # torchrun's workers ignore signals until they listen; those to train/launch.py are kept for them
        return Outcome(seconds, "came before the rank listened, and the run went on to its end", nothing_lost=True)
    if recorded - before > STEPS_UNTIL_STOPPED:
        return Outcome(seconds, "", f"{recorded - before} steps were done after the request to stop")
    if state.get("status") in ("preempted", "done") and saved == reached == state["step"]:
        return Outcome(seconds, f"{state['status']} ({state['reason']}), status {trainer.status}", nothing_lost=True)
    if may_be_unheard:
        return Outcome(seconds, f"ended before it listened, status {trainer.status}")
    return Outcome(
        seconds,
        "",
        f"no clean stop: state {state.get('status')} ({state.get('reason')}), {reached} steps, {saved} saved",
    )


def _orphans(alive: dict[int, str]) -> str:
    return f"alive after {GONE_SECONDS:.0f} s: {'; '.join(sorted(alive.values()))}"[:300] if alive else ""


def _fill_disk(fault: Fault, victims: Victims) -> Outcome | None:
    """Leave less than a checkpoint's size free, until the trainer has said so or is gone."""
    trainer = victims.trainer
    # a record that waits for room ends no run, whatever the policy for saves
    telling = ("could not be saved", NO_RECORD) if goes_on_without_room(fault) else ("could not be saved",)
    sizes = [
        sum(file.stat().st_size for file in folder.iterdir())
        for folder in victims.run.checkpoints.glob("step-????????")
    ]
    free = random.Random(fault.seed).randrange(max(sizes, default=400_000))
    started = time.monotonic()
    with disk.filled(victims.run.path.parent, free):
        trainer.go_on()
        told_seconds = None
        while trainer.status is None and told_seconds is None and time.monotonic() < started + GONE_SECONDS:
            trainer.next_event(0.05)
            if any(words in trainer.said() for words in telling):
                told_seconds = time.monotonic() - started
    if told_seconds is None and trainer.status == 0:
        return None  # there was room for all that was left to write
    said = trainer.said()
    named = str(victims.run.path) in said and "No space left" in said
    complaint = "" if named else "nothing said which path has no space left"
    seconds = told_seconds or time.monotonic() - started
    # the last save must succeed; its step's record may have waited in memory, and gone
    at_the_end = victims.recorded_step() == victims.last_step or f"step {victims.last_step} could not be" in said
    if not goes_on_without_room(fault) or at_the_end:
        alive = trainer.wait_until_gone(GONE_SECONDS)
        return Outcome(seconds, f"stopped, status {trainer.status}", complaint or _orphans(alive))
    stopped = victims.stop()  # with room again it must save
    failed = trainer.said().count("could not be saved")
    if GAVE_UP in trainer.said():  # the disk was full for too many saves of so small a model
        return Outcome(seconds, f"stopped, status {trainer.status}", complaint, failed_saves=failed)
    if NO_RECORD in trainer.said() and not marked(trainer.mark):
        words = f"stopped without room for its record, status {trainer.status}"
        return Outcome(seconds, words, complaint, failed_saves=failed)
    complaint = complaint or stopped.complaint
    return Outcome(seconds, f"went on; {stopped.outcome}", complaint, stopped.nothing_lost, failed_saves=failed)


def goes_on_without_room(fault: Fault) -> bool:
    """Which of the two policies for a save that fails the run has been given."""
    return fault.seed % 2 == 1


def _start_second(fault: Fault, victims: Victims) -> Outcome:
    """The same folder again, with one rank or two: refused in one line, and the first does not notice."""
    first = victims.trainer
    started = time.monotonic()
    second = victims.start_second(1 + fault.seed % 2)
    alive = second.wait_until_gone(REFUSED_SECONDS)
    seconds = time.monotonic() - started
    errors = [line for line in second.said().splitlines() if line.startswith("error:")]
    second.close()
    first.go_on()
    complaint = ""
    if alive or second.status != 2 or len(errors) != 1:
        complaint = f"the second trainer was not refused: status {second.status}, {errors}"
    elif not victims.wait_for_steps(STEPS_BESIDE_A_FAULT, GONE_SECONDS):
        complaint = "the first trainer does not go on"
    stopped = victims.stop()
    return replace(stopped, seconds_to_detect=seconds, complaint=complaint or stopped.complaint)


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that lets clients connect and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _wandb_service(victims: Victims, *, writing: bool) -> int | None:
    """wandb's service process, as soon as it is there, or as it has begun to write; None if that does not come."""
    deadline = time.monotonic() + WANDB_SECONDS
    while time.monotonic() < deadline:
        victims.trainer.next_event(0.1)
        services = [pid for pid, command in marked(victims.trainer.mark).items() if "wandb-core" in command]
        if services and (not writing or any(victims.run.path.glob("wandb/*run-*/*.wandb"))):
            return services[0]
    return None


def _hang_wandb(fault: Fault, victims: Victims) -> Outcome:
    """Steps go on beside a mirror that hangs, and the end waits for it no longer than it was told to."""
    trainer = victims.trainer
    if fault.kind == plan.WANDB_STOPPED:
        service = _wandb_service(victims, writing=bool(fault.seed % 2))
        if service is None:
            trainer.go_on()
            return Outcome(0.0, "", f"wandb's service did not start within {WANDB_SECONDS:.0f} s")
        send(service, signal.SIGSTOP)
    trainer.go_on()
    going = victims.wait_for_steps(STEPS_BESIDE_A_FAULT, GONE_SECONDS)
    stopped = victims.stop()
    complaint = stopped.complaint
    if not going:
        complaint = "no step went on beside wandb"
    elif "wandb is not mirroring this run" not in trainer.said():
        complaint = complaint or "nothing said that wandb hangs"
    return replace(stopped, complaint=complaint)
