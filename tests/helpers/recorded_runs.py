"""Folders of runs as the trainer leaves them, made in an instant: a second a step, known times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.curves import Curve
from common.metrics_file import MetricsFile
from common.run_folder import RunFolder
from common.step_profile import PARTS, trace_name

BEGIN = 1_700_000_000.0
TOKENS_PER_STEP = 1_000
START_SECONDS, PAUSE_SECONDS, VALIDATION_SECONDS, WAIT_SECONDS, SAVE_SECONDS = 5.0, 60.0, 2.0, 0.25, 0.5
OWN_SECONDS = 1.0
OWN = Curve(
    kind="toy",
    figure="toy_share",
    label="Toy <b>share</b>",
    error="toy_share_stderr",
    seconds="toy_seconds",
    measured_on=(("toy_questions",),),
    higher_is_better=True,
)
MODEL = {"vocab_size": 257, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "position": "rope"}


def train_record(step: int, now: float, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": TOKENS_PER_STEP / 1.0,
        "mfu": None,
        "step_seconds": 1.0,
        "data_wait_seconds": WAIT_SECONDS,
        "memory_gib": 0.5,
        "time": now,
        **more,
    }


def write_run(
    folder: RunFolder,
    *,
    lives: Sequence[tuple[int, int]] = ((0, 40),),
    validate_every: int = 10,
    learning_rate: float = 1e-3,
    end_loss: float = 2.0,
    hellaswag: bool = False,
    official: bool = True,
    own: bool = False,
) -> None:
    """A run of several lives, each (steps done when it began, last step): 5 s to start, 60 s from one to the next.

    A step takes 1 s, 0.25 of them waiting for data; each validation 2 s with a save of 0.5 s after it. With
    `own` there is an evaluation that only the starts describe, `OWN`: 1 s each time, best at step 20.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    config = {"model": MODEL, "data": {"path": "data/tiny"}, "optim": {"lr": learning_rate, "grad_clip": 1.0}}
    folder.config.write_text(yaml.safe_dump({**config, "run": {"name": folder.path.name, "max_steps": 100}}))
    metrics, now = MetricsFile(folder.metrics), BEGIN
    for first, last in lives:
        described = {"curves": [OWN.as_json()]} if own else {}
        metrics.append({"kind": "start", "step": first, "world_size": 2, "time": now, **described})
        now += START_SECONDS
        for step in range(first + 1, last + 1):
            now += 1.0
            metrics.append(train_record(step, now, end_loss + 4.0 / step))
            if step % validate_every == 0:
                tokens = step * TOKENS_PER_STEP
                now += VALIDATION_SECONDS
                validation = {
                    "step": step,
                    "tokens": tokens,
                    "val_loss": end_loss + 0.5 + 4.0 / step,
                    "val_sha256": "ab12" * 16,
                }
                metrics.append({**validation, "val_seconds": VALIDATION_SECONDS, "time": now})
                if hellaswag:
                    score = {
                        "hellaswag_acc_norm": 0.25 + step / 1000,
                        "hellaswag_acc_norm_stderr": 0.02,
                        "hellaswag_examples": 400,
                        "hellaswag_official": official,
                    }
                    metrics.append({"kind": "hellaswag", "step": step, "tokens": tokens, **score, "time": now})
                if own:
                    now += OWN_SECONDS
                    share = {"toy_share": 0.75 - abs(step - 20) / 100, "toy_share_stderr": 0.01, "toy_questions": 8}
                    more = {"toy_seconds": OWN_SECONDS, "time": now}
                    metrics.append({"kind": "toy", "step": step, "tokens": tokens, **share, **more})
                now += SAVE_SECONDS
                metrics.append({"kind": "save", "step": step, "save_seconds": SAVE_SECONDS, "time": now})
        now += PAUSE_SECONDS
    metrics.close()
    starts = [{"time": "2026-01-01", "command": "python train/pretrain.py", "revision": "0123abcd", "diff": None,
               "python": "3.11.7", "packages": {"torch": "2.13.0"}, "ranks": [{"host": "node7", "cpu": "Fast CPU"}]}
              | ({"version": f"0.{life}.0"} if life else {})  # as a run has it that an older version started
              for life in range(len(lives))]  # fmt: skip
    folder.provenance.write_text(json.dumps({"starts": starts}))
    samples = MetricsFile(folder.samples)
    for step in (10, 20):
        samples.append({"step": step, "prompt": "Once", "text": f" upon step {step} <script>alert(1)</script>"})
    samples.close()
    folder.write_state("done", reason="all steps done", step=lives[-1][1], tokens=lives[-1][1] * TOKENS_PER_STEP)


def recorded_run(root: Path, name: str, **options: Any) -> RunFolder:
    """`write_run` in root/runs/name."""
    folder = RunFolder(root / "runs" / name)
    write_run(folder, **options)
    return folder


def a_profile(first: int, last: int, **seconds: float) -> dict[str, Any]:
    """A table of profiled steps as the trainer writes it, with these seconds by part."""
    seconds = seconds or {"matrix_products": 3.0, "idle": 1.0}
    total = sum(seconds.values())
    return {
        "measured": "main thread",
        "seconds": total,
        "parts": dict.fromkeys(PARTS, 0.0) | seconds,
        "shares": dict.fromkeys(PARTS, 0.0) | {part: each / total for part, each in seconds.items()},
        "hidden_communication_seconds": 0.02,
        "largest": [{"name": "aten::<mm>", "part": "matrix_products", "seconds": 1.5}],
        "first_step": first,
        "last_step": last,
        "rank": 0,
        "world_size": 2,
        "device": "cpu",
        "traces": [trace_name(first, last, 0)],
    }
