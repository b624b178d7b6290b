"""One rank's files of a checkpoint, written, made durable and hashed by a thread while training continues.

The thread never communicates with other ranks: its caller reads `done` and `failed` at step boundaries. Where a file
system fails for a moment it waits and tries again, and training continues.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from common.publish import sha256_file
from model.weights import save_tensors
from train.run.storage import NO_ROOM, RETRY_DELAYS, is_transient


@dataclass(frozen=True)
class WriteFailure:
    """Why a share could not be written.

    no_room: for lack of space or quota, or on a read-only file system. transient: the same may succeed in a moment.
    given_up: because another rank's had failed.
    """

    message: str
    no_room: bool = False
    transient: bool = False
    given_up: bool = False


@dataclass
class ShareWritten:
    """The result of a rank's share: sizes and hashes by file name, or a failure; and why it took several tries.

    names: of the tensors in each file.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: WriteFailure | None = None
    hiccups: list[str] = field(default_factory=list)
    seconds: float = 0.0
    names: dict[str, list[str]] = field(default_factory=dict)


class BackgroundSave:
    """Starts to write as soon as it is made. The tensors must not change until `result` has returned."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Tensor]],
        retry_delays: Sequence[float] = RETRY_DELAYS,
    ) -> None:
        """Start to write.

        Args:
            folder: is made, unless another rank has.
            files: tensors by name, by the name of the file in `folder` that they go to.
            retry_delays: seconds until each further try of a file where the file system fails for a moment.
        """
        self._folder = folder
        self._files = files
        self._retry_delays = retry_delays
        self._hurry = threading.Event()  # don't wait between tries any more
        self._idle = threading.Event()  # done, or waiting for the file system
        self._share = ShareWritten()
        self._unexpected: BaseException | None = None
        self._abandoned = threading.Event()
        # non-daemon: interpreter shutdown must not kill it inside native code
        self._thread = threading.Thread(target=self._run, name="checkpoint writer")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Written, or failed."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._share.failure is not None or self._unexpected is not None

    def wait(self) -> None:
        """Wait until it is done, or has to wait for the file system."""
        self._idle.wait()

    def result(self) -> ShareWritten:
        """Wait for the thread and return the share's result; re-raises unexpected errors (OSErrors become a
        `WriteFailure`).

        Remaining tries are made at once: the caller has no time to wait for a file system.
        """
        self._hurry.set()
        self._thread.join()
        if self._unexpected is not None:
            raise self._unexpected
        return self._share

    def abandon(self) -> None:
        """Stop after the current file: nobody will publish this save."""
        self._abandoned.set()
        self._hurry.set()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            for name, tensors in self._files.items():
                self._share.failure = self._write(self._folder / name, tensors)
                if self._share.failure is not None:
                    return
        except BaseException as error:
            self._unexpected = error
        finally:
            self._share.seconds = time.monotonic() - started
            self._idle.set()

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> WriteFailure | None:
        """Write and hash one file, in several tries if need be."""
        for delay in (*self._retry_delays, None):
            if self._abandoned.is_set():
                break
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                save_tensors(path, tensors)
                self._share.names[path.name] = list(tensors)
                self._share.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                return None
            except OSError as error:
                failure = write_failure(path, error)
            if delay is None or not failure.transient:
                return failure
            self._share.hiccups.append(failure.message)
            self._idle.set()
            self._hurry.wait(delay)
            self._idle.clear()
        return WriteFailure("given up", given_up=True)


def write_failure(path: Path, error: OSError) -> WriteFailure:
    """An error of the file system in one line that names the path."""
    message = f"{path}: {error.strerror or error}"
    return WriteFailure(message, no_room=error.errno in NO_ROOM, transient=is_transient(error))
