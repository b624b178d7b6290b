"""Export a checkpoint as a GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio, …) run.

    python eval/export_gguf.py runs/demo exported/demo.gguf --dtype bf16

What llama.cpp would compute differently is refused. The file is read back and must hold the same weights and tokens, or
nothing is published.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.packages import require_packages
from common.publish import file_to_write, write_json_output
from eval.shared.arguments import add_dtype, add_json, add_run, require_run


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Export a checkpoint as a GGUF file for llama.cpp.")
    add_run(parser)
    parser.add_argument("out", type=file_to_write, help="the file to make, such as demo.gguf")
    add_dtype(parser, "the matrices", auto=False)
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.out.suffix != ".gguf":
        raise UserError(f"{arguments.out} doesn't end in .gguf, by which llama.cpp's programs know such files: add it")
    require_run(arguments.run)
    require_packages({"gguf": "gguf", "tokenizers": "tokenizers"}, "a GGUF file, which is written with it,")
    from eval.hugging_face.gguf_export import export_gguf  # here, as it imports torch

    report = export_gguf(arguments.run, arguments.out, arguments.dtype)
    if arguments.json:
        write_json_output(arguments.json, report)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
