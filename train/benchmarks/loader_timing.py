"""Ranks read their batches: `bench_loader.py` without its command line."""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from common.progress import format_bytes, format_count
from common.publish import write_json_output
from data_prep.token_sets.manifest import Manifest, Shard, shard_name
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import ByteTokenizer
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.benchmarks.loader_turns import table, take_turns

SHARD_TOKENS = 100_000_000
DOCUMENT_TOKENS = 1_000  # on average: FineWeb-Edu's are about as long
FAR = 1_000_000_000  # a sequence number


def make_shards(folder: Path, tokens: int, at_least: int) -> None:
    """A token set of random bytes in documents of web-like lengths: what is read does not matter here, only how much.

    Args: at_least: so many shards.
    """
    generator, unhashed, spec = np.random.default_rng(0), "0" * 64, ByteTokenizer().spec
    size = min(SHARD_TOKENS, -(-tokens // at_least))
    shards = []
    for index, start in enumerate(range(0, tokens, size)):
        count = min(size, tokens - start)
        values = generator.integers(0, 256, count, dtype=np.uint16)
        lengths = generator.lognormal(np.log(DOCUMENT_TOKENS) - 0.5, 1.0, 2 * count // DOCUMENT_TOKENS + 8) + 2
        starts = np.cumsum(lengths.astype(np.int64))
        values[0] = values[starts[starts < count]] = spec["end_of_text_id"]
        values.tofile(folder / shard_name("train", index))
        shards.append(Shard(shard_name("train", index), count, 0, 2 * count, unhashed))
    splits: dict[str, tuple[Shard, ...]] = {"train": tuple(shards), "val": ()}
    Manifest("uint16", spec, {"name": "random"}, {}, splits, unhashed).write(folder)


def measure_rank(arguments: tuple[str, int, int, int, int, int]) -> dict[str, float]:
    """One rank's figures: seconds to the first batch at both places, tokens/s, growth in bytes."""
    folder, block_size, tokens_per_step, world_size, rank, steps = arguments
    windows = Windows(TokenSet.open(folder).split("train"), block_size)
    loader = StepLoader(windows, plan_batch(tokens_per_step, block_size, 1, world_size), rank=rank, seed=0)
    figures = {}
    for name, first in (("first_batch_seconds", 0), ("far_batch_seconds", FAR)):
        started = time.perf_counter()
        loader.step_at(first)
        figures[name] = time.perf_counter() - started
    before = psutil.Process().memory_info().rss
    batches = loader.steps(0)
    next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        next(batches)
    figures["tokens_per_second"] = steps * tokens_per_step / world_size / (time.perf_counter() - started)
    batches.close()
    figures["grown_bytes"] = float(psutil.Process().memory_info().rss - before)
    return figures


def measure(folder: Path, arguments: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """The figures of `world_size` ranks that read at the same time."""
    common = (str(folder), arguments.block_size, arguments.tokens_per_step, world_size)
    work = [(*common, rank, arguments.steps) for rank in range(world_size)]
    with multiprocessing.get_context("spawn").Pool(world_size) as pool:
        ranks = pool.map(measure_rank, work, chunksize=1)
    return {
        "ranks": world_size,
        "tokens_per_second": sum(figures["tokens_per_second"] for figures in ranks),
        "first_batch_seconds": statistics.median(figures["first_batch_seconds"] for figures in ranks),
        "far_batch_seconds": statistics.median(figures["far_batch_seconds"] for figures in ranks),
        "grown_bytes": max(figures["grown_bytes"] for figures in ranks),
    }


def time_loader(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"making {format_bytes(2 * arguments.tokens)} of shards", file=sys.stderr)
        make_shards(Path(folder), arguments.tokens, arguments.sources)
        rows = [measure(Path(folder), arguments, world_size) for world_size in arguments.ranks]
        turns = take_turns(
            Path(folder), arguments.block_size, arguments.tokens_per_step, arguments.steps, arguments.sources
        )
    print(f"{'ranks':>5} {'tokens/s':>10} {'first batch':>12} {f'at {FAR:.0e}':>12} {'growth':>10}")
    for row in rows:
        print(
            f"{row['ranks']:>5} {format_count(row['tokens_per_second']):>10} {row['first_batch_seconds']:>10.3f} s "
            f"{row['far_batch_seconds']:>10.3f} s {format_bytes(row['grown_bytes']):>10}"
        )
    print(table(turns))
    if arguments.json:
        facts = {"tokens": arguments.tokens, "steps": arguments.steps}
        write_json_output(arguments.json, {**facts, "rows": rows, "turns": turns})
