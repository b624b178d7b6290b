"""Measure the loader: tokens/s at 1, 2 and 4 ranks, memory, first batches; mixes and whole documents against a stream.

    python train/benchmarks/bench_loader.py --json loader.json

Random shards of 2 GB are made in a temporary folder. Every rank is a process that reads its share of every step, as in
training, but nothing is computed with it. Then loaders of one and of several sources, of the stream and of whole
documents, take turns in one process, by its processor time; the plan of 1 billion tokens is made and timed.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.publish import file_to_write
from data_prep.corpora.preparation import positive_count


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
    parser.add_argument("--sources", type=positive_count, default=8, help="of a mix (default: 8)")
    parser.add_argument("--json", type=file_to_write, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if arguments.tokens <= arguments.block_size:
        raise UserError(f"--tokens is {arguments.tokens}: use more than --block-size {arguments.block_size}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from train.benchmarks.loader_timing import time_loader  # here, as it imports torch

    time_loader(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
