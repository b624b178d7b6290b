"""The mean of a run's last checkpoints, as a checkpoint that every evaluation reads.

    python eval/average.py runs/demo --last 4
    python eval/average.py runs/demo --last 4 --out averages/demo

A run keeps its last 2 checkpoints and the best; with checkpoint.weights_every_steps it keeps the weights of more.
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
from common.publish import write_json_output
from eval.shared.arguments import add_json, folder_to_make, require_run


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("The mean of a run's last checkpoints, as a checkpoint that every evaluation reads.")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--last", type=int, required=True, metavar="K", help="how many of the newest checkpoints")
    parser.add_argument(
        "--out", type=folder_to_make, metavar="DIR", help="the folder to make (default: in the run's checkpoints/)"
    )
    add_json(parser, "origin of the weights")
    return parser.parse_args()


@advising_on_memory("the mean takes as much memory as the model's weights: use a machine with more")
def main() -> int:
    arguments = parse_arguments()
    if arguments.last < 2:
        raise UserError(f"--last is {arguments.last}: use 2 or more, a single checkpoint is its own mean")
    require_run(arguments.run)
    from eval.shared.averaging import average_last  # here, as it imports torch

    report = average_last(arguments.run, arguments.last, arguments.out)
    if arguments.json:
        write_json_output(arguments.json, report)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
