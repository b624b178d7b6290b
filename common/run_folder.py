"""The folder of a run, and its `state`: what Slurm, status and reports read to know how far a run is."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from common.environment import whole_number
from common.errors import UserError
from common.json_file import BadJson, Count, keep_others, read_json
from common.os_errors import refusal
from common.paths import PROJECT, check_path, expand_path
from common.publish import write_json_whole
from common.regular_file import what_stands_at

Status = Literal["running", "preempted", "done", "failed"]
Stop = Literal["signal", "file", "deadline", "launcher"]
Failure = Literal["exception", "storage", "lost_rank", "lost_gpu", "hung"]


def restart_count() -> int:
    """How often Slurm has started this job again; 0 without Slurm. Raises UserError where the variable is no count."""
    return whole_number("SLURM_RESTART_COUNT", 0)


@keep_others
class State(TypedDict, total=False):
    """The keys of `state` that are read; `write_state` describes them."""

    status: str
    reason: str
    stop: str
    failure: str
    culprit_node: str
    trouble: str
    suspect: str
    step: Count
    tokens: Count
    started_step: Count
    world_size: Count
    job_id: str | None
    restart_count: Count
    host: str
    pid: Count
    time: str


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of one run."""

    path: Path

    @classmethod
    def find(cls, root: str | Path, name: str) -> "RunFolder":
        """The run `name` below a root as a configuration names it; a new one's folder need not be there yet.

        A relative root is looked for in the working directory, and then in the project: a run that was started there is
        found from any folder. Where neither has the run it is a new one, in the working directory.

        Raises UserError where the root can't be expanded, or the folder's name is not UTF-8 text: no checkpoint in it
        could be opened again.
        """
        here = check_path(expand_path(root) / name)
        there = PROJECT / here
        try:
            found = Path.cwd() / here if here.exists() or not there.exists() else there
        except OSError as error:  # a root that this user may not enter
            raise UserError(refusal("read", error, here, otherwise="give another --run.root")) from None
        try:
            os.fsencode(found).decode()  # its bytes, which the locale may take for no text
        except UnicodeDecodeError:
            raise UserError(f"{found} is not UTF-8 text: give a --run.root and --run.name that are") from None
        return cls(found)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def state(self) -> Path:
        return self.path / "state"

    def published_names(self) -> list[str]:
        """Names of the files that only the lock's owner replaces as a whole."""
        return [path.name for path in (self.config, self.provenance, self.state)]

    @property
    def stop_file(self) -> Path:
        """Creating it requests that the run save and stop at the next step."""
        return self.path / "STOP"

    @property
    def lock(self) -> Path:
        """Names the process that owns the run at the moment."""
        return self.path / "lock"

    def rank_file(self, rank: int) -> Path:
        """The heartbeat of one rank: where it is, and how much memory it holds."""
        return self.path / "ranks" / f"rank-{rank:05d}.json"

    def stacks_file(self, rank: int) -> Path:
        """Where each thread of a rank stood when the rank hung."""
        return self.path / "ranks" / f"rank-{rank:05d}.stacks"

    def bad_batch(self, step: int) -> Path:
        """What was found in the batch of a step that was not learned from."""
        return self.path / "bad-batches" / f"step-{step:08d}.json"

    def read_state(self) -> dict[str, Any] | None:
        """The `state`, or None for a run that has none yet.

        Raises UserError if it can't be read, or is damaged.
        """
        try:
            return {**read_json(self.state, State)}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(refusal("read", error, self.state, otherwise="move it away and start again")) from None
        except BadJson as error:
            raise UserError(f"{self.state} is damaged ({error}): move it away and start again") from None

    def refuse_what_is_no_file(self) -> None:
        """Check what a trainer writes to, before anything is written.

        Raises UserError naming what isn't a file where one is written (a pipe would be waited for without
        end), or isn't a folder where one is.
        """
        ranks = self.rank_file(0).parent
        files = [self.config, self.provenance, self.metrics, self.log, self.samples, self.state]
        for paths, wanted, free in (
            ([self.lock], "a file", ("", "a file")),
            (files, "a file", ("", "a file", "a link to nothing")),  # made where the link leads
            ([self.checkpoints, ranks], "a folder", ("", "a folder")),
            (sorted(ranks.glob("rank-*.json")), "a file", ("", "a file")),
        ):
            for path in paths:
                if (what := what_stands_at(path)) not in free:
                    raise UserError(f"{path} is {what}, but the run needs {wanted} there: move it away")

    def write_state(
        self,
        status: Status,
        *,
        reason: str,
        step: int,
        tokens: int,
        started_step: int = 0,
        world_size: int = 1,
        stop: Stop | None = None,
        failure: Failure | None = None,
        culprit_node: str = "",
        trouble: str = "",
        suspect: str = "",
        wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Replace the `state` in one step; return whether it was.

        Args:
            reason: why the run has this status, in a few words.
            step: optimizer steps done. tokens: training tokens consumed.
            started_step: the step at which this launch of the trainer started; a `step` beyond it is progress.
            world_size: number of ranks.
            stop: what requested that a `preempted` run stop.
            failure: whether a `failed` run met an error of its own (the same command meets it again), could not write
                what it has to, lost a process, machine or GPU, or hung (the same command may resume in these cases).
            culprit_node: the machine of the rank that made it fail, where that is known (`processes.node_name`).
            trouble: what a `running` run currently can't write.
            suspect: the rank that a `running` run waits for.
            wanted: asked at the last moment; False leaves the `state` as it is.
        """
        state = {
            "status": status,
            "reason": reason,
            **({"stop": stop} if stop else {}),
            **({"failure": failure} if failure else {}),
            **({"culprit_node": culprit_node} if culprit_node else {}),
            **({"trouble": trouble} if trouble else {}),
            **({"suspect": suspect} if suspect else {}),
            "step": step,
            "tokens": tokens,
            "started_step": started_step,
            "world_size": world_size,
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "restart_count": restart_count(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        return write_json_whole(self.state, state, wanted)

    def name_suspect(self, suspect: str) -> None:
        """Write into a `running` run's `state` whom it waits for, and leave the rest as it is; "": for nobody.

        Raises OSError, and UserError where there is none that can be read.
        """
        state = self.read_state() or {}
        if state.get("status") == "running" and state.get("suspect", "") != suspect:
            others = {key: value for key, value in state.items() if key != "suspect"}
            write_json_whole(self.state, others | ({"suspect": suspect} if suspect else {}))

    def note_hang(self, reason: str, culprit_node: str) -> None:
        """Write into a `running` run's `state` that it has failed by hanging, and where; leave the rest as it is.

        Raises OSError, and UserError where there is none that can be read.
        """
        state = self.read_state() or {}
        if state.pop("status", None) == "running":
            state.pop("suspect", None)
            found = {"reason": reason, "failure": "hung", "culprit_node": culprit_node}
            write_json_whole(self.state, {"status": "failed", **state, **found})
