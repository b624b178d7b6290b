"""Run torchrun so that a request to save and leave reaches the ranks and nothing else.

torchrun dies of SIGUSR1 and SIGUSR2, and answers SIGTERM by killing its workers after 30 seconds. So it runs in a
process group of its own, its workers are asked instead, and it ends after them in peace.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

LOOK_SECONDS = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
requests: list[int] = []


def handle(number: int, frame: FrameType | None) -> None:
    requests.append(number)


def listens(worker: psutil.Process) -> bool:
    """Whether a process handles SIGUSR1, by what Linux says of it."""
    try:
        status = Path(f"/proc/{worker.pid}/status").read_text()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def main() -> int:
    for number in SIGNALS:
        signal.signal(number, handle)
    launcher = psutil.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    answered = 0
    while launcher.poll() is None:
        workers = launcher.children()
        if len(requests) > answered and workers and all(map(listens, workers)):
            answered = len(requests)
            for worker in workers:
                worker.send_signal(signal.SIGUSR1)
        time.sleep(LOOK_SECONDS)
    return abs(int(launcher.returncode))


if __name__ == "__main__":
    sys.exit(main())
