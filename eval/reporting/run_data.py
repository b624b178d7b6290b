"""What a run's folder holds, read leniently: a running run, an old record or a copied folder all give a report."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.bad_batch import BadBatch, read_bad_batches
from common.errors import UserError
from common.json_file import BadJson, as_shape
from common.liveness import Liveness, look_at
from common.measured import causality
from common.metric_fields import LARGEST, NUMBER, fits, is_step
from common.metrics_table import MetricsTable, Values
from common.plain_text import printable
from common.run_files import Score, leniently, read_configuration, read_samples, read_score, read_starts, read_table
from common.run_folder import RunFolder
from common.step_profile import StepProfile, read_step_profiles
from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count

SECONDS_AN_HOUR = 3600.0
MOST_LAYERS = 100_000  # each is counted by itself


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
    score: Score  # what was measured after training, to stand beside published models
    profiles: list[StepProfile] = field(default_factory=list)  # by step
    bad_batches: list[BadBatch] = field(default_factory=list)  # by step
    complaints: list[str] = field(default_factory=list)  # of files that are there and can't be read

    @cached_property
    def model(self) -> ModelConfig | None:
        return _model_of(self.section("model"))

    @property
    def parameters(self) -> int | None:
        return parameter_count(self.model) if self.model else None

    @cached_property
    def flops_per_token(self) -> int | None:
        return flops_per_token_of(self.config)

    @cached_property
    def adapters(self) -> int | None:
        """Parameters of the adapters that were trained beside frozen weights; None where those were trained."""
        return _adapters_of(self.model, self.section("lora"))

    @property
    def causal(self) -> bool | None:
        """Whether no prediction depends on later tokens; None where that was not checked."""
        return causality(self.table.of_kind("val_loss"))

    @property
    def leaks(self) -> bool:
        """Whether a validation found that earlier predictions depend on later tokens: its losses mean nothing then."""
        return self.causal is False

    @property
    def max_steps(self) -> int | None:
        value = self.section("run").get("max_steps")
        return value if is_step(value) else None

    @property
    def grad_clip(self) -> float | None:
        """At which gradients were clipped; None where they weren't, or it is unknown."""
        value = self.section("optim").get("grad_clip")
        return float(value) if value and fits("grad_norm", value) else None

    def newest(self, key: str) -> int:
        """The newest count under a key of the training steps; 0 where none was recorded."""
        values = self.table.column(key)
        values = values[np.isfinite(values)]
        return int(values[-1]) if len(values) else 0

    def tokens_at(self, steps: Values) -> Values:
        """Tokens of the run after so many steps, by its record; in proportion before it and after it."""
        return _along(steps, *self._steps_and_tokens())

    def steps_at(self, tokens: Values) -> Values:
        """The other way round; between two steps where tokens are."""
        return _along(tokens, *reversed(self._steps_and_tokens()))

    def _steps_and_tokens(self) -> tuple[Values, Values]:
        """Both rising, from 0 on; one token a step where nothing is recorded."""
        steps, tokens = self.table.column("step"), self.table.column("tokens")
        known = np.isfinite(steps) & np.isfinite(tokens) & (steps > 0) & (tokens > 0)
        steps, tokens = (np.concatenate([[0.0], column[known]]) for column in (steps, tokens))
        highest = np.maximum.accumulate(tokens)
        rising = np.concatenate([[True], (np.diff(highest) > 0) & (np.diff(np.maximum.accumulate(steps)) > 0)])
        return (steps[rising], tokens[rising]) if rising.sum() > 1 else (np.array([0.0, 1.0]), np.array([0.0, 1.0]))

    @property
    def status(self) -> str:
        return str(self.state.get("status", "unknown"))

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration, empty where it has none."""
        return _section(self.config, name)

    def hours(self, times: Values) -> Values:
        """Hours the run had been running at these times (seconds since the epoch); the time it was stopped left out."""
        lives = self.table.lives
        gaps = [0.0] + [max(0.0, later.start - earlier.end) for earlier, later in pairwise(lives)]
        starts = np.array([life.start for life in lives])
        index = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, None)
        return np.asarray((times - starts[0] - np.cumsum(gaps)[index]) / SECONDS_AN_HOUR)

    def event_column(self, key: str, value: str) -> Values:
        """`value` of all comparable records that hold `key`, NaN where it is missing or not a number."""
        found = [event.get(value) for event in self.table.comparable(key)]
        return np.array([number if NUMBER.has(number) else np.nan for number in found], dtype=np.float64)


def flops_per_token_of(config: Mapping[str, Any]) -> int | None:
    """In training, by the closed form; None for a configuration that does not tell."""
    model = _model_of(_section(config, "model"))
    return flops_per_token(model, adapters=_adapters_of(model, _section(config, "lora"))) if model else None


def _along(values: Values, here: Values, there: Values) -> Values:
    """Linear between points that rise, and from the first and the last two on as between these."""
    values = np.asarray(values, dtype=np.float64)
    found = np.interp(values, here, there)
    for first, second, beyond in ((0, 1, values < here[0]), (-1, -2, values > here[-1])):
        slope = (there[second] - there[first]) / (here[second] - here[first])
        found = np.where(beyond, there[first] + (values - here[first]) * slope, found)
    return np.asarray(found)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _model_of(section: Mapping[str, Any]) -> ModelConfig | None:
    if not section:
        return None
    try:
        model = as_shape(section, ModelConfig)
        return model if model.n_layer <= MOST_LAYERS and flops_per_token(model) < LARGEST else None
    except (BadJson, ArithmeticError):
        return None


def _adapters_of(model: ModelConfig | None, section: Mapping[str, Any]) -> int | None:
    if not model or not section.get("rank"):
        return None
    from model.lora_config import TARGETS, LoraConfig, adapter_count

    try:
        targets, new_rows = tuple(section["targets"] or TARGETS), section.get("new_rows", 0)
        count = adapter_count(model, LoraConfig(section["rank"], targets=targets, new_rows=new_rows))
    except (KeyError, TypeError, ValueError):
        return None
    return count if isinstance(count, int) and 0 <= count < LARGEST else None


def load_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read runs, naming them by their folders, as much of the paths as distinguishes them.

    One that can't be read is left out, with a line on standard error.

    Raises UserError for a folder that is not a run or has no training step yet, and where none of them can be read.
    """
    resolved = [path.resolve() for path in paths]
    depth = 1
    while depth < 4 and len({path.parts[-depth:] for path in resolved}) < len(set(resolved)):
        depth += 1
    names = ["/".join(full.parts[-depth:]) for full in resolved]
    tables = [_read_table_of(path, complain=len(paths) > 1) for path in paths]
    runs = [load_run(path, name, table) for path, name, table in zip(paths, names, tables, strict=True) if table]
    if not runs:
        raise UserError("none of these runs can be read: name others")
    return runs


