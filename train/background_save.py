"""One rank's files of a checkpoint, written, made durable and hashed by a thread while training goes on.

The thread never speaks to other ranks: whoever started it asks for `done` and `failed` at step boundaries.
"""

import errno
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from common.publish import sha256_file
from model.weights import save_tensors

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class WriteFailure:
    """Why a share could not be written.

    no_room: for lack of space or quota, or on a read-only file system. given_up: because another rank's had failed.
    """

    message: str
    no_room: bool = False
    given_up: bool = False


@dataclass
class ShareWritten:
    """What became of a rank's share: sizes and hashes by file name, or a failure."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: WriteFailure | None = None
    seconds: float = 0.0


class BackgroundSave:
    """Begins to write as soon as it is made. The tensors must stay as they are until `result` has returned."""

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Args: files: tensors by name, by the name of the file in `folder` that they go to."""
        self._folder = folder
        self._files = files
        self._share = ShareWritten()
        self._unexpected: BaseException | None = None
        self._abandoned = threading.Event()
        # no daemon: an interpreter that shuts down must not pull the ground from under a thread inside native code
        self._thread = threading.Thread(target=self._run, name="checkpoint writer")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Written, or failed."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._share.failure is not None or self._unexpected is not None

    def result(self) -> ShareWritten:
        """Wait for the thread and say what became of the share; raises what no disk is to blame for."""
        self._thread.join()
        if self._unexpected is not None:
            raise self._unexpected
        return self._share

    def abandon(self) -> None:
        """Begin no further file: nobody will publish this save."""
        self._abandoned.set()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            for name, tensors in self._files.items():
                if self._abandoned.is_set():
                    self._share.failure = WriteFailure("given up", given_up=True)
                    return
                path = self._folder / name
                try:
                    save_tensors(path, tensors)
                    self._share.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                except OSError as error:
                    self._share.failure = write_failure(path, error)
                    return
        except BaseException as error:
            self._unexpected = error
        finally:
            self._share.seconds = time.monotonic() - started


def write_failure(path: Path, error: OSError) -> WriteFailure:
    """An error of the file system in one line that names the path."""
    return WriteFailure(f"{path}: {error.strerror or error}", no_room=error.errno in NO_ROOM)
