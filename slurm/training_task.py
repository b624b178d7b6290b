"""What submitit runs on every node of a job: the launcher of the node's ranks, and the decision to requeue after it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from common.environment import whole_number
from common.errors import UserError
from common.paths import PROJECT
from common.plain_text import accept_any_text
from common.run_folder import RunFolder
from slurm.controller import ask, fields, leave_out, node_addresses, partition_nodes
from slurm.decision import EXIT_STATUS, Decision, decide_for
from slurm.history import StartId
from slurm.job_start import begin
from slurm.node_check import PATIENCE_SECONDS, check_nodes
from slurm.start_info import Beginning, leave_mark, read_mark

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LOOK_SECONDS = 0.2
REPEAT_SECONDS = 5.0  # a trainer that is still starting may miss a request


@contextmanager
def leaving_out(excluded: str | None) -> Iterator[None]:
    """Ask Slurm to leave nodes out of the job's next start, once the block has requeued it, which ends this process.

    Args: excluded: as `spare_nodes.LeftOut` has it.
    """
    try:
        yield
    except SystemExit:
        if excluded is not None:
            refused = leave_out(os.environ["SLURM_JOB_ID"], excluded)
            print(
                f"the next start may get any node, as Slurm refused to leave out {excluded}: {refused}"
                if refused
                else f"the next start does without nodes: {excluded or 'none'}",
                flush=True,
            )
        raise


class JobFailed(Exception):
    """The job is over and will not be requeued; the message has the reason."""


@dataclass
class TrainingTask:
    """A callable for submitit. It freezes nothing: every start resumes from the run's newest checkpoint.

    Args:
        options: train/pretrain.py's.
        run_folder: absolute path of the run's folder.
        ranks_per_node: how many ranks each node's launcher starts.
    """

    options: list[str]
    run_folder: Path
    ranks_per_node: int
    _requests: list[int] = field(default_factory=list, repr=False)

    def __call__(self) -> str:
        """Train to the end or to a request to stop; requeue the job if that makes sense.

        Returns why the job is over. Raises JobFailed on the first node.
        """
        accept_any_text()  # this is submitit's process, without exit_on_user_error
        requeue = signal.getsignal(submitit.JobEnvironment._usr_sig())  # submitit's own way to checkpoint and requeue
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            decision = self._train_and_decide()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if decision.left_out.complaint:
            print(decision.left_out.complaint, flush=True)
        if decision.action == "requeue":
            assert callable(requeue)
            try:
                with leaving_out(decision.left_out.excluded):
                    requeue(signal.SIGUSR2, None)  # calls `checkpoint`, and ends this process
            except (OSError, subprocess.SubprocessError) as error:  # in a container, for example
                print(f"scontrol can't requeue from here ({error}): left to the job's script", flush=True)
                raise SystemExit(EXIT_STATUS["requeue"]) from None  # for slurm/requeue.sh
        if decision.action == "failed":
            raise JobFailed(decision.reason)
        return decision.reason

    def checkpoint(self) -> DelayedSubmission:
        """submitit's protocol: what the requeued job will run. The trainers have already saved and exited."""
        return DelayedSubmission(TrainingTask(self.options, self.run_folder, self.ranks_per_node))

    def _train_and_decide(self) -> Decision:
        on_slurm = "SLURM_JOB_ID" in os.environ
        number = whole_number("SLURM_PROCID", 0)
        nodes = SlurmJobEnvironment().hostnames if on_slurm else [os.uname().nodename]  # without scontrol
        beginning = self._meet(nodes, number)
        options = [*self.options, *([f"--resume={beginning.resume}"] if beginning.resume else [])]
        status = self._train(beginning, options, len(nodes))
        if number > 0:
            return Decision("leave", f"the launcher on this node ended with status {status}")
        record = ask("scontrol", "-o", "show", "job", os.environ["SLURM_JOB_ID"]) if on_slurm else ""
        return decide_for(
            RunFolder(Path(beginning.run_folder)),
            record,
            asked=bool(self._requests),
            told=False,
            exit_status=status,
            cluster=partition_nodes(fields(record).get("Partition", "")),
        )

    def _meet(self, nodes: list[str], number: int) -> Beginning:
        """All nodes agree on this start: the first one checks and writes it down, the others find its file."""
        meeting_id = str(StartId.of_environment())
        try:
            if number == 0:
                addresses = node_addresses(nodes) if len(nodes) > 1 else []
                beginning = begin(self.options, nodes, addresses, "submitit")
                leave_mark(beginning)
            else:
                beginning = self._wait_for_mark(nodes[number], meeting_id)
            check_nodes(beginning, nodes, number, PATIENCE_SECONDS)
        except UserError as error:
            raise JobFailed(str(error)) from None
        return beginning

    def _wait_for_mark(self, node: str, meeting_id: str) -> Beginning:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            beginning = read_mark(self.run_folder, meeting_id)
            if beginning is not None:
                return beginning
            time.sleep(LOOK_SECONDS)
        raise UserError(
            f"{node} finds nothing from the job's first node in {self.run_folder}: put the folder on a file system "
            "that all nodes share, if that node has not failed"
        )

    def _train(self, beginning: Beginning, options: list[str], nodes: int) -> int:
        """Run the node's launcher to its end, forwarding stop requests."""
        script = ["bash", str(PROJECT / "slurm" / "node.sh"), sys.executable, *options]
        environment = os.environ | {
            "LONGHAUL_LAUNCH": "torchrun",
            "LONGHAUL_MEETING_HEAD": beginning.head,
            "LONGHAUL_MEETING_PORT": str(beginning.port),
            "LONGHAUL_MEETING_KEY": beginning.secret,
            "LONGHAUL_RANKS_PER_NODE": str(self.ranks_per_node),
            "SLURM_STEP_NUM_NODES": str(nodes),  # without Slurm: 1
        }
        process = subprocess.Popen(script, env=environment, stdin=subprocess.DEVNULL)
        passed_on, last_time = 0, 0.0
        while process.poll() is None:
            due = self._requests and time.monotonic() - last_time > REPEAT_SECONDS
            if len(self._requests) > passed_on or due:
                passed_on, last_time = len(self._requests), time.monotonic()
                process.send_signal(signal.SIGUSR1)
            time.sleep(LOOK_SECONDS)
        return process.returncode

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requests.append(number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_requests": []}
