"""Tiny real runs of the trainer for tests."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from tests.helpers.ranks import RankGroup

PROJECT = Path(__file__).resolve().parents[2]
PRETRAIN = PROJECT / "train" / "pretrain.py"
TINY_YAML = """
model: {block_size: 16, n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}
optim: {lr: 1.0e-2}
schedule: {warmup: 3}
batch: {tokens_per_step: 512, micro_batch: 4}
checkpoint: {every_steps: 5}
eval: {every_steps: 5, tokens: 256, prompts: []}
log: {sequences: true}
run: {max_steps: 20, dtype: fp32, device: cpu}
"""


def tiny_arguments(folder: Path, data: Path, name: str, *more: str) -> list[str]:
    """The command line of a tiny run `name` below `folder`."""
    config = folder / "tiny.yaml"
    if not config.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(TINY_YAML)
    return [
        f"--config={config}",
        f"--data.path={data}",
        f"--run.root={folder / 'runs'}",
        f"--run.name={name}",
        *more,
    ]


def run_of(folder: Path, name: str) -> RunFolder:
    return RunFolder(folder / "runs" / name)


def train_as_rank(arguments: list[str]) -> None:
    """`train/pretrain.py` with these arguments, in this (rank's) process."""
    from common.errors import exit_on_user_error
    from train.pretrain import main

    sys.argv = [str(PRETRAIN), *arguments]
    exit_on_user_error(main)


def slow_down_forwards(seconds: float) -> None:
    """Let each forward of this process take so much longer."""
    from model.gpt import GPT

    forward = GPT.forward

    def forward_slowly(*values: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return forward(*values, **named)

    GPT.forward = forward_slowly  # type: ignore[method-assign]


def start_ranks_training(world_size: int, folder: Path, arguments: list[str]) -> RankGroup:
    """The trainer on `world_size` gloo ranks."""
    return RankGroup(world_size, folder / "store", train_as_rank, arguments)


def train(world_size: int, folder: Path, arguments: list[str]) -> None:
    """Train to the end; every rank must leave with 0."""
    codes = start_ranks_training(world_size, folder, arguments).join()
    assert codes == [0] * world_size, codes


def train_by_path(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train/pretrain.py …` as a user types it, in a fresh process."""
    return subprocess.run(
        [sys.executable, str(PRETRAIN), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def losses(folder: RunFolder) -> dict[int, float]:
    """Training loss by step."""
    return {record["step"]: record["loss"] for record in read_metrics(folder.metrics) if "loss" in record}


def curve(folder: RunFolder) -> list[tuple[str, ...]]:
    """Everything of a run that must not depend on how often it was interrupted."""
    keys = ("step", "loss", "grad_norm", "lr", "val_loss", "sequences")
    records = [record for record in read_metrics(folder.metrics) if "kind" not in record]
    return [tuple(str(record.get(key)) for key in keys) for record in records]


def weights_hashes(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint, weights and optimizer state, whatever files they are in."""
    from safetensors import safe_open

    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        kind = path.name.split("-")[0]
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                found[f"{kind}:{name}"] = file.get_tensor(name).tobytes()
    return found
