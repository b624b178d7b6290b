"""Import a Hugging Face model as a checkpoint, on which everything in eval/ runs.

    python eval/import_hf.py openai-community/gpt2 imported/gpt2
    python eval/import_hf.py path/to/folder imported/mine
    python eval/generate.py imported/gpt2 --prompt "Once upon a time"

GPT-2 (OpenAI's own files too), Starcoder2, Llama, Mistral and Qwen3, by name on the hub, or from a folder with
config.json and safetensors files or pytorch_model.bin.
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
from eval.hugging_face.hub_models import find_model
from eval.shared.arguments import folder_to_make


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Import a Hugging Face model as a checkpoint.")
    parser.add_argument("source", help="folder with config.json and weights, or a name such as openai-community/gpt2")
    parser.add_argument("out", type=folder_to_make, help="the checkpoint's folder to make")
    parser.add_argument(
        "--tokenizer", choices=["gpt2", "byte"], help="what the model was trained with, where its files don't define it"
    )
    parser.add_argument("--revision", help="of a model on the hub: a commit, tag or branch (default: its newest)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    source = find_model(arguments.source, arguments.revision)
    from eval.hugging_face.import_model import import_model  # here, as it imports torch

    import_model(source, arguments.out, arguments.tokenizer)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
