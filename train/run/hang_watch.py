"""A thread of each rank that notices when training hangs, names the rank that is waited for, and ends such a run.

In normal work it reads nothing: no rank can work without the others for longer than a step, so its own progress shows
that all have some. Once that stands still, rank 0 looks at all heartbeats, and each other node's first rank (rank 1,
where there is one node) at rank 0's.
"""

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import IO

from common.hang_record import append_last_hang
from common.periodic import Periodic
from common.run_folder import RunFolder
from model.ranks import Ranks
from train.run.failure import FailureReporter
from train.run.heartbeat import BEAT_SECONDS, Heartbeat, read_beat
from train.run.suspect import Sighting, Suspect, find_suspect

TICK_SECONDS = 1.0
LOOK_AFTER_SECONDS = 2 * BEAT_SECONDS  # without progress: longer than most steps take
GRACE_SECONDS = 5.0  # for every rank to write down its stacks
LAST_GRACE_SECONDS = 30.0  # a rank that watches nobody leaves so long after those that do
PROCESS_FACTS = ("State", "Threads", "VmRSS", "SigPnd", "ShdPnd", "SigBlk")  # of /proc/PID/status


class HangWatch:
    """Watches from its construction to `close`.

    Args:
        reporter: says who is waited for, and that the run has hung.
        limit_seconds: after so long without progress the process ends, its stacks and the reason written down.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        heartbeat: Heartbeat,
        reporter: FailureReporter,
        *,
        limit_seconds: float,
    ) -> None:
        self._folder = folder
        self._me = ranks.rank
        self._watched = watched_ranks(ranks)
        self._sees_all = ranks.is_first
        self._acts, self._token = heartbeat.acts, heartbeat.token
        self._reporter = reporter
        self._limit = limit_seconds
        self._stacks: IO[str] = open(folder.stacks_file(ranks.rank), "w", encoding="utf-8")  # noqa: SIM115 (see close)
        self._progress, self._since, self._ticked = -1, time.monotonic(), time.monotonic()
        # by rank: a beat's time, when it was first seen, and whether another had been seen before
        self._sightings: dict[int, tuple[float, float, bool]] = {}
        self._looked = 0.0
        self._suspect: Suspect | None = None
        self._hung_in = (0, "")  # step and phase in which somebody became suspect
        self._lock = threading.Lock()  # held while the fields above are read and changed
        self._acts.catch_up = self._catch_up
        self._thread = Periodic("hang watch", TICK_SECONDS, self._tick, at_once=True)

    def close(self) -> None:
        self._thread.stop()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        with contextlib.suppress(OSError):
            if os.path.getsize(self._stacks.name) == 0:
                os.unlink(self._stacks.name)

    def _tick(self) -> None:
        with self._lock:
            self._watch()

    def _catch_up(self) -> None:
        """Note a hang that ended since the last tick. From the training thread at its end: a tick may come too late."""
        with self._lock:
            now = time.monotonic()
            slept = now - self._ticked
            if self._acts.progress != self._progress and (self._suspect is not None or slept > LOOK_AFTER_SECONDS):
                self._note_progress(now, slept)
                self._ticked = now

    def _watch(self) -> None:
        now = time.monotonic()
        slept, self._ticked = now - self._ticked, now
        if self._acts.progress != self._progress or slept > LOOK_AFTER_SECONDS:  # or this process was stopped
            self._note_progress(now, slept)
            return
        stalled = now - self._since
        if stalled < min(LOOK_AFTER_SECONDS, self._acts.patience_seconds / 2):
            return
        if self._watched and now - self._looked >= min(BEAT_SECONDS, self._acts.patience_seconds / 2):
            self._looked = now
            self._judge(now, stalled)
        overdue = stalled - self._limit
        hangs = self._suspect is not None or stalled > self._acts.patience_seconds
        if hangs and overdue > (GRACE_SECONDS if self._sees_all or self._suspect else LAST_GRACE_SECONDS):
            self._end(stalled)

    def _note_progress(self, now: float, slept: float) -> None:
        """Forget what was suspected, and set the timer that writes down all threads' stacks, whatever holds Python."""
        if self._sees_all and slept > LOOK_AFTER_SECONDS:
            self._acts.note_hang(self._acts.step, self._acts.phase, slept)
        elif self._sees_all and self._suspect is not None:
            self._acts.note_hang(*self._hung_in, now - self._since)
        self._progress, self._since = self._acts.progress, now
        self._sightings.clear()
        faulthandler.dump_traceback_later(self._limit, file=self._stacks)
        if self._suspect is not None:
            self._suspect = None
            self._reporter.state.name_suspect("")
            self._reporter.tell("training continues: no rank is waited for any more")

    def _judge(self, now: float, stalled: float) -> None:
        found = find_suspect(
            self._look(now),
            self._me,
            stalled_for=stalled,
            patience=self._acts.patience_seconds,
            whole=self._sees_all,
        )
        if found is None:
            return
        if self._suspect is None or self._suspect.rank != found.rank:
            self._reporter.tell(f"WARNING: training hangs, and waits for: {found}")
            self._hung_in = (self._acts.step, self._acts.phase)
        self._suspect = found
        self._reporter.state.name_suspect(str(found))

    def _look(self, now: float) -> dict[int, Sighting]:
        """All heartbeats of this start that can be read, and since when they are the newest."""
        found = {}
        for rank in {*self._watched, self._me}:
            beat = read_beat(self._folder, rank)
            if beat is None or "acts" not in beat or beat.get("token") != self._token:  # an earlier start's
                continue
            seen, since, is_newer = self._sightings.get(rank, (beat["time"], now, False))
            if seen != beat["time"]:
                since, is_newer = now, True
            self._sightings[rank] = (beat["time"], since, is_newer)
            found[rank] = Sighting(beat, now - since, is_newer)
        return found

    def _end(self, stalled: float) -> None:
        """Write down who was waited for, and leave this process at once: nothing else would end it."""
        if self._sees_all or self._suspect is not None:
            why = f"hung for {stalled:.0f} s: {self._suspect or 'no rank is behind: network or disk'}"
            if self._suspect is not None and self._suspect.rank is not None:
                self._add_process_facts(self._suspect.rank)
            self._reporter.report_hang(why, self._suspect.node if self._suspect else "")
            append_last_hang(self._folder, self._acts.step, self._acts.phase, stalled)
        with contextlib.suppress(OSError, ValueError):
            self._stacks.flush()
        os._exit(1)

    def _add_process_facts(self, rank: int) -> None:
        """What the system knows of a rank's process, behind its stacks, which a stopped process can't write."""
        beat = read_beat(self._folder, rank) or {}
        lines = [f"rank {rank}, last heartbeat: {beat}\n"]
        if beat.get("host") == os.uname().nodename:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{beat['pid']}/status").read_text(encoding="utf-8")
                lines += [f"{line}\n" for line in status.splitlines() if line.startswith(PROCESS_FACTS)]
        with contextlib.suppress(OSError), open(self._folder.stacks_file(rank), "a", encoding="utf-8") as stacks:
            stacks.writelines(lines)


def watched_ranks(ranks: Ranks) -> list[int]:
    """Whom a rank watches: the first one all, each other node's first one (with one node: rank 1) the first one."""
    if ranks.is_first:
        return list(range(ranks.world_size))
    one_node = ranks.local_world_size == ranks.world_size
    return [0] if ranks.local_rank == 0 or (one_node and ranks.rank == 1) else []
