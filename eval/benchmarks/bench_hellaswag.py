"""How fast HellaSwag is answered, against the loop that everyone copies.

    python eval/benchmarks/bench_hellaswag.py --limit 40 --threads 1
    python eval/benchmarks/bench_hellaswag.py --run runs/gpt2-124m --data hellaswag_val.txt.bz2 --json bench.json

That loop (build-nanogpt's hellaswag.py) takes one example at a time: four rows of context and ending, padded to the
longest, through the model, and the logits of every position. Both have the same weights, dtype and threads and answer
the same questions, the contexts without the activity label. They take turns, and each one's fastest turn counts.
Processor time is reported beside wall-clock time: on a machine that others use as well it is the fairer one. Weights
need no
training: the work is the same.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from eval.shared.arguments import add_device, add_dtype, add_json


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("How fast HellaSwag is answered, against the loop everyone copies.")
    parser.add_argument("--run", type=Path, help="a run's folder or checkpoint (default: the preset, untrained)")
    parser.add_argument("--preset", default="gpt2-124m", help="without --run: a model of this size (default gpt2-124m)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="HellaSwag (default: as eval/hellaswag.py)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="examples, spread over the file (100)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default 1)")
    parser.add_argument("--turns", type=int, default=2, metavar="N", help="of each contestant (default 2)")
    add_device(parser, "cpu")
    add_dtype(parser, auto=False)
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from eval.benchmarks.hellaswag_contest import compare_answering  # here, as it imports torch

    compare_answering(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
