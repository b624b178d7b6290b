"""Compare groups of runs: which variant is better than the baseline, by how much, and how sure that is.

    python train/study.py --compare A=runs/a1,runs/a2,runs/a3 B=runs/b1,runs/b2,runs/b3

A group is one configuration with several seeds. Only the runs' folders are read, of older runs, too, or the small files
of results that a study keeps. Choose the metric and the number of seeds before you look at results: docs/studies.md
explains the figures and what they can't show.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import write_json_output
from eval.shared.arguments import add_json


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--compare",
        nargs="+",
        required=True,
        metavar="NAME=RUN,RUN,…",
        help="the groups, each with its runs' folders or files",
    )
    parser.add_argument("--baseline", metavar="NAME", help="default: baseline or base, else the first in the alphabet")
    parser.add_argument(
        "--metric",
        default="final",
        help="final (default) or best validation loss, or a figure that the runs record, such as hellaswag_acc_norm",
    )
    parser.add_argument("--paired", action="store_true", help="compare runs in pairs of the same seed")
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from eval.comparison.comparing import as_text, compare  # scipy takes its time
    from eval.comparison.run_groups import parse_groups

    groups = parse_groups(arguments.compare)
    found = compare(groups, baseline=arguments.baseline, metric=arguments.metric, in_pairs=arguments.paired)
    print(as_text(found))
    if arguments.json:
        write_json_output(arguments.json, found.as_json())
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
