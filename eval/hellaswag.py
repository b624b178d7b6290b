"""HellaSwag: which of four endings does the model find most likely?

    python eval/hellaswag.py runs/gpt2-124m
    python eval/hellaswag.py runs/demo --data hellaswag_val.txt.bz2 --limit 200 --json hellaswag.json
    python train/launch.py --nproc_per_node=8 eval/hellaswag.py runs/gpt2-124m

Three accuracies, which docs/evaluation.md defines; `acc_norm` is the one that GPT-2's 0.2945 belongs to.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, advising_on_memory, exit_on_user_error
from eval.hellaswag_task.contamination import read_contamination
from eval.hellaswag_task.examples import read_hellaswag
from eval.shared.arguments import add_device, add_dtype, add_json, add_run, require_run

LESS_MEMORY = "give a smaller --batch (default 16, on a GPU 128) or --dtype bf16, or --device cpu where that has more"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Which of four endings does the model find most likely?")
    add_run(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="HellaSwag's JSONL, or six lines an example, also as .bz2 (default: what prepare_offline.py fetched)",
    )
    parser.add_argument(
        "--contamination",
        type=Path,
        action="append",
        metavar="FILE",
        help="what data_prep/contamination.py --json wrote for --data: shows clean and found examples apart, too; of a "
        "mix once for each set",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the file's first N examples")
    parser.add_argument("--batch", type=int, metavar="N", help="contexts at once (default 16, on a GPU 128)")
    add_device(parser)
    add_dtype(parser)
    add_json(parser, "figures and predictions")
    return parser.parse_args()


@advising_on_memory(LESS_MEMORY)
def main() -> int:
    arguments = parse_arguments()
    for name in ("limit", "batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}: use 1 or more")
    data = read_hellaswag(arguments.data)
    contamination = read_contamination(arguments.contamination, data) if arguments.contamination else None
    data = replace(data, examples=data.examples[: arguments.limit])
    require_run(arguments.run)
    from eval.hellaswag_task.report import evaluate  # here, as it imports torch

    evaluate(arguments, data, contamination)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
