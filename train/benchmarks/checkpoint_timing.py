"""Ranks save a model beside training and while it waits: `bench_checkpoint.py` without its command line."""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.host_limits import allowed_cores, available_memory_bytes
from common.progress import format_bytes
from common.publish import write_json_output
from model.config import preset_config
from model.gpt import GPT
from model.initialisation import initialise
from model.meeting import STORE_FILE
from model.ranks import Ranks, start_ranks
from train.checkpoints.check_weights import check_weights
from train.checkpoints.writer import CheckpointWriter
from train.optimization.declared_state import ADAMW
from train.optimization.optimizer import build_optimizer
from train.optimization.optimizer_state import shapes_of
from train.progress import Progress
from train.settings.sections import OptimConfig

LOOK_SECONDS = 0.01


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
    """Seconds for which this rank could not compute, and until the checkpoint was published."""
    ranks.barrier()
    started = time.monotonic()
    check_weights(ranks, writer.model)
    writer.begin(Progress(step), {})
    beside = 0.0
    if asynchronous:
        left = time.monotonic()
        while any(ranks.agree(writer.flags())):  # here training would continue
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
    """Whether all ranks' copies and one snapshot fit into this machine's memory."""
    with torch.device("meta"):
        weights = list(GPT(preset_config(preset)).named_parameters())
    state = sum(weight.nbytes for _, weight in weights) + ADAMW.nbytes(shapes_of(weights))
    return (world_size + 1.2) * state < available_memory_bytes()


def time_saves(arguments: argparse.Namespace) -> None:
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
