"""A small file of each rank with its step, phase and memory: what is left of a rank that was killed."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NotRequired

from typing_extensions import TypedDict

from common.json_file import BadJson, Count, Finite, as_shape, keep_others
from common.periodic import Periodic
from common.processes import ProcessIdentity, node_name, resident_bytes
from common.rewritten_file import RewrittenFile, read_record
from common.run_folder import RunFolder
from train.run.acts import Acts

BEAT_SECONDS = 5.0
SILENT_SECONDS = 3 * BEAT_SECONDS  # without a beat a process is frozen, or stuck in the kernel


class Heartbeat:
    """Writes this rank's file every few seconds from a thread of its own.

    Attributes:
        acts: what the rank does, which the file says.
        token: of the run's lock, which tells beats of this start from an earlier one's.
    """

    def __init__(self, folder: RunFolder, rank: int, acts: Acts, *, token: str = "") -> None:
        self.acts = acts
        self.token = token
        self._rank = rank
        self._identity = asdict(ProcessIdentity.of_this_process()) | {"node": node_name()}
        path = folder.rank_file(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = RewrittenFile(path)
        self._seen: int | None = None  # progress at the last beat
        self._progressed = 0.0  # when that was another for the last time: a beat by itself is no progress
        self._beat()
        self._thread = Periodic("heartbeat", BEAT_SECONDS, self._beat)

    def close(self) -> None:
        self._thread.stop()
        self._file.close()

    def _beat(self) -> None:
        now, acts, progress = time.time(), self.acts, self.acts.progress
        if progress != self._seen:
            self._seen, self._progressed = progress, now
        record = {"rank": self._rank, "step": acts.step, "phase": acts.phase, "act": acts.act, "acts": acts.count}
        record |= {"token": self.token, "rss_gib": resident_bytes() / 2**30}
        with contextlib.suppress(OSError):  # a full disk or a server that doesn't answer: the next one may succeed
            self._file.write(record | self._identity | {"progressed": self._progressed, "time": now})
            self._file.sync()  # for readers on other machines


@keep_others
class Beat(TypedDict):
    """What a rank's file holds."""

    rank: Count
    step: Count
    phase: str
    act: NotRequired[str]  # older versions had none
    acts: NotRequired[Count]
    token: NotRequired[str]
    node: NotRequired[str]
    rss_gib: Finite
    progressed: Finite
    time: Finite


def read_beat(folder: RunFolder, rank: int) -> dict[str, Any] | None:
    """A rank's last heartbeat; None where it has none that can be read."""
    record = read_record(folder.rank_file(rank))
    try:
        return None if record is None else {**as_shape(record, Beat)}
    except BadJson:
        return None


def _identity(beat: dict[str, Any]) -> ProcessIdentity | None:
    try:
        return ProcessIdentity.from_record(beat)
    except KeyError:
        return None


def vanished_ranks(folder: RunFolder, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """The last heartbeats of those ranks whose processes are certainly gone, as far as this machine can see."""
    beats = [beat for rank in ranks if (beat := read_beat(folder, rank)) is not None]
    return [beat for beat in beats if (process := _identity(beat)) is not None and process.is_gone()]


def silent_ranks(folder: RunFolder, ranks: Iterable[int], me: int) -> list[dict[str, Any]]:
    """The last heartbeats of ranks that are alive on this machine and have not beaten while this one, `me`, has."""
    mine = read_beat(folder, me)
    beats = [beat for rank in ranks if (beat := read_beat(folder, rank)) is not None]
    found = [beat for beat in beats if mine and mine["time"] - beat["time"] > SILENT_SECONDS]
    return [
        beat
        for beat in found
        if (process := _identity(beat)) is not None and process.is_here() and not process.is_gone()
    ]
