"""Any task of lm-evaluation-harness on a checkpoint, offline.

    python eval/harness.py runs/gpt2-124m --tasks lambada_openai,piqa
    python eval/harness.py runs/demo --tasks my_task --include-path tasks --json harness.json

The checkpoint is exported to a temporary folder and `lm-eval` runs on it. Nothing is downloaded: a task's data must
be in Hugging Face's cache (HF_HOME) or in files that the task names.
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
from common.packages import require_packages
from eval.shared.arguments import add_device, add_json, add_run, require_run


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Any task of lm-evaluation-harness on a checkpoint, offline.")
    add_run(parser)
    parser.add_argument("--tasks", required=True, metavar="NAME[,NAME…]", help="as lm-eval names them")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own (YAML)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    parser.add_argument("--fewshot", type=int, metavar="N", help="solved examples before each question")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at once (default 8)")
    parser.add_argument("--chat", action="store_true", help="ask each question as a message, by the chat template")
    add_device(parser)
    add_json(parser, "figures and every answer")
    return parser.parse_args()


@advising_on_memory("give a smaller --batch (8 by default), or --device cpu where that has more memory")
def main() -> int:
    arguments = parse_arguments()
    for name in ("limit", "batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}: use 1 or more")
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise UserError(f"--include-path {arguments.include_path} is not a folder: give one with task files")
    require_run(arguments.run)
    require_packages(dict.fromkeys(("transformers", "lm_eval"), "lm-eval[hf]"), "lm-evaluation-harness")
    from eval.hugging_face.harness_tasks import evaluate  # here, as it imports torch

    evaluate(arguments)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
