"""Measure how long training waits for a checkpoint: written in the background, and synchronously.

    python train/benchmarks/bench_checkpoint.py --preset gpt2-124m gpt2-355m --ranks 1 2 --json checkpoint.json

Real ranks (gloo processes on this machine) save model and AdamW state to the folder given. Nothing is trained, so the
disk has the machine to itself: what is compared is the time in which no rank could have computed.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import file_to_write
from model.config import PRESETS


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
        parser.error(
            f"--saves is {arguments.saves}: use 2 or more, as the first save makes the buffers that later ones reuse"
        )
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from train.benchmarks.checkpoint_timing import time_saves  # here, as it imports torch

    time_saves(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
