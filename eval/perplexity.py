"""Loss, perplexity and bits per byte on fixed tokens.

    python eval/perplexity.py runs/demo --data data/docstrings
    python eval/perplexity.py runs/demo --data data/docstrings --stride 64 --json perplexity.json
    python train/launch.py --nproc_per_node=8 eval/perplexity.py runs/gpt2-124m --data data/fineweb-edu

Each target token counts once. Without a stride, sequences of the model's length follow each other and the first tokens
of each see little; with --stride S a sequence starts at every S-th token and only its new targets are counted, so that
every token but the first ones sees at least T - S others. Both count the same targets.

Of a set of conversations the targets are the answers' tokens, as in training's validation, conversations packed whole.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, advising_on_memory, exit_on_user_error
from data_prep.token_sets.token_set import TokenSet, find_token_set
from eval.shared.arguments import add_device, add_dtype, add_json, add_run, require_run

LESS_MEMORY = "give a smaller --micro-batch (8 by default) or --dtype bf16, or --device cpu where that has more"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Loss, perplexity and bits per byte on fixed tokens.")
    add_run(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="a token set (default: the run's own)")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="of the token set (default val)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the split, from its start (default: all)")
    parser.add_argument("--stride", type=int, metavar="S", help="let sequences overlap: S new targets in each")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="sequences at a time (default 8)")
    add_device(parser)
    add_dtype(parser)
    add_json(parser)
    return parser.parse_args()


@advising_on_memory(LESS_MEMORY)
def main() -> int:
    arguments = parse_arguments()
    for name in ("tokens", "stride", "micro_batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: use 1 or more")
    require_run(arguments.run)
    if arguments.data is not None:
        TokenSet.open(find_token_set(arguments.data))
    from eval.perplexity_task.report import evaluate  # here, as it imports torch

    evaluate(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