def load_run(path: Path, name: str | None = None, table: MetricsTable | None = None) -> RunData:
    """Read one run, its `table` where that has been read. A file of it that can't be read costs its contents.

    Raises UserError for a folder that is not a run or has no training step yet.
    """
    folder, table = RunFolder(path), table or _table_with_steps(RunFolder(path))
    complaints = [table.complaint] if table.complaint else []
    return RunData(
        folder,
        printable(name or path.resolve().name),
        table,
        leniently(lambda: read_configuration(folder), complaints) or {},
        leniently(lambda: read_starts(folder.provenance), complaints) or [],
        leniently(lambda: folder.read_state() or {}, complaints) or {},
        look_at(folder, time.time()),
        leniently(lambda: read_samples(folder), complaints) or [],
        leniently(lambda: read_score(folder), complaints) or Score(),
        leniently(lambda: read_step_profiles(folder), complaints) or [],
        leniently(lambda: read_bad_batches(folder), complaints) or [],
        complaints,
    )


def tell_complaints(runs: Sequence[RunData]) -> None:
    """A line on standard error for each file of the runs that can't be read."""
    for complaint in dict.fromkeys(complaint for run in runs for complaint in run.complaints):
        print(f"left out: {complaint}", file=sys.stderr)


def _read_table_of(path: Path, *, complain: bool) -> MetricsTable | None:
    """A run's metrics; of several, None and a line on standard error where they can't be read. Raises UserError."""
    folder = RunFolder(path)
    if not complain or not os.path.lexists(folder.metrics):
        return _table_with_steps(folder)
    try:
        return _table_with_steps(folder)
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return None


def _table_with_steps(folder: RunFolder) -> MetricsTable:
    """Raises UserError for a folder that is not a run or has no training step yet, or whose metrics can't be read."""
    table = read_table(folder)
    if len(table) == 0 and not folder.metrics.exists():
        raise UserError(f"{folder.path} is not a run's folder: it has no {folder.metrics.name}")
    if len(table) == 0:
        raise UserError(f"{folder.metrics} has no training steps yet: try again when the run has started")
    return table


def training_script(config: Mapping[str, Any], starts: Sequence[Mapping[str, Any]]) -> str:
    """What trains such a run: `train/pretrain.py`, or `train/finetune.py` with the base that its command named."""
    if "lora" not in config:
        return "train/pretrain.py"
    try:
        words = shlex.split(str(starts[0].get("command", ""))) if starts else []
    except ValueError:  # a quotation without an end
        words = []
    bases = [after for before, after in pairwise(words) if Path(before).name == "finetune.py"]
    return f"train/finetune.py {shlex.quote(bases[0]) if bases else 'RUN_OR_CHECKPOINT'}"


def format_time(seconds: float | None) -> str:
    """Seconds since the epoch as a local date and time, with its offset."""
    if seconds is None or not np.isfinite(seconds):
        return "unknown"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "unknown"
