"""Measure how long training waits for a checkpoint: written beside it, and waited for.

    python train/benchmarks/bench_checkpoint.py --preset gpt2-124m gpt2-355m --ranks 1 2 --json checkpoint.json

Real ranks (gloo processes on this machine) save model and AdamW state to the folder given. Nothing is trained, so the
disk has the machine to itself: what is compared is the time in which no rank could have computed.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.host_limits import allowed_cores, available_memory_bytes
from common.progress import format_bytes
from common.publish import file_to_write, write_json_output
from model.config import PRESETS, preset_config
from model.counts import parameter_count
from model.gpt import GPT
from model.initialisation import initialise
from model.meeting import STORE_FILE
from model.ranks import Ranks, start_ranks
from train.checkpoints.check_weights import check_weights
from train.checkpoints.writer import CheckpointWriter
from train.optimization.optimizer import build_optimizer
from train.progress import Progress
from train.settings.sections import OptimConfig

LOOK_SECONDS = 0.01
BYTES_PER_PARAMETER = 4 * (1 + 2)  # float32: the weight and AdamW's two moments, on every rank


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--preset", nargs="+", default=["gpt2-124m"], choices=sorted(PRESETS), help="models to save")
    parser.add_argument("--quick", action="store_true", help="save a tiny model instead, to see the script run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    parser.add_argument("--saves", type=int, default=4, help="saves of each kind (default: 4)")
    parser.add_argument("--folder", type=Path, help="where to save (default: the system's temporary folder)")
    parser.add_argument("--json", type=file_to_write, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if arguments.saves < 2:
        parser.error("--saves: give 2 or more, as the first save makes the buffers that later ones use again")
    return arguments


def make_state(preset: str, quick: bool) -> tuple[GPT, torch.optim.Optimizer]:
    """A model, and an optimizer as after a step."""
    config = preset_config(preset)
    if quick:
        config = replace(config, vocab_size=256, n_layer=1, n_head=1, n_embd=64)
    model = GPT(config)
    initialise(model, 0)
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():  # one at a time: no need to hold all gradients
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    return model, optimizer


def save_once(writer: CheckpointWriter, ranks: Ranks, step: int, *, asynchronous: bool) -> dict[str, float]:
    """Seconds that this rank could not compute for, and until the checkpoint was published."""
    ranks.barrier()
    started = time.monotonic()
    check_weights(ranks, writer.model)
    writer.begin(Progress(step), {})
    beside = 0.0
    if asynchronous:
        left = time.monotonic()
        while any(ranks.agree(writer.flags())):  # here training would go on
            time.sleep(LOOK_SECONDS)
        beside = time.monotonic() - left
    saved = writer.finish()
    assert saved is not None
    blocked = time.monotonic() - started - beside
    if ranks.is_first:
        shutil.rmtree(saved.path)
    return {"blocked_seconds": blocked, "save_seconds": saved.save_seconds, "bytes": float(saved.save_bytes)}


def measure_rank(
    rank: int, world_size: int, store: str, folder: str, preset: str, quick: bool, saves: int, threads: int
) -> dict[str, list[dict[str, float]]]:
    """One rank's figures, by kind of save."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), STORE_FILE: store}
    torch.set_num_threads(threads)
    ranks = start_ranks("cpu")
    model, optimizer = make_state(preset, quick)
    figures = {}
    for kind in ("asynchronous", "synchronous"):
        writer = CheckpointWriter(Path(folder), ranks, model, optimizer)
        figures[kind] = [
            save_once(writer, ranks, step, asynchronous=kind == "asynchronous") for step in range(1, saves + 1)
        ]
        del writer
    ranks.close()
    return figures


def measure(arguments: argparse.Namespace, preset: str, world_size: int) -> dict[str, Any]:
    """The figures of `world_size` ranks that save one model together: of the rank that waited longest."""
    threads = max(1, allowed_cores() // world_size)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        common = (world_size, f"{folder}/store", folder, preset, arguments.quick, arguments.saves, threads)
        with multiprocessing.get_context("spawn").Pool(world_size) as pool:
            ranks = pool.starmap(measure_rank, [(rank, *common) for rank in range(world_size)], chunksize=1)
    row: dict[str, Any] = {"preset": preset, "ranks": world_size, "bytes": ranks[0]["synchronous"][0]["bytes"]}
    for kind in ("asynchronous", "synchronous"):
        blocked = [max(rank[kind][index]["blocked_seconds"] for rank in ranks) for index in range(arguments.saves)]
        row[kind] = {
            "first_blocked_seconds": blocked[0],
            "blocked_seconds": blocked[1:],
            "median_blocked_seconds": statistics.median(blocked[1:]),
            "median_save_seconds": statistics.median(save["save_seconds"] for save in ranks[0][kind][1:]),
        }
    row["blocked_ratio"] = row["synchronous"]["median_blocked_seconds"] / row["asynchronous"]["median_blocked_seconds"]
    return row


def fits(preset: str, world_size: int) -> bool:
    """Whether all ranks' copies and one snapshot find room in this machine's memory."""
    state = parameter_count(preset_config(preset)) * BYTES_PER_PARAMETER
    return (world_size + 1.2) * state < available_memory_bytes()


def main() -> int:
    arguments = parse_arguments()
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder: make it, or leave --folder out")
    rows = []
    print(f"{'model':>12} {'ranks':>5} {'bytes':>10} {'async waits':>12} {'sync waits':>12} {'ratio':>6}")
    for preset in arguments.preset:
        for world_size in arguments.ranks:
            if not fits(preset, world_size):
                print(f"{preset:>12} {world_size:>5} left out: too little memory is free")
                continue
            row = measure(arguments, preset, world_size)
            rows.append(row)
            print(
                f"{preset:>12} {world_size:>5} {format_bytes(int(row['bytes'])):>10} "
                f"{row['asynchronous']['median_blocked_seconds']:>10.3f} s "
                f"{row['synchronous']['median_blocked_seconds']:>10.3f} s {row['blocked_ratio']:>6.1f}",
                flush=True,
            )
    if arguments.json:
        write_json_output(arguments.json, {"saves": arguments.saves, "rows": rows})
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
