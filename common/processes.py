"""Which process is this, and is another one still alive: enough to decide whether the owner of a file is gone."""

import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROC = Path("/proc")  # only Linux has it
HIGHEST_PID = (1 << 31) - 1


@dataclass(frozen=True)
class ProcessIdentity:
    """One process on one machine. A pid is not enough: it is reused, and every container counts its own."""

    host: str
    pid: int
    started: float  # in the kernel's own count on Linux, else seconds since the epoch
    boot: str | None  # of the machine's boot; None where it can't be known
    namespace: str | None  # in which the pid counts; None where there are none

    @classmethod
    def of_this_process(cls) -> "ProcessIdentity":
        started = start_time(os.getpid())
        assert started is not None
        return cls(socket.gethostname(), os.getpid(), started, boot_id(), _namespace())

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "ProcessIdentity":
        """From a record that holds the fields (and more).

        Raises KeyError where one is missing, or is not what we write there.
        """
        values = [record[name] for name in ("host", "pid", "started", "boot", "namespace")]
        for value, types in zip(values, ((str,), (int,), (int, float), *[(str, type(None))] * 2), strict=True):
            if type(value) not in types:
                raise KeyError(value)
        if not 0 < record["pid"] <= HIGHEST_PID:
            raise KeyError(record["pid"])
        return cls(*values)

    def is_here(self) -> bool:
        """Whether this process can see if that one is alive: same machine, same boot, same pid namespace.

        A container has another host name after each restart; its boot and its pid namespace, where there are some,
        leave no doubt: as long as a process of that namespace lives, no other namespace has its number.
        """
        if self.boot is None or (self.boot, self.namespace) != (boot_id(), _namespace()):
            return False
        return self.namespace is not None or self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """True where it is certain: the process ran here, since the machine's last boot, and has exited.

        False means that it is alive, or that nobody can tell from here.
        """
        return self.is_here() and start_time(self.pid) != self.started


def start_time(pid: int) -> float | None:
    """When a process started, in a count that only serves to compare; None where there is none (or a zombie)."""
    if PROC.is_dir():
        try:
            fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else float(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def wall_time_of_start(pid: int) -> float | None:
    """When a process started, in seconds since the epoch; None where there is none."""
    started = start_time(pid)
    if started is None or not PROC.is_dir():
        return started
    # psutil's is relative to the boot's time, of which the kernel gives whole seconds
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.time() - max(0.0, age)


def resident_bytes() -> int:
    """Memory that this process holds in RAM."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory that this process has held in RAM; on Windows, what it holds now."""
    with suppress(OSError, StopIteration):  # not ru_maxrss: on Linux it begins with what the starting process holds
        lines = (PROC / "self" / "status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return resident_bytes()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def node_name() -> str:
    """What this machine is called: Slurm's name for it inside a job, which may differ from its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def boot_id() -> str | None:
    """An id of the machine's boot; None where it can't be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        # seconds, rounded: elsewhere the kernel gives only the time of the start, which moves with the clock
        return None if PROC.is_dir() else str(round(psutil.boot_time(), -1))


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
