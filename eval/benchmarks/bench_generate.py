"""How fast Longhaul generates, against `transformers` on the exported weights and against re-running the context.

    python eval/benchmarks/bench_generate.py --threads 1 2 --batch 1 16
    python eval/benchmarks/bench_generate.py --run runs/demo --tokens 64

Every contestant has the same weights, dtype, threads, prompts and number of tokens, chooses greedily and ignores
ends of text. They take turns, and each one's fastest turn counts, so that other load on the machine affects all
alike.
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
    parser = CommandParser("Tokens per second of generation, against transformers.")
    parser.add_argument("--run", type=Path, help="a run's folder or checkpoint (default: the preset, untrained)")
    parser.add_argument("--preset", default="gpt2-124m", help="without --run: a model of this size (default gpt2-124m)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="B", help="prompts at once")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="of the CPU")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="generated for each prompt (default 64)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each contestant (default 3)")
    parser.add_argument("--no-rerun", action="store_true", help="leave out re-running the context, which is slow")
    add_device(parser, "cpu")
    add_dtype(parser, "the weights", auto=False)
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from eval.benchmarks.generation_contest import compare_generation  # here, as it imports torch

    compare_generation(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
