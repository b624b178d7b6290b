"""One trainer at a time in a run's folder: `runs/<name>/lock` names its owner.

Two copies of a job can be alive at once: a node that its scheduler has lost keeps computing, and people start a
command twice. The lock names its owner and is renewed while the owner lives. A process that finds a lock takes it over
if its owner is provably gone, or an earlier start of the same Slurm job, or has not renewed it for long enough, or if
the lock came with a copy of its owner's folder; an owner that has been replaced finds another token in the lock,
publishes nothing any more and exits.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.os_errors import refusal
from common.periodic import Periodic
from common.plain_text import one_line
from common.processes import ProcessIdentity
from common.regular_file import read_at_most
from common.rewritten_file import MOST_BYTES, RewrittenFile, read_record
from common.run_folder import restart_count

RENEW_SECONDS = 5.0
LOOK_SECONDS = 0.5
RELEASED = "released"


OTHER_RUN = "give another --run.root or --run.name"


@dataclass
class RunLock:
    """The lock of one run. One rank takes and releases it; every rank may call `still_mine`."""

    folder: Path
    patience_seconds: float  # how long a lock whose owner can't be checked must go without a renewal
    token: str = ""  # of the owner; other ranks receive it
    lost: bool = False  # noticed by the renewal
    _file: RewrittenFile | None = None
    _renewal: Periodic | None = None
    _made_in: list[int] = field(default_factory=list)
    _made: list[Path] = field(default_factory=list)  # folders that this process made
    _restart_count: int = 0

    @property
    def path(self) -> Path:
        return self.folder / "lock"

    def take(self, give_up: Callable[[], bool] = lambda: False) -> str:
        """Take the lock for this process; return a line on its previous owner, or "".

        Args:
            give_up: called while waiting; True ends the wait.

        Raises UserError, having touched nothing, where another trainer is alive or `give_up` returns True.
        """
        self._restart_count = restart_count()
        self._make_folder()
        found = ""
        while not self._create():
            owner = read_record(self.path)
            why = _why_stale(owner, self.folder) or self._watch(owner, give_up)
            if _move_away(self.path, owner) and why != RELEASED:
                found = f"took over the lock of {_name(owner)}: {why}"
        self._renewal = Periodic("lock", RENEW_SECONDS, self._renew)
        return found

    def still_mine(self) -> bool:
        """Whether the lock on disk is this run's owner's. Called before anything is published.

        Raises OSError where it is there and can't be read: it is not known then.
        """
        for _ in range(2):  # a shared file system's first answer may be of a file that is gone
            owner = read_record(self.path)
            if owner is not None:
                return bool(owner.get("token") == self.token)
        with contextlib.suppress(FileNotFoundError, OverflowError):
            read_at_most(self.path, MOST_BYTES)
        return False

    def overtaken(self) -> bool:
        """Whether the lock is another's. It is nobody's after this run's first rank has exited."""
        owner = read_record(self.path)
        return owner is not None and owner.get("token") != self.token

    def release(self) -> None:
        """Release the lock, and remove folders that were made only for it."""
        if self._file is None:
            return
        assert self._renewal is not None
        self._renewal.stop()
        self._file.close()
        self._file = None
        owner = read_record(self.path)
        if owner is not None and owner.get("token") == self.token:
            with contextlib.suppress(OSError):  # a read-only disk: the next start sees that this process is gone
                _move_away(self.path, owner)
        self._remove_made_folders()

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(refusal("made", error, self.folder, otherwise=OTHER_RUN)) from None
        self._made = missing[::-1]

    def _create(self) -> bool:
        """Try to be the one whose lock is there."""
        if self.path.exists():
            return False
        try:
            self._file = RewrittenFile(self.path, must_be_new=True)
            self.token = uuid.uuid4().hex
            self._made_in = _folder_id(self.folder)
            self._write()
        except FileExistsError:
            return False
        except (OSError, UserError) as error:
            if self._file is not None:  # made, but empty for lack of disk space: the next start need not wait for it
                self._file.close()
                self.path.unlink()
            self._remove_made_folders()
            if isinstance(error, UserError):
                raise
            raise UserError(refusal("written", error, self.path, otherwise=OTHER_RUN)) from None
        return True

    def _remove_made_folders(self) -> None:
        for made in reversed(self._made):
            with contextlib.suppress(OSError):  # it is not empty any more
                made.rmdir()

    def _write(self) -> None:
        assert self._file is not None
        self._file.write(
            asdict(ProcessIdentity.of_this_process())
            | {"job_id": os.environ.get("SLURM_JOB_ID"), "restart_count": self._restart_count}
            | {"folder": self._made_in}
            | {"token": self.token, "renewed": time.time()}
        )
        self._file.sync()

    def _renew(self) -> None:
        try:
            if not self.still_mine():
                self.lost = True
            else:
                # The descriptor leads to the file this process made, wherever that is now: a lock that is taken over
                # between the check and this line is not touched.
                self._write()
        except OSError:
            pass  # the next renewal may succeed; `still_mine` decides before anything is published

    def _watch(self, owner: dict[str, Any] | None, give_up: Callable[[], bool]) -> str:
        """Watch a lock whose owner can't be checked from here until it changes or has not changed for long enough.

        By its content, not by clocks: those of two machines differ.

        Raises UserError if its owner lives.
        """
        if owner is not None and _is_alive_here(owner) and _made_in(owner) in (None, _folder_id(self.folder)):
            raise UserError(_refusal(self.folder, owner))
        print(one_line(self._why_wait(owner)), flush=True)
        before = _content(self.path)
        until = time.monotonic() + self.patience_seconds
        while time.monotonic() < until:
            if give_up():
                raise UserError(f"stopped while waiting for the lock of {_name(owner)}: start again to wait once more")
            threading.Event().wait(min(LOOK_SECONDS, self.patience_seconds))
            if _content(self.path) != before:
                changed = read_record(self.path)
                if changed is None:
                    return RELEASED
                raise UserError(_refusal(self.folder, changed))
        return f"not renewed for {self.patience_seconds:.0f} s"

    def _why_wait(self, owner: dict[str, Any] | None) -> str:
        """The line that a start prints before it waits."""
        return (
            f"waiting up to {self.patience_seconds:g} s for the lock of {_name(owner)} ({self.path}): whether it lives "
            f"can't be seen from {socket.gethostname()}, but a live one renews its lock every {RENEW_SECONDS:g} s"
        )


