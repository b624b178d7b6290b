"""torchrun as train/launch.py runs it: deaf to signals, dead with its parent, and brief about failures."""

import argparse
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from common.command_line import CommandParser
from common.errors import USER_ERROR_STATUS, UserError, exit_on_user_error
from common.periodic import Periodic
from common.scratch_folder import scratch_folder
from train.launch import AGENT_PARENT
from train.stopping import LAUNCHER_PID

LOOK_SECONDS = 0.5
IGNORED = ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")


def main() -> int:
    options = read_options(sys.argv[1:])
    for name in IGNORED:  # workers inherit it until they listen: a signal to the whole tree does not kill them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # not inherited: torchrun ends its workers with it
    parent = int(os.environ.get(AGENT_PARENT, os.getppid()))
    Periodic("parent", LOOK_SECONDS, lambda: None if os.getppid() == parent else os.kill(os.getpid(), signal.SIGKILL))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    with scratch_folder("longhaul-launch-") as logs:  # torchrun's own stays behind after every start
        options.log_dir = options.log_dir or str(logs)
        try:
            torchrun.run(options)
        except ChildFailedError as error:
            return report(error.failures)
    return 0


def read_options(arguments: list[str]) -> argparse.Namespace:
    """torchrun's options. Raises UserError for those that it would meet with a page, a traceback or a long wait."""
    parser = torchrun.get_args_parser()
    parser.__class__ = CommandParser  # whose complaints are one line
    options = parser.parse_args(["--signals-to-handle=SIGQUIT", *arguments])
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", options.nnodes):
        raise UserError(f"--nnodes is {options.nnodes}: give the number of machines")
    try:
        enough = torchrun.determine_local_world_size(options.nproc_per_node) > 0
    except ValueError as error:
        raise UserError(f"--nproc_per_node is {options.nproc_per_node} ({error}): give the number of ranks") from None
    if not enough:
        raise UserError(f"--nproc_per_node is {options.nproc_per_node}: give the number of ranks, 1 or more")
    nodes = int(options.nnodes.split(":")[-1])
    if not 0 <= options.node_rank < nodes:
        raise UserError(f"--node_rank is {options.node_rank}: the {nodes} machines count from 0 to {nodes - 1}")
    if not (options.module or options.no_python or Path(options.training_script).is_file()):
        raise UserError(f"{options.training_script} is no file: give the script to start, such as train/pretrain.py")
    if options.standalone and options.local_addr is None:
        options.local_addr = "127.0.0.1"  # else the machine's name: where that doesn't resolve, ranks wait in vain
    return options


def report(failures: dict[int, ProcessFailure]) -> int:
    """Tell of the failure that explains the others; return the exit status it stands for."""
    rank, first = min(failures.items(), key=lambda item: (_explains(item[1]), item[1].timestamp))
    if first.exitcode == USER_ERROR_STATUS:  # the rank has said it in one line
        return USER_ERROR_STATUS
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


def _explains(failure: ProcessFailure) -> int:
    """0 for an error of a rank's own, 1 for a rank that was killed, 2 for what followed from either."""
    if failure.exitcode == USER_ERROR_STATUS or _traceback(failure):
        return 0
    return 1 if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM else 2


def _traceback(failure: ProcessFailure) -> str:
    """What @record kept of a rank's exception; "" where there was none."""
    message: Any = failure.message
    return str(message.get("extraInfo", {}).get("py_callstack", "")) if isinstance(message, dict) else ""


if __name__ == "__main__":
    exit_on_user_error(main)
