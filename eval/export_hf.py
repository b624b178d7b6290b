"""Export a checkpoint as a folder that Hugging Face's `transformers` loads with no code of ours.

    python eval/export_hf.py runs/demo exported/demo

The exported model is loaded again and must give the same logits and tokens, or nothing is published.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import write_json_output
from eval.shared.arguments import add_json, add_run, folder_to_make, require_run


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Export a checkpoint for Hugging Face's transformers.")
    add_run(parser)
    parser.add_argument("out", type=folder_to_make, help="the folder to make")
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    require_run(arguments.run)
    from eval.hugging_face.export import export  # here, as it imports torch

    report = export(arguments.run, arguments.out)
    if arguments.json:
        write_json_output(arguments.json, report)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