def why_lost(run: Path) -> str:
    """Why a trainer that has lost its lock must exit, in words."""
    if (run / "lock").exists():
        return f"{run} has been taken over by another trainer: this one leaves it as it is"
    return (
        f"{run / 'lock'} is gone: the run's folder was moved or deleted while it was trained: move it back, or start "
        "again with --run.root and --run.name of where it is"
    )


def _folder_id(folder: Path) -> list[int]:
    """Device and inode: a moved folder keeps them, a copy has others."""
    found = folder.stat()
    return [found.st_dev, found.st_ino]


def _made_in(owner: dict[str, Any]) -> list[int] | None:
    """The `_folder_id` of where the lock was made; None where an older version made it."""
    folder = owner.get("folder")
    return folder if isinstance(folder, list) and len(folder) == 2 else None


def _why_stale(owner: dict[str, Any] | None, folder: Path) -> str:
    """Why a lock's owner need not be waited for; "" where it may be alive, or the lock can't be read."""
    if owner is None:
        return ""
    try:
        if ProcessIdentity.from_record(owner).is_gone():
            return "that process is gone"
        device, inode = _folder_id(folder)
        # another machine, or another mount of the file system, may count its inodes in its own way
        of_copy = [device, inode] != (made_in := _made_in(owner)) and made_in is not None and made_in[0] == device
        if of_copy and ProcessIdentity.from_record(owner).is_here():
            return "that process trains another folder, of which this one is a copy"
        same_job = owner["job_id"] is not None and owner["job_id"] == os.environ.get("SLURM_JOB_ID")
        if same_job and owner["restart_count"] < restart_count():
            return f"this is a later start of job {owner['job_id']}"
    except (KeyError, TypeError):
        pass  # another version's, or not our lock: only waiting can show
    return ""


def _is_alive_here(owner: dict[str, Any]) -> bool:
    """Whether the owner is certainly alive: it runs on this very machine and is not gone."""
    try:
        identity = ProcessIdentity.from_record(owner)
    except KeyError:
        return False
    return identity.is_here() and not identity.is_gone()


def _move_away(path: Path, expected: dict[str, Any] | None) -> bool:
    """Remove a lock, if it is still the one that was judged. Its name is free afterwards."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    found = read_record(aside)
    if (found or {}).get("token") == (expected or {}).get("token"):
        if found is not None:  # what can't be read stays, out of the way
            aside.unlink()
        return True
    # another process was faster and this is already its lock: put it back, unless there is a third one by now
    with contextlib.suppress(OSError):
        os.link(aside, path)
    aside.unlink()
    return False


def _content(path: Path) -> bytes | None:
    try:
        return read_at_most(path, MOST_BYTES)
    except (OSError, OverflowError):
        return None


def _name(owner: dict[str, Any] | None) -> str:
    """An owner in words."""
    if owner is None or "pid" not in owner:
        return "an unknown trainer"
    job = f", Slurm job {owner['job_id']}" if owner.get("job_id") else ""
    return f"process {owner['pid']} on {owner.get('host')}{job}"


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    return f"{folder} is being trained by {_name(owner)}: stop that one first, or give another --run.name"
