"""The optimizer's share of a step on a CPU, for AdamW and Muon.

    python records/2026-11-28-muon/share.py            # both sizes, about 3 minutes on an idle machine of two cores

Forward and backward are timed for a few tokens and scale with the tokens of a step, the update does not: the share is
computed for the tokens of a step that the configuration names. Times are processor seconds of one thread and wall
seconds, the least of several. Each result is written to share/SIZE-KIND.json at once; what exists is left as it is.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.paths import PROJECT
from common.publish import write_json_whole
from model.gpt import GPT
from model.initialisation import initialise
from train.optimization.optimizer import build_optimizer
from train.settings.command_line import as_dict, read_config

HERE = Path(__file__).resolve().parent
SIZES = {"11M": ("demo.yaml", 1024), "124M": ("gpt2-124m.yaml", 512)}  # configuration, tokens of a timed backward
KINDS = ("adamw", "muon")


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    (HERE / "share").mkdir(exist_ok=True)
    for size in arguments.size or SIZES:
        for kind in KINDS:
            result = HERE / "share" / f"{size}-{kind}.json"
            if result.exists():
                print(f"{result} is there")
                continue
            found = measure(size, kind, arguments.repeats)
            write_json_whole(result, found)
            share, tokens = found["share_of_processor_time"], found["tokens_per_step"]
            print(f"{size} {kind}: {share:.2%} of a step of {tokens:,} tokens", flush=True)
    return 0


def measure(size: str, kind: Any, repeats: int) -> dict[str, Any]:
    """Least times of a forward and backward and of an update, and the share."""
    file, tokens = SIZES[size]
    config, _ = read_config([f"--config={PROJECT / 'train' / 'configs' / file}"])
    architecture = config.model.architecture()
    model = GPT(architecture)
    initialise(model, seed=1)
    optimizer = build_optimizer(model, replace(config.optim, kind=kind))
    ids = torch.randint(0, architecture.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.view(-1, min(tokens, architecture.block_size))  # (B, T)
    scale = torch.ones(())

    def learn() -> None:
        optimizer.zero_grad()
        model(ids, ids, scale=scale).backward()

    learn()
    optimizer.step()  # makes the state
    computing, updating = least(learn, repeats), least(optimizer.step, repeats)
    steps = config.batch.tokens_per_step
    shares = [update / (update + compute * steps / tokens) for update, compute in zip(updating, computing, strict=True)]
    return {
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": as_dict(replace(config, optim=replace(config.optim, kind=kind)))["optim"],
        "tokens_per_step": steps,
        "timed_tokens": tokens,
        "update_seconds": updating[0],
        "update_processor_seconds": updating[1],
        "forward_and_backward_seconds": computing[0],
        "forward_and_backward_processor_seconds": computing[1],
        "share": shares[0],
        "share_of_processor_time": shares[1],
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }


def least(act: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(wall seconds, processor seconds): the least of each."""
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        act()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return min(walls), min(processors)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="only this one; repeatable")
    parser.add_argument(
        "--threads", type=int, default=1, help="one (the default) waits for none: processor time counts"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (default 3)")
    return parser.parse_args()


if __name__ == "__main__":
    exit_on_user_error(main)
