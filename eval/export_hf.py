"""Export a checkpoint as a folder that Hugging Face's `transformers` loads with no code of ours.

    python eval/export_hf.py runs/demo exported/demo
    python eval/export_hf.py runs/notes exported/notes-adapter --adapter exported/demo

The exported model is loaded again and must give the same logits and tokens, or nothing is published. With --adapter,
only the adapters of a fine-tuning are exported, for PEFT and the export of the model that they were trained on.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.packages import require_packages
from common.publish import write_json_output
from eval.shared.arguments import add_dtype, add_json, add_run, folder_to_make, require_run


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Export a checkpoint for Hugging Face's transformers.")
    add_run(parser)
    parser.add_argument("out", type=folder_to_make, help="the folder to make")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="BASE",
        help="export only the adapters, as PEFT has them, for their base, which was exported to this folder",
    )
    add_dtype(parser, "the weights", auto=False)
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    require_run(arguments.run)
    if arguments.adapter is None:
        require_packages({"transformers": "transformers"}, "an export, which is verified with it,")
        from eval.hugging_face.export import export  # here, as it imports torch

        report = export(arguments.run, arguments.out, arguments.dtype, arguments.weights)
    else:
        require_packages(
            {"peft": "peft", "transformers": "transformers"}, "an export of adapters, which is verified with it,"
        )
        from eval.hugging_face.adapters import export_adapter

        report = export_adapter(arguments.run, arguments.adapter, arguments.out, arguments.weights)
    if arguments.json:
        write_json_output(arguments.json, report)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
