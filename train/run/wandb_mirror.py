"""Weights & Biases as a mirror of `metrics.jsonl`: a thread of its own, which may fail or hang without costing a step.

Offline unless WANDB_MODE is online: compute nodes have no network, and `wandb sync` uploads later.
"""

import atexit
import contextlib
import json
import os
import queue
import threading
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import psutil
from pydantic import Field
from typing_extensions import TypedDict

from common.curves import KnownCurves
from common.errors import UserError
from common.json_file import BadJson, keep_others, read_json
from common.layer_figures import KIND as LAYERS
from common.layer_figures import flattened
from common.metric_fields import is_step
from common.metrics_file import record_kind
from common.os_errors import refusal
from common.plain_text import printable
from common.publish import write_whole
from common.regular_file import what_stands_at
from common.run_folder import RunFolder
from train.settings.sections import LogConfig

SERVICE_PROGRAM = "wandb-core"
SERVICE_GRACE_SECONDS = 1.0
MIRROR_FILE = "wandb-mirror.json"
QUEUE_RECORDS = 100_000  # a mirror that hangs costs memory up to here


@keep_others
class Place(TypedDict):
    """Which wandb run mirrors a run, and the last step that it has of each kind of records, under the kind's name."""

    id: Annotated[str, Field(pattern=r"^[\w-]{1,128}$")]


def open_run(folder: RunFolder, project: str, config: dict[str, Any], run_id: str) -> Any:
    """The wandb run of this id, started or resumed. Raises whatever wandb does."""
    os.fsencode(folder.path).decode()  # UnicodeDecodeError here, where wandb would print tracebacks first
    import wandb  # slow to import, and wanted by few

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    return wandb.init(
        project=project,
        name=printable(folder.path.name),
        id=run_id,
        resume="allow",
        dir=str(folder.path),
        config=config,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )


def is_mirrored(record: dict[str, Any], known: KnownCurves) -> bool:
    """Whether a record is part of a curve."""
    return record_kind(record) in {"train", LAYERS, *known.kinds}


def send(run: Any, record: dict[str, Any], place: dict[str, Any]) -> bool:
    """Log a record unless its step is in `place` already; return whether it was logged, noting it in `place`."""
    kind = record_kind(record)
    if record["step"] <= place.get(kind, -1):
        return False
    values = flattened(record) if kind == LAYERS else record
    run.log({key: value for key, value in values.items() if _is_taken(key, value)}, step=record["step"])
    place[kind] = record["step"]
    return True


def _is_taken(key: str, value: Any) -> bool:
    """Whether wandb has a use for a value, and can encode it: a damaged record may hold anything."""
    return (
        key not in ("kind", "sequences") and key.isprintable() and (not isinstance(value, str) or value.isprintable())
    )


def new_place() -> dict[str, Any]:
    """A wandb run's id; the last step mirrored of each kind stands beside it, of none yet."""
    return {"id": uuid.uuid4().hex[:12]}


def read_place(folder: RunFolder) -> dict[str, Any]:
    """How far the run is mirrored, and where; written down at once for a run that is not.

    Raises UserError where it can't be written.
    """
    path = folder.path / MIRROR_FILE
    try:
        place = {**read_json(path, Place)}
        if all(is_step(step) for kind, step in place.items() if kind != "id"):
            return place
    except (OSError, BadJson):
        pass
    if (what := what_stands_at(path)) not in ("", "a file", "a link to nothing"):
        raise UserError(f"{path} is {what}, where the run has a file: move it away")
    place = new_place()
    try:
        write_whole(path, json.dumps(place))
    except OSError as error:
        raise UserError(refusal("written", error, path, otherwise="move it away")) from None
    return place


def write_place(folder: RunFolder, place: dict[str, Any]) -> None:
    # Replaced in one step but not synced: only a power cut could make a step appear twice.
    path = folder.path / MIRROR_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(place), encoding="utf-8")
    os.replace(temporary, path)


class WandbMirror:
    """Sends records to one wandb run, each step once, however often the run is resumed."""

    def __init__(self, folder: RunFolder, log: LogConfig, config: dict[str, Any], say: Callable[[str], None]) -> None:
        """Start the thread. Nothing that goes wrong in it raises here; `say` tells it, once."""
        self._folder = folder
        self._project = log.wandb_project
        self._finish_seconds = log.wandb_finish_seconds
        self._config = config
        self._say = say
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_RECORDS)
        self._broken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        # registered before wandb is imported, so run after wandb's own end, which may wait for the service
        atexit.register(self._leave_no_service)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """Hand over a record; never waits."""
        if self._broken.is_set():
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._give_up("it has not taken a record for too long")

    def close(self) -> None:
        """Give the mirror some time to send what is left."""
        if not self._broken.is_set():
            with contextlib.suppress(queue.Full):  # then it hangs anyway
                self._records.put_nowait(None)
            self._thread.join(self._finish_seconds)
            if self._thread.is_alive():
                self._give_up(f"it did not finish within {self._finish_seconds:.0f} s")
        if self._broken.is_set():
            # not at once: wandb's own end, at the exit of this process, first says goodbye to it
            timer = threading.Timer(SERVICE_GRACE_SECONDS, _end_service)
            timer.daemon = True
            timer.start()

    def _leave_no_service(self) -> None:
        if self._broken.is_set():
            _end_service()

    def _run(self) -> None:
        try:
            self._mirror()
        except BaseException as error:  # whatever a library that talks to a network comes up with
            self._give_up(f"{type(error).__name__}: {error}")

    def _mirror(self) -> None:
        place = read_place(self._folder)
        run = open_run(self._folder, self._project, self._config, place["id"])
        while (record := self._records.get()) is not None:
            if send(run, record, place):
                write_place(self._folder, place)
        run.finish()

    def _give_up(self, why: str) -> None:
        if not self._broken.is_set():
            self._broken.set()
            self._say(f"wandb is not mirroring this run ({' '.join(why.split())}); metrics.jsonl has everything")


def _end_service() -> None:
    """Kill wandb's service process: at its exit this one waits for it, however long it hangs."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is gone by itself
            if any(SERVICE_PROGRAM in argument for argument in process.cmdline()):
                process.kill()
