"""Weights & Biases as a mirror of `metrics.jsonl`.

Offline unless WANDB_MODE is online: compute nodes have no network, and `wandb sync` uploads later. WANDB_PROJECT,
WANDB_ENTITY and WANDB_RUN_GROUP count as they do for wandb itself.
"""

import atexit
import contextlib
import json
import os
import threading
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import psutil
from pydantic import Field
from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import BadJson, keep_others, read_json
from common.metric_fields import is_step
from common.metrics_file import record_kind
from common.os_errors import refusal
from common.packages import require_packages
from common.plain_text import printable
from common.publish import write_whole
from common.regular_file import what_stands_at
from common.run_folder import RunFolder
from train.run.mirror import SAMPLES, Mirror, grouped
from train.settings.sections import LogConfig

SERVICE_PROGRAM = "wandb-core"
SERVICE_GRACE_SECONDS = 1.0
MIRROR_FILE = "wandb-mirror.json"


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
        project=os.environ.get("WANDB_PROJECT") or project,
        name=printable(folder.path.name),
        id=run_id,
        resume="allow",
        dir=str(folder.path),
        config=config,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
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


class WandbWriter:
    """Sends records to one wandb run, each step once, however often the run is resumed."""

    name = "wandb"

    def __init__(self, folder: RunFolder, project: str, config: dict[str, Any], *, again: bool = False) -> None:
        """Args: project: unless WANDB_PROJECT names another. again: into a new wandb run."""
        self._folder, self._project, self._config, self._again = folder, project, config, again
        self._run: Any = None
        self.place: dict[str, Any] = {}
        self.keeps_place = True  # writes down after every record how far it is

    def open(self) -> str:
        """Raises UserError where wandb isn't installed or the place can't be written, and whatever wandb does."""
        require_packages({"wandb": "wandb"}, "a mirror for Weights & Biases")
        self.place = new_place() if self._again else read_place(self._folder)
        self._run = open_run(self._folder, self._project, self._config, self.place["id"])
        return where(self._run)

    def take(self, record: dict[str, Any]) -> bool:
        return self._take(record_kind(record), record["step"], lambda: grouped(record))

    def take_samples(self, step: int, texts: list[tuple[str, str]]) -> bool:
        return self._take(SAMPLES, step, lambda: {SAMPLES: _table(step, texts)})

    def finish(self) -> None:
        self._run.finish()

    def _take(self, kind: str, step: int, values: Callable[[], dict[str, Any]]) -> bool:
        """Log what is not there yet, by the place."""
        if step <= self.place.get(kind, -1):
            return False
        self._run.log(values(), step=step)
        self.place[kind] = step
        if self.keeps_place:
            write_place(self._folder, self.place)
        return True


def _table(step: int, texts: list[tuple[str, str]]) -> Any:
    import wandb

    rows = [[step, printable(prompt), text] for prompt, text in texts]
    return wandb.Table(columns=["step", "prompt", "text"], data=rows)


def where(run: Any) -> str:
    """Where a wandb run is to be found, in words."""
    if not getattr(run, "offline", True):
        return str(run.url)
    folder = getattr(run, "dir", None)
    return "offline" if folder is None else f"offline, 'wandb sync {os.path.dirname(folder)}' uploads it"


class WandbMirror(Mirror):
    """A mirror that leaves no service of wandb's behind."""

    def __init__(self, folder: RunFolder, log: LogConfig, config: dict[str, Any], say: Callable[[str], None]) -> None:
        # registered before wandb is imported, so run after wandb's own end, which may wait for the service
        atexit.register(self._leave_no_service)
        super().__init__(WandbWriter(folder, log.wandb_project, config), say, log.wandb_finish_seconds)

    def close(self) -> None:
        super().close()
        if self.broken.is_set():
            # not at once: wandb's own end, at the exit of this process, first says goodbye to it
            timer = threading.Timer(SERVICE_GRACE_SECONDS, _end_service)
            timer.daemon = True
            timer.start()

    def _leave_no_service(self) -> None:
        if self.broken.is_set():
            _end_service()


def _end_service() -> None:
    """Kill wandb's service process: at its exit this one waits for it, however long it hangs."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is gone by itself
            if any(SERVICE_PROGRAM in argument for argument in process.cmdline()):
                process.kill()
