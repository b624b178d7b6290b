"""torchrun as train/launch.py runs it: closed to others, ignoring signals, ended with its parent, brief on failure."""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from common.environment import whole_number
from common.errors import INTERRUPTED_STATUS, USER_ERROR_STATUS, exit_on_user_error
from common.periodic import Periodic
from common.scratch_folder import scratch_folder
from train.launching.agent_parent import AGENT_PARENT
from train.launching.launch_meeting import arrange
from train.launching.launch_options import check_the_rest, read_options
from train.stopping.ctrl_c import LAUNCHER_PID

LOOK_SECONDS = 0.5
FOLLOWS_SECONDS = 2  # deaths that are noted together are less apart
TOLD_HERE = ("Sending process", "failed (exitcode")  # torch's lines on what `report` prints
IGNORED = ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")


def main() -> int:
    options = read_options(sys.argv[1:])
    for name in IGNORED:  # workers inherit it until they set handlers: a signal to the whole tree does not kill them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # not inherited: torchrun ends its workers with it
    parent = whole_number(AGENT_PARENT, os.getppid())
    Periodic("parent", LOOK_SECONDS, lambda: None if os.getppid() == parent else os.kill(os.getpid(), signal.SIGKILL))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    processes.logger.addFilter(lambda record: not str(record.msg).startswith(TOLD_HERE))
    with scratch_folder("longhaul-launch-") as logs:  # torchrun's own stays behind after every start
        options.log_dir = options.log_dir or str(logs)
        check_the_rest(options)
        arrange(options, logs)
        try:
            torchrun.run(options)
        except ChildFailedError as error:
            return report(error.failures)
    return 0


def report(failures: dict[int, ProcessFailure]) -> int:
    """Print the failure that explains the others; return its exit status."""
    unheeding = unheeding_ranks(failures)
    rank, first = min(failures.items(), key=lambda item: (_explains(item[1], item[0] in unheeding), item[1].timestamp))
    if first.exitcode in (USER_ERROR_STATUS, INTERRUPTED_STATUS):  # the rank has printed why in one line
        return first.exitcode
    for other in sorted(unheeding):
        print(
            f"rank {other} on {socket.gethostname()} (pid {failures[other].pid}) was killed after another's failure: "
            "it did not end when torchrun asked it to (frozen, or hanging?)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    who = f"rank {rank} on {socket.gethostname()} (pid {first.pid})"
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        why = ", probably for lack of memory" if name == "SIGKILL" else ""
        print(f"{who} was ended by {name}{why}: the first failure", file=sys.stderr, flush=True)
        return 128 - first.exitcode
    trace = _traceback(first)
    what = f" with:\n{trace}" if trace else f" with exit status {first.exitcode}"
    print(f"{who} failed first{what}", file=sys.stderr, flush=True)
    return first.exitcode


def unheeding_ranks(failures: dict[int, ProcessFailure]) -> set[int]:
    """The ranks that were killed after torchrun had noticed another's failure, and asked them to end.

    It asks with SIGTERM, kills what is left after 30 s, and only then notes the deaths that came meanwhile. A rank
    whose death its peers saw is dead before they leave: it is noted no later than they are. Times are in whole seconds.
    """
    noted = [failure.timestamp for failure in failures.values() if not _traceback(failure)]
    return {
        rank
        for rank, failure in failures.items()
        if failure.exitcode == -signal.SIGKILL and failure.timestamp - min(noted) >= FOLLOWS_SECONDS
    }


def _explains(failure: ProcessFailure, unheeding: bool) -> int:
    """0 for an error of a rank's own, 1 for a rank that was killed, 2 for what followed from either, 3 if stuck."""
    if failure.exitcode == USER_ERROR_STATUS or _traceback(failure):
        return 0
    if unheeding:
        return 3
    return 1 if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM else 2


def _traceback(failure: ProcessFailure) -> str:
    """What @record kept of a rank's exception; "" where there was none."""
    message: Any = failure.message
    return str(message.get("extraInfo", {}).get("py_callstack", "")) if isinstance(message, dict) else ""


if __name__ == "__main__":
    exit_on_user_error(main)
