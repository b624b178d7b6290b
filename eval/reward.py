"""Score conversations with a reward model: lines of JSON as data_prep/conversations.py or preferences.py reads them.

    python eval/reward.py runs/demo-reward talks.jsonl --json scores.json

A conversation's score is the scalar head's value at the last token of its last answer, its end of turn; higher is
better, and only differences between answers to the same prompt mean something. Of a record with chosen and rejected
both are scored, and the summary has the share of pairs in which the chosen one is higher. What can't be used is
counted.
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
from eval.shared.arguments import add_device, add_dtype, add_json, add_run, require_run

LESS_MEMORY = "give a smaller --micro-batch (8 by default) or --dtype bf16, or --device cpu where that has more"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Score conversations with a reward model.")
    add_run(parser)
    parser.add_argument("file", type=Path, help="lines of JSON: conversations, or pairs of chosen and rejected")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="conversations at a time (default 8)")
    add_device(parser)
    add_dtype(parser)
    add_json(parser)
    return parser.parse_args()


@advising_on_memory(LESS_MEMORY)
def main() -> int:
    arguments = parse_arguments()
    if arguments.micro_batch < 1:
        raise UserError(f"--micro-batch is {arguments.micro_batch}: use 1 or more")
    require_run(arguments.run)
    from eval.reward_task.report import report  # here, as it imports torch

    report(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
