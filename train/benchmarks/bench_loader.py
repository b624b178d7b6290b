"""Measure the loader: tokens/s at 1, 2 and 4 ranks, growth in memory, time to the first batch near and far.

    python train/benchmarks/bench_loader.py --json loader.json

Random shards of 2 GB are made in a temporary folder. Every rank is a process that reads its share of every step, as in
training, but nothing is computed with it.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import psutil

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.progress import format_bytes, format_count
from common.publish import file_to_write, write_json_output
from data_prep.corpora.preparation import positive_count
from data_prep.token_sets.manifest import Manifest, Shard, shard_name
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import ByteTokenizer
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch

SHARD_TOKENS = 100_000_000
FAR = 1_000_000_000  # a sequence number


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--tokens", type=positive_count, default=1_000_000_000, help="tokens in all, 2 bytes each (default: 1e9)"
    )
    parser.add_argument("--block-size", type=positive_count, default=1024, help="tokens of a sequence (default: 1024)")
    parser.add_argument(
        "--tokens-per-step", type=positive_count, default=524_288, help="tokens of a step (default: 524288)"
    )
    parser.add_argument(
        "--steps", type=positive_count, default=40, help="steps that each measurement reads (default: 40)"
    )
    parser.add_argument(
        "--ranks", type=positive_count, nargs="+", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)"
    )
    parser.add_argument("--json", type=file_to_write, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if arguments.tokens <= arguments.block_size:
        raise UserError(f"--tokens {arguments.tokens} fill no window of {arguments.block_size} tokens and the next one")
    return arguments


def make_shards(folder: Path, tokens: int) -> None:
    """A token set of random bytes: what is read does not matter here, only how much and from where."""
    generator, unhashed = np.random.default_rng(0), "0" * 64
    shards = []
    for index, start in enumerate(range(0, tokens, SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - start)
        generator.integers(0, 256, count, dtype=np.uint16).tofile(folder / shard_name("train", index))
        shards.append(Shard(shard_name("train", index), count, 0, 2 * count, unhashed))
    splits: dict[str, tuple[Shard, ...]] = {"train": tuple(shards), "val": ()}
    Manifest("uint16", ByteTokenizer().spec, {"name": "random"}, {}, splits, unhashed).write(folder)


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


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        print(f"making {format_bytes(2 * arguments.tokens)} of shards", file=sys.stderr)
        make_shards(Path(folder), arguments.tokens)
        rows = [measure(Path(folder), arguments, world_size) for world_size in arguments.ranks]
    print(f"{'ranks':>5} {'tokens/s':>10} {'first batch':>12} {f'at {FAR:.0e}':>12} {'growth':>10}")
    for row in rows:
        print(
            f"{row['ranks']:>5} {format_count(row['tokens_per_second']):>10} {row['first_batch_seconds']:>10.3f} s "
            f"{row['far_batch_seconds']:>10.3f} s {format_bytes(row['grown_bytes']):>10}"
        )
    if arguments.json:
        write_json_output(arguments.json, {"tokens": arguments.tokens, "steps": arguments.steps, "rows": rows})
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
