"""The live view of a run: lines of text for a terminal of any size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.batch_stages import BatchStages
from common.curves import VALIDATION, format_figure
from common.layer_figures import KIND as LAYERS
from common.layer_figures import by_name
from common.liveness import Liveness, Signs, judge, read_signs
from common.measured import NOT_CAUSAL, causality
from common.metric_fields import VALIDATED, by_source, is_step
from common.metrics_file import last_json_lines
from common.metrics_table import MetricsTable
from common.progress import format_count, format_duration
from common.run_files import leniently, read_configuration, reward_of, unreadable
from common.run_folder import RunFolder
from eval.reporting.live_curves import curves_of
from eval.reporting.look import Look, fit
from eval.reporting.run_data import flops_per_token_of

RATE_STEPS = 200  # newest steps that rates and ETA are taken from
SHOWN_LAYERS = {"gradient_norm": "gradient", "update_ratio": "update/weight", "attention_logit": "attention logit"}
COLORS = {"done": "32", "failed": "31", "preempted": "33", "running": "36", "silent": "31", "gone": "31"}


@dataclass
class LiveRun:
    """A run that is read repeatedly."""

    folder: RunFolder
    table: MetricsTable
    state: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    stages: BatchStages | None = None
    flops_per_token: int | None = None
    sample: dict[str, Any] = field(default_factory=dict)
    signs: Signs | None = None
    complaints: list[str] = field(default_factory=list)  # of files that can't be read, at the last look
    _config_time: float = -1.0
    _config_complaints: list[str] = field(default_factory=list)

    def refresh(self) -> None:
        """Read what is new. Files that are missing or half written are skipped until the next time."""
        self.complaints = []
        try:
            self.table.update()
        except OSError as error:
            self.complaints.append(unreadable(self.folder.metrics, error))
        self.complaints += [self.table.complaint] if self.table.complaint else []
        self.state = leniently(lambda: self.folder.read_state() or {}, self.complaints) or {}
        self.signs = read_signs(self.folder)
        try:
            changed = self.folder.config.stat().st_mtime
        except OSError:
            changed = -1.0
        if changed != self._config_time:
            self._config_time, self._config_complaints = changed, []
            config = leniently(lambda: read_configuration(self.folder), self._config_complaints) or {}
            section = config.get("run")
            steps = section.get("max_steps") if isinstance(section, dict) else None
            self.max_steps = steps if is_step(steps) else None
            self.stages = BatchStages.of_config(config)
            self.flops_per_token = flops_per_token_of(config)
        self.complaints += self._config_complaints
        self.sample = _last_sample(self.folder.samples) or self.sample

    def frame(self, width: int, height: int, look: Look, now: float) -> list[str]:
        """See the function of this name."""
        return frame(self, width, height, look, now)

    @property
    def leaks(self) -> bool:
        """Whether it is known not to be causal."""
        return causality(self.table.of_kind("val_loss")) is False

    @property
    def flops(self) -> float | None:
        """In training so far."""
        tokens = float(self.table.tail("tokens", 1)[0])
        return tokens * self.flops_per_token if self.flops_per_token and math.isfinite(tokens) else None

    def liveness(self, now: float) -> Liveness:
        """Whether it makes progress. `now` in seconds since the epoch."""
        return judge(self.signs or read_signs(self.folder), now)


@dataclass(frozen=True)
class SeveralRuns:
    """Runs one below the other, each with its share of the terminal's height."""

    runs: tuple[LiveRun, ...]

    def refresh(self) -> None:
        for run in self.runs:
            run.refresh()

    def frame(self, width: int, height: int, look: Look, now: float) -> list[str]:
        """As `frame`; those for which there is no room are counted in the last line."""
        shown = self.runs[: max(1, height // 4)]
        left_out = len(self.runs) - len(shown)
        room, lines = height - (left_out > 0), []
        for number, run in enumerate(shown):
            share = room // len(shown) + (number < room % len(shown))
            part = frame(run, width, share - (number < len(shown) - 1), look, now)
            lines += part + [""] * (share - len(part) if number < len(shown) - 1 else 0)
        return (lines + [f"{left_out} more for which the terminal is too low"] * (left_out > 0))[:height]


def _last_sample(path: Path) -> dict[str, Any]:
    """The last whole line of the samples, from the end of the file."""
    samples = [sample for sample in last_json_lines(path) if isinstance(sample.get("text"), str)]
    return samples[-1] if samples else {}


def frame(run: LiveRun, width: int, height: int, look: Look, now: float) -> list[str]:
    """At most `height` lines of at most `width` characters each (colours not counted).

    Args:
        now: seconds since the epoch.
    """
    lines = [_title(run, width, look, now)]
    lines += [look.paint(fit(complaint, width, look), "31") for complaint in run.complaints[: max(0, height - 8)]]
    if run.leaks:
        lines.append(look.paint(fit(NOT_CAUSAL, width, look), "31"))
    if len(run.table) == 0:
        return [*lines, fit("no training step yet: waiting for the first one", width, look)][:height]
    lines += [fit(line, width, look) for line in (_progress(run, width, look, now), _figures(run))]
    lines += [fit(line, width, look) for line in _rows(_evaluations(run), width, max(1, height // 5))]
    lines += [fit(line, width, look) for line in (_sources(run), _layers(run))]
    lines = [line for line in lines if line]
    sample = _sample_lines(run, width, look, 3 if height >= 20 else 1 if height >= 10 else 0)
    room = height - len(lines) - len(sample)
    lines += curves_of(run.table, width, room, look) + sample
    return lines[:height]


def _title(run: LiveRun, width: int, look: Look, now: float) -> str:
    name = run.folder.path.resolve().name
    alive = run.liveness(now)
    said = [name, str(alive)]
    if run.state.get("host"):
        said.append(f"on {run.state['host']}")
    if run.state.get("job_id"):
        said.append(f"job {run.state['job_id']}")
    restarts = len(run.table.lives) - 1
    if restarts > 0:
        said.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    return look.paint(fit("  ".join(said), width, look), f"1;{'31' if alive.trouble else COLORS.get(alive.word, '0')}")


def mean(run: LiveRun, key: str) -> float:
    """Over the newest steps' finite values; 0 without any."""
    values = run.table.tail(key, RATE_STEPS)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else 0.0


def seconds_per_step(table: MetricsTable) -> float | None:
    """Of the newest steps since the last start, with validations and saves between them; None for fewer than two."""
    times = table.tail("time", RATE_STEPS)
    times = times[times >= table.lives[-1].start] if table.lives else times
    return float((times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else None


def seconds_left(run: LiveRun, now: float) -> float | None:
    """Until the last step, for a run that makes progress; None where that can't be known. `now` as for `frame`."""
    seconds, step = seconds_per_step(run.table), run.table.tail("step", 1)
    if seconds is None or run.max_steps is None or not run.liveness(now).is_progressing or step[0] >= run.max_steps:
        return None
    left, tokens = run.max_steps - float(step[0]), run.table.tail("tokens", RATE_STEPS)
    if run.stages is not None and len(tokens) > 1 and tokens[-1] > tokens[0] >= 0:  # a batch that grows takes longer
        end = run.stages.tokens_after(int(left), int(tokens[-1]))
        left = (end - float(tokens[-1])) / (float(tokens[-1] - tokens[0]) / (len(tokens) - 1))
    return max(0.0, left * seconds - max(0.0, now - run.table.lives[-1].end))


def _progress(run: LiveRun, width: int, look: Look, now: float) -> str:
    step = int(run.table.tail("step", 1)[0])
    tokens = format_count(float(run.table.tail("tokens", 1)[0]))
    flops = "" if run.flops is None else f", {run.flops:.3g} FLOPs"
    if not run.max_steps:
        return f"step {step:,}, {tokens} tokens{flops}"
    share = min(1.0, step / run.max_steps)
    text = f"step {step:,} of {run.max_steps:,} ({share:.1%}), {tokens} tokens{flops}"
    if (left := seconds_left(run, now)) is not None:
        text += f", ETA {format_duration(left)}"
    room = min(40, width - len(text) - 3)
    if room < 8:
        return text
    full, empty = ("█", "░") if look.unicode else ("#", ".")
    done = round(share * room)
    return f"{full * done}{empty * (room - done)}  {text}"


def _figures(run: LiveRun) -> str:
    table = run.table
    last = {key: float(table.tail(key, 1)[0]) for key in ("lr", "grad_norm", "memory_gib")}
    parts = [f"loss {_mean_of_last_losses(table):.4f}", f"lr {last['lr']:.3g}", f"norm {last['grad_norm']:.2f}"]
    parts.append(f"{format_count(mean(run, 'tokens_per_second'))} tokens/s")
    mfu, step_seconds = mean(run, "mfu"), mean(run, "step_seconds")
    parts += [f"MFU {mfu:.1%}"] if mfu else []
    if step_seconds:
        parts.append(
            f"{format_duration(step_seconds)} a step, {mean(run, 'data_wait_seconds') / step_seconds:.1%} data"
        )
    parts += [f"{last['memory_gib']:.2f} GiB"] if math.isfinite(last["memory_gib"]) else []
    return "  ".join(parts)


def _sources(run: LiveRun) -> str:
    """The newest losses of a mix's sources."""
    trained = {name: losses[np.isfinite(losses)][-20:] for name, losses in run.table.losses_by_source().items()}
    parts = [f"{name} {losses.mean():.4f}" for name, losses in trained.items() if len(losses)]
    shown = [f"loss by source: {', '.join(parts)}"] if parts else []
    comparable = run.table.comparable("val_loss")
    validated = by_source(comparable[-1], VALIDATED) if comparable else {}
    parts = [f"{key.removeprefix(f'{VALIDATED}.')} {loss:.4f}" for key, loss in validated.items()]
    return "  ".join(shown + ([f"validation: {', '.join(parts)}"] if parts else []))


def _mean_of_last_losses(table: MetricsTable) -> float:
    losses = table.tail("loss", 20)
    return float(np.nanmean(losses)) if np.isfinite(losses).any() else math.nan


def _rows(parts: Sequence[str], width: int, most: int) -> list[str]:
    """Parts side by side, in at most so many lines; the last one has all that is left."""
    rows: list[str] = []
    for part in parts:
        if rows and (len(rows) == most or len(rows[-1]) + 2 + len(part) <= width):
            rows[-1] += f"  {part}"
        else:
            rows.append(part)
    return rows


def _evaluations(run: LiveRun) -> list[str]:
    parts = []
    comparable = run.table.comparable("val_loss")
    validations = [event for event in comparable if event["val_loss"] is not None]
    if validations:
        shown = ", ".join(f"{event['val_loss']:.4f}" for event in validations[-4:])
        others = len(run.table.of_kind("val_loss")) - len(comparable)
        left_out = f"; {others} of another measure left out" if others and len(validations) < 4 else ""
        parts.append(f"validation {shown} (step {validations[-1]['step']:,}{left_out})")
        bits = validations[-1].get("val_bits_per_byte")
        parts += [] if bits is None else [f"{bits:.4f} bits per byte"]
    for curve in run.table.curves:
        measured = run.table.of_kind(curve.figure)
        if curve.kind != VALIDATION.kind and measured and (value := curve.value(measured[-1])) is not None:
            parts.append(f"{curve.label} {format_figure(value)}")
    if run.table.skips:
        parts.append(f"{run.table.skips:,} skipped")
    if count := len(run.table.rollbacks):
        parts.append(f"{count} roll-back{'s' if count > 1 else ''}")
    saves = run.table.of_kind("save_seconds")
    if saves:
        parts.append(f"saved at step {saves[-1]['step']:,}")
    return parts


def _layers(run: LiveRun) -> str:
    """Where the newest layer statistics are largest."""
    newest = [event for event in run.table.of_kind("parts") if event.get("kind") == LAYERS][-1:]
    parts = []
    for figure, label in SHOWN_LAYERS.items():
        values = by_name(newest[0]).get(figure) if newest else None
        if values:
            name = max(values, key=lambda name: values[name])
            parts.append(f"{label} {values[name]:.3g} in {name}")
    return f"layers at step {newest[0]['step']:,}: largest {', '.join(parts)}" if parts else ""


def _sample_lines(run: LiveRun, width: int, look: Look, count: int) -> list[str]:
    if not run.sample or count == 0:
        return []
    reward = reward_of(run.sample)
    worth = f", reward {reward}" if reward else ""
    text = f"sample, step {run.sample.get('step', '?')}{worth}: {run.sample.get('prompt', '')}|{run.sample['text']}"
    text = " ".join(text.split())
    ends = [(row + 1) * width if row < count - 1 else len(text) for row in range(count)]
    rows = [fit(text[row * width : end], width, look) for row, end in enumerate(ends)]
    return [row for row in rows if row]
