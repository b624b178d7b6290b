"""What a run's folder tells, read leniently: a run still going, an old record or a copied folder all give a report."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.errors import UserError
from common.liveness import Liveness, look_at
from common.metrics_file import read_json_lines
from common.metrics_table import MetricsTable, Values, read_metrics_table
from common.plain_text import printable
from common.run_folder import RunFolder
from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class RunData:
    """One run. What its folder does not hold is empty or None."""

    folder: RunFolder
    name: str
    table: MetricsTable
    config: dict[str, Any]
    starts: list[dict[str, Any]]  # of provenance.json, one a start
    state: dict[str, Any]
    liveness: Liveness  # when the folder was read
    samples: list[dict[str, Any]]
    hellaswag: dict[str, Any]  # what eval/hellaswag.py wrote to report/hellaswag.json

    @cached_property
    def model(self) -> ModelConfig | None:
        known = {field.name for field in fields(ModelConfig)}
        section = self.config.get("model")
        if not isinstance(section, dict) or not section:
            return None
        try:
            return ModelConfig(**{key: value for key, value in section.items() if key in known})
        except (TypeError, ValueError):
            return None

    @property
    def parameters(self) -> int | None:
        return parameter_count(self.model) if self.model else None

    @property
    def flops_per_token(self) -> int | None:
        return flops_per_token(self.model, adapters=self.adapters) if self.model else None

    @cached_property
    def adapters(self) -> int | None:
        """Parameters of the adapters that were trained beside frozen weights; None where those were trained."""
        section = self.section("lora")
        if not self.model or not section.get("rank"):
            return None
        from model.lora import TARGETS, LoraConfig, adapter_count  # here: other runs' reports need not wait for torch

        try:
            return adapter_count(self.model, LoraConfig(section["rank"], targets=tuple(section["targets"] or TARGETS)))
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def max_steps(self) -> int | None:
        value = self.section("run").get("max_steps")
        return value if isinstance(value, int) else None

    @property
    def tokens_per_step(self) -> float:
        """Of the newest step."""
        return float(self.table.tail("tokens", 1)[0] / self.table.tail("step", 1)[0])

    @property
    def status(self) -> str:
        return str(self.state.get("status", "unknown"))

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration, empty where it has none."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def hours(self, times: Values) -> Values:
        """Hours the run had been running at these times (seconds since the epoch); the time it was stopped left out."""
        lives = self.table.lives
        gaps = [0.0] + [max(0.0, later.start - earlier.end) for earlier, later in pairwise(lives)]
        starts = np.array([life.start for life in lives])
        index = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, None)
        return np.asarray((times - starts[0] - np.cumsum(gaps)[index]) / SECONDS_AN_HOUR)

    def event_column(self, key: str, value: str) -> Values:
        """`value` of all comparable records that hold `key`, NaN where it is missing."""
        return np.array([event.get(value) for event in self.table.comparable(key)], dtype=np.float64)


def load_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read runs, naming them by their folders, as much of the paths as tells them apart.

    Raises UserError for a folder that is no run or has no training step yet.
    """
    resolved = [path.resolve() for path in paths]
    depth = 1
    while depth < 4 and len({path.parts[-depth:] for path in resolved}) < len(set(resolved)):
        depth += 1
    return [load_run(path, "/".join(full.parts[-depth:])) for path, full in zip(paths, resolved, strict=True)]


def load_run(path: Path, name: str | None = None) -> RunData:
    """Read one run. Raises UserError for a folder that is no run or has no training step yet."""
    folder = RunFolder(path)
    if not folder.metrics.is_file():
        raise UserError(f"{path} is no run's folder: it has no {folder.metrics.name}")
    table = read_metrics_table(folder.metrics)
    if len(table) == 0:
        raise UserError(f"{folder.metrics} has no training steps yet: try again when the run has begun")
    return RunData(
        folder,
        printable(name or path.resolve().name),
        table,
        read_configuration(folder),
        read_starts(folder),
        read_state_leniently(folder),
        look_at(folder, time.time()),
        [sample for sample in read_json_lines(folder.samples) if isinstance(sample.get("step"), int)],
        _read_object(folder.report / "hellaswag.json"),
    )


def read_configuration(folder: RunFolder) -> dict[str, Any]:
    """The run's resolved configuration; empty where the folder has none that can be read."""
    try:
        content = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def read_state_leniently(folder: RunFolder) -> dict[str, Any]:
    """The run's `state`; empty where it has none that can be read."""
    try:
        return folder.read_state() or {}
    except (OSError, UserError):
        return {}


def read_starts(folder: RunFolder) -> list[dict[str, Any]]:
    """What provenance.json tells of each start; empty where the folder has none that can be read."""
    starts = _read_object(folder.provenance).get("starts")
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def training_script(config: Mapping[str, Any], starts: Sequence[Mapping[str, Any]]) -> str:
    """What trains such a run: `train/pretrain.py`, or `train/finetune.py` with the base that its command named."""
    if "lora" not in config:
        return "train/pretrain.py"
    words = shlex.split(str(starts[0].get("command", ""))) if starts else []
    bases = [after for before, after in pairwise(words) if Path(before).name == "finetune.py"]
    return f"train/finetune.py {shlex.quote(bases[0]) if bases else 'RUN_OR_CHECKPOINT'}"


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def format_time(seconds: float | None) -> str:
    """Seconds since the epoch as a local date and time, with its offset."""
    if seconds is None or not np.isfinite(seconds):
        return "unknown"
    return time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(seconds))
