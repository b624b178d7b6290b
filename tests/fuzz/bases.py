"""Valid originals that cases damage: a tiny token set, and a run of a few steps with its checkpoints."""

import shutil
from pathlib import Path

import yaml

from tests.helpers.token_sets import make_token_set
from tests.helpers.training import train

TINY = {
    "model": {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16},
    "data": {"path": "data"},
    "schedule": {"kind": "constant", "warmup": 1},
    "batch": {"tokens_per_step": 64, "micro_batch": 2},
    "checkpoint": {"every_steps": 2},
    "eval": {"every_steps": 2, "tokens": 64, "prompts": ["Once"], "sample_tokens": 4},
    "run": {"max_steps": 4, "dtype": "fp32", "device": "cpu"},
}


def make_base(bases: Path) -> None:
    """In `bases`: `data` (a token set), `tiny.yaml`, and `runs/one`, a run of 4 steps with 2 checkpoints."""
    make_token_set(bases / "data", train_tokens=600, val_tokens=200, shard_tokens=400)
    (bases / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    arguments = [f"--config={bases / 'tiny.yaml'}", f"--data.path={bases / 'data'}", f"--run.root={bases / 'runs'}"]
    train(1, bases / "ranks", [*arguments, "--run.name=one"])
    shutil.rmtree(bases / "ranks", ignore_errors=True)


def copy_base(bases: Path, folder: Path) -> None:
    """The originals, in a case's folder."""
    for name in ("data", "runs"):
        shutil.copytree(bases / name, folder / name, symlinks=True)
    shutil.copy(bases / "tiny.yaml", folder / "tiny.yaml")
