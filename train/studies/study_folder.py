"""A study's folder: what it was when its first run started, and what became of each run.

study.json        metric, base and variants, fixed when the first run starts
results/NAME.json each finished run: all that its report needs
failed/NAME.json  why a run has failed, until it is tried again
runs/NAME/        an ordinary run's folder; its checkpoints are removed when it has finished
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import keep_others, read_json_for_user
from common.publish import canonical_json, write_json_whole
from common.run_folder import RunFolder
from eval.comparison.measured_runs import MeasuredRun
from train.studies.older_runs import option_defaults
from train.studies.study_file import StudyFile

try:
    import fcntl
except ImportError:  # Windows: the runs' locks have to do
    fcntl = None  # type: ignore[assignment]

CLAIMS = ".claims"
OUTPUT = ".output"


class _Fixed(TypedDict):
    """study.json"""

    name: str
    metric: str
    base: dict[str, Any]
    sizes: dict[str, Any] | None
    variants: dict[str, dict[str, Any]]


@keep_others
class _Failed(TypedDict):
    why: str


@dataclass(frozen=True)
class StudyFolder:
    """Names of its files, and what is in them."""

    path: Path

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def results(self) -> Path:
        return self.path / "results"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.runs / name)

    def result_file(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def failure_file(self, name: str) -> Path:
        return self.path / "failed" / f"{name}.json"

    def output_file(self, name: str) -> Path:
        """What a run printed."""
        return self.runs / OUTPUT / f"{name}.txt"

    def read_result(self, name: str) -> MeasuredRun | None:
        """A finished run's; None where there is none. Raises UserError for one that is damaged."""
        return self._load(name) if self.result_file(name).is_file() else None

    def _load(self, name: str) -> MeasuredRun:
        return MeasuredRun.load(self.result_file(name)).with_defaults(option_defaults())

    def read_ended(self, name: str) -> MeasuredRun | None:
        """A run's that is done and whose result no queue has kept yet, from its folder; None of any other run."""
        if self.status(name) != "done":
            return None
        return MeasuredRun.load(self.run(name).path).with_defaults(option_defaults())

    def status(self, name: str) -> str:
        """What a run's `state` says; empty where there is none, or it can't be read."""
        try:
            return str((self.run(name).read_state() or {}).get("status", ""))
        except UserError:
            return ""

    def why_failed(self, name: str) -> str:
        """As `read_failure`, or what a run's `state` says that no queue of this machine has trained."""
        if not (why := self.read_failure(name)) and self.status(name) == "failed":
            why = str((self.run(name).read_state() or {}).get("reason") or "unknown")
        return why

    def read_failure(self, name: str) -> str:
        """Why a run has failed; empty where it has not, or has been started again."""
        try:
            return read_json_for_user(self.failure_file(name), _Failed, "delete it")["why"]
        except FileNotFoundError:
            return ""

    def record_failure(self, name: str, why: str) -> None:
        self.failure_file(name).parent.mkdir(parents=True, exist_ok=True)
        write_json_whole(self.failure_file(name), {"why": why, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def forget_failure(self, name: str) -> None:
        self.failure_file(name).unlink(missing_ok=True)

    def harvest(self, name: str, *, keep_checkpoints: bool) -> MeasuredRun:
        """Publish the result of a run that is done, then remove its checkpoints; whatever was done of that before.

        Raises UserError where its folder can't be read.
        """
        run = MeasuredRun.load(self.run(name).path)
        self.results.mkdir(parents=True, exist_ok=True)
        run.write_result(self.result_file(name))
        self.forget_failure(name)
        self.clear(name, keep_checkpoints=keep_checkpoints)
        return self._load(name)

    def clear(self, name: str, *, keep_checkpoints: bool) -> None:
        """Remove a finished run's checkpoints, which nothing of the study reads."""
        if not keep_checkpoints:
            shutil.rmtree(self.run(name).checkpoints, ignore_errors=True)

    def fix(self, study: StudyFile) -> None:
        """Record what may not change once runs exist.

        Raises UserError where it has changed since.
        """
        now, before = self._now_and_before(study)
        if before is not None:
            _refuse_changes(study, now, before, self.path)
            now["variants"] = before["variants"] | now["variants"]
        if before is None or canonical_json(now) != canonical_json(before):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json_whole(self.path / "study.json", now)

    def check(self, study: StudyFile) -> None:
        """Raise UserError where what may not change has changed since its runs started; nothing is recorded."""
        now, before = self._now_and_before(study)
        if before is not None:
            _refuse_changes(study, now, before, self.path)

    def _now_and_before(self, study: StudyFile) -> tuple[_Fixed, _Fixed | None]:
        now: _Fixed = {
            "name": study.name,
            "metric": study.metric,
            "base": study.base,
            "sizes": None if study.sizes is None else {
                "width_per_layer": study.sizes.width_per_layer, "head_size": study.sizes.head_size},
            "variants": {name: variant.options for name, variant in study.variants.items()},
        }  # fmt: skip
        return now, self._read_fixed() if self._has_runs() else None

    def _read_fixed(self) -> _Fixed | None:
        with contextlib.suppress(FileNotFoundError):
            return read_json_for_user(self.path / "study.json", _Fixed, "put it back")
        return None

    def _has_runs(self) -> bool:
        return any(self.results.glob("*.json")) or any(self.runs.glob("*/config.yaml"))

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process, until the block ends, is the only queue that may start or harvest a run.

        The system takes a claim back when its process dies. Where it has no such locks (some shared file systems), the
        run's own lock decides.
        """
        folder = self.runs / CLAIMS
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "ab") as file:
            mine = True
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    mine = False
                except OSError:
                    pass
            yield mine


def _refuse_changes(study: StudyFile, now: _Fixed, before: _Fixed, folder: Path) -> None:
    anew = "put it back, or start another study with --out"
    if now["name"] != before["name"]:
        raise UserError(f"{folder} holds runs of the study {before['name']}, not {now['name']}: name another --out")
    if now["metric"] != before["metric"]:
        raise UserError(
            f"study {study.path}: metric was {before['metric']} when its runs started, and is now {now['metric']}: a "
            f"metric that is chosen after results are known proves nothing: {anew}"
        )
    if now["sizes"] != before["sizes"]:
        raise UserError(f"study {study.path}: sizes follow another rule than those of its runs: {anew}")
    places: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("base", before["base"], now["base"])]
    places += [
        (f"variants.{name}", before["variants"][name], options)
        for name, options in now["variants"].items()
        if name in before["variants"]
    ]
    for place, old, new in places:
        changed = [key for key in (*old, *new) if canonical_json(old.get(key)) != canonical_json(new.get(key))]
        if changed:
            key = changed[0]
            raise UserError(
                f"study {study.path}: {place} had {key} {old.get(key)} when its runs started, and now has "
                f"{new.get(key)}: {anew if place == 'base' else 'put it back, or add a variant of another name'}"
            )
