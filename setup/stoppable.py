"""Run `torchrun …` so that Ctrl-C saves and stops, and leaves one line.

torchrun answers Ctrl-C with a traceback and gives its workers 30 seconds. So it runs here in a process group of its
own, where the terminal's Ctrl-C does not reach it, and the workers are asked instead: they finish the step, save and
end by themselves, and torchrun ends after them in peace. A second Ctrl-C ends everything at once.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import INTERRUPTED_STATUS, UserError, exit_on_user_error

POLL_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Requests:
    """How often this process was asked to stop."""

    def __init__(self) -> None:
        self.count = 0
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def main() -> int:
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(f"{__doc__}\nusage: python setup/stoppable.py torchrun [OPTIONS] SCRIPT [ARGUMENTS]")
        return 0
    requests, answered = Requests(), 0
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # what torchrun would set, with five lines of warning
    try:
        launcher = psutil.Popen(command, stdin=subprocess.DEVNULL, process_group=0, env=environment)
    except OSError as error:
        raise UserError(f"{command[0]} does not start: {error.strerror}") from None
    while launcher.poll() is None:
        if requests.count > answered:
            answered = requests.count
            stop(launcher, at_once=answered > 1)
        time.sleep(POLL_SECONDS)
    if answered:
        print("stopped: the same command goes on from the newest checkpoint", flush=True)
        return INTERRUPTED_STATUS
    return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def stop(launcher: psutil.Process, *, at_once: bool) -> None:
    """Ask the workers to save and end. Before they listen they have nothing to save, and all are ended at once."""
    workers = launcher.children()
    if workers and not at_once and all(map(listens, workers)):
        print("\nsaving and stopping; Ctrl-C again stops at once", flush=True)
        for worker in workers:
            worker.terminate()
        return
    everything = launcher.children(recursive=True)
    for process in [launcher, *everything]:  # the launcher first: it would report the others' deaths at length
        process.kill()


def listens(worker: psutil.Process) -> bool:
    """Whether a process handles SIGTERM, by what Linux says of it."""
    try:
        status = Path(f"/proc/{worker.pid}/status").read_text()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


if __name__ == "__main__":
    exit_on_user_error(main)
