"""How much work a sliding window saves: the implementations side by side, forward and backward, on one device.

    python model/benchmarks/bench_attention.py [--length 2048] [--window 256] [--json FILE]

Full causal attention (no window), a window as a dense mask, and the window as the model uses it (block by block on a
CPU, FlexAttention on CUDA where it compiles). Contestants take turns; medians, the ratio to full attention, and the
largest difference of each windowed output from the dense mask's.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import file_to_write


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, description in (
        ("batch", 1, "sequences"),
        ("heads", 4, "query heads"),
        ("kv-heads", 4, "key and value heads"),
        ("head-size", 64, "features of a head"),
        ("length", 2048, "tokens of a sequence"),
        ("window", 256, "keys a query sees"),
        ("repeats", 10, "timed rounds"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of all tensors")
    parser.add_argument("--json", type=file_to_write, help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    from model.benchmarks.attention_contest import compare_attention  # here, as it imports torch

    compare_attention(options)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
