"""Start ranks with torchrun such that they can be stopped: on one machine, or once on each of several.

    python train/launch.py --standalone --nproc_per_node=auto train/pretrain.py --config train/configs/gpt2-124m.yaml
    python train/launch.py --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=29500 --nproc_per_node=8 \\
        train/pretrain.py …

Everything up to the script's name is torchrun's. --nproc_per_node=auto is one rank for each GPU; without any two, one
where there is one core. auto:8 is as many of those as divide 8, for a small batch. Ranks are not restarted inside a
launch: the same command resumes the run. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP go to the ranks, never to
torchrun, which would end them after 30 seconds: they save, however long that takes, and end by themselves. A second
Ctrl-C within 10 s of the first ends everything at once, without a save.

Exit status: 0 after the last step and after a clean stop alike (the run's `state` records which); 2 for a mistake in
the command line; 1 for an error; 128 and the signal's number where a rank was killed; 130 after a second Ctrl-C.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType

import psutil

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.errors import INTERRUPTED_STATUS, UserError, exit_on_user_error
from common.processes import wall_time_of_start
from common.run_note import LAUNCHED, NOTES_FOLDER
from common.scratch_folder import scratch_folder
from common.version import VERSION_LINE
from train.launching.agent_parent import AGENT_PARENT
from train.launching.rank_watch import RankWatch
from train.stopping.ctrl_c import AGAIN, AGAIN_SECONDS, SAME_SECONDS

AGENT = Path(__file__).with_name("launching") / "torchrun_agent.py"
POLL_SECONDS = 0.1
LAST_SECONDS = 3.0  # from a second Ctrl-C to the end of everything
MEETING_SECONDS = 10.0  # how long a launcher that is to stop waits for the other machines to meet it
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)]


class Requests:
    """Signals to this process, in order of arrival."""

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        for name in NAMES:
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN or name in ("SIGUSR1", "SIGUSR2"):  # nohup stays nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.waiting.append(number)


class Launch:
    """torchrun in a process group of its own, and its workers."""

    def __init__(self, arguments: list[str], notes: Path) -> None:
        """Args: notes: a folder for the workers' notes."""
        self._watch = RankWatch(notes)
        launched = wall_time_of_start(os.getpid()) or time.time()
        own = {AGENT_PARENT: str(os.getpid()), NOTES_FOLDER: str(notes), LAUNCHED: str(launched)}
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **own}
        for name in OF_A_RANK:  # leftovers in the shell; its ranks get their own
            environment.pop(name, None)
        self.agent = psutil.Popen(
            [sys.executable, str(AGENT), *arguments], stdin=subprocess.DEVNULL, process_group=0, env=environment
        )
        self._asked: list[int] = []  # signals for the workers, in order
        self._told: dict[int, int] = {}  # by worker: how many of them it has been sent
        self._started = False  # a worker has been seen
        self._nothing_done = False  # to stop, it no longer waited for the other machines
        self._asked_first: float | None = None
        self._interrupted: float | None = None
        self._end_at: float | None = None

    def ask(self, number: int) -> None:
        """Record a signal to forward."""
        now = time.monotonic()
        self._asked_first = self._asked_first or now
        if number == signal.SIGINT and not self._is_news(now):
            return
        self._asked.append(signal.SIGTERM if signal.Signals(number).name == "SIGHUP" else number)

    def _is_news(self, now: float) -> bool:
        """Answer a Ctrl-C; return whether it is to be forwarded: the first is, and one that drops work."""
        since = None if self._interrupted is None else now - self._interrupted
        if self._end_at is not None or (since is not None and since <= SAME_SECONDS):
            return False
        if since is not None and since <= AGAIN_SECONDS:
            print("\nending at once", file=sys.stderr, flush=True)
            self._end_at = now + LAST_SECONDS
            return True
        self._interrupted = now
        what = "stopping" if since is None else "still stopping"
        print(f"\n{what}; Ctrl-C {AGAIN} drops what is not saved", file=sys.stderr, flush=True)
        return since is None

    def hand_on(self) -> None:
        """Forward signals to the workers that handle them; the others get them when they do."""
        if not self._started:
            self._started = bool(self._children())
        if self._end_at is not None and time.monotonic() > self._end_at:
            self.kill()
        elif self._asked and not self._started:
            self._wait_for_workers()
        elif self._asked:
            for worker in self._children():
                told = self._told.get(worker.pid, 0)
                if told < len(self._asked) and listens(worker.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                        for number in self._asked[told:]:
                            worker.send_signal(number)
                    self._told[worker.pid] = len(self._asked)

    def watch(self) -> None:
        """Name workers that stand still."""
        if self._started:
            self._watch.look(self._children())

    def _wait_for_workers(self) -> None:
        """Give up where the other machines, which torchrun waits for before it starts a worker, don't come soon."""
        assert self._asked_first is not None
        if not self._nothing_done and time.monotonic() - self._asked_first > MEETING_SECONDS:
            print("no rank has started yet: there is nothing to save", file=sys.stderr, flush=True)
            self._nothing_done = True
            self.kill()

    def kill(self) -> None:
        """End torchrun and its workers; torchrun first, which would report the others' deaths at length."""
        try:
            everything = self.agent.children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in [self.agent, *everything]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                process.kill()

    def status(self) -> int:
        if self._end_at is not None:
            return INTERRUPTED_STATUS
        if self._nothing_done:
            return 0
        code: int = self.agent.returncode
        return code if code >= 0 else 128 - code

    def _children(self) -> list[psutil.Process]:
        try:
            return self.agent.children()
        except psutil.NoSuchProcess:
            return []


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nusage: python train/launch.py [TORCHRUN'S OPTIONS] SCRIPT [ARGUMENTS]")
        return 0
    if arguments[0] == "--version":
        print(VERSION_LINE)
        return 0
    if os.name != "posix":
        raise UserError("there are no POSIX signals here to forward: start train/pretrain.py itself")
    requests = Requests()
    with scratch_folder("longhaul-notes-") as notes:
        launch = Launch(arguments, notes)
        while launch.agent.poll() is None:
            while requests.waiting:
                launch.ask(requests.waiting.popleft())
            launch.hand_on()
            launch.watch()
            time.sleep(POLL_SECONDS)
    return launch.status()


def listens(pid: int) -> bool:
    """Whether a process handles SIGTERM, which only Linux shows."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not Path("/proc/self").exists()
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


if __name__ == "__main__":
    exit_on_user_error(main)
