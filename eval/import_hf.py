"""Import a Hugging Face model as a checkpoint, on which everything in eval/ runs.

    python eval/import_hf.py openai-community/gpt2 imported/gpt2
    python eval/import_hf.py path/to/folder imported/mine
    python eval/generate.py imported/gpt2 --prompt "Once upon a time"

GPT-2 (OpenAI's own files too), Starcoder2, Llama and Mistral, by name on the hub, or from a folder with config.json and
safetensors files or pytorch_model.bin.
"""

import argparse
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from common.checkpoint_files import write_checkpoint_manifest
from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.progress import format_count
from common.publish import TEMPORARY_SUFFIX, publish_folder, sha256_file
from common.version import VERSION
from data_prep.tokenization.tokenizer import Tokenizer, load_tokenizer
from eval.hugging_face.hf_config import from_config, with_defaults
from eval.hugging_face.hf_tensors import check_tensors, from_tensors, with_head_of
from eval.hugging_face.hub_files import read_described, stands
from eval.hugging_face.hub_models import find_model, read_weights
from eval.hugging_face.hub_shapes import HubConfig
from eval.hugging_face.tokenizer_import import recognise_tokenizer
from eval.shared.arguments import folder_to_make
from model.config import ModelConfig
from model.counts import parameter_count
from model.gpt import GPT
from model.weights import load_weights, save_tensors

WEIGHTS_FILE = "weights-00000-of-00001.safetensors"
PADDING_ROWS = 1024  # a table is padded to a multiple of at most this; more rows are another vocabulary's


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Import a Hugging Face model as a checkpoint.")
    parser.add_argument("source", help="folder with config.json and weights, or a name such as openai-community/gpt2")
    parser.add_argument("out", type=folder_to_make, help="the checkpoint's folder to make")
    parser.add_argument(
        "--tokenizer", choices=["gpt2", "byte"], help="what the model was trained with, where its files don't tell"
    )
    parser.add_argument("--revision", help="of a model on the hub: a commit, tag or branch (default: its newest)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    out: Path = arguments.out
    source = find_model(arguments.source, arguments.revision)
    values, theirs = read_source(source)
    described = from_config(values, {name: tensor for name, tensor in theirs.items() if name.endswith(".bias")})
    config = with_head_of(described, theirs)
    check_tensors(config, with_defaults(values), theirs)
    tokenizer = tokenizer_of(source, arguments.tokenizer, config, values)
    spare = config.vocab_size - tokenizer.vocab_size
    config = replace(config, vocab_size=tokenizer.vocab_size)
    tensors = from_tensors(config, theirs)
    check_shapes(config, tensors, source)
    temporary = out.with_name(f".{out.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_checkpoint(temporary, config, tokenizer, tensors, values)
        publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {format_count(parameter_count(config))} parameters, {tokenizer.spec['kind']} tokenizer")
    if config.tie_weights != described.tie_weights:
        print("its head differs from its embedding table, which config.json ties to it: imported as two matrices")
    if spare:
        print(f"left out: {spare} rows of its embedding table, to which no token of its tokenizer belongs")
    return 0


def read_source(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's configuration, and its tensors under the names that `transformers` gives them now.

    Raises UserError where files are missing or damaged.
    """
    values = dict(read_described(source / "config.json", HubConfig))
    with_defaults(values)  # what they can't be, before the weights are read
    if stands(source / "adapter_config.json"):
        raise UserError(f"{source} holds adapters (adapter_config.json): merge them into the model with peft first")
    return values, dict(map(_renamed, read_weights(source).items()))


def _renamed(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """OpenAI's GPT-2 files lack the prefix."""
    name, tensor = item
    return (f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name), tensor


def tokenizer_of(source: Path, choice: str | None, config: ModelConfig, values: dict[str, Any]) -> Tokenizer:
    """Raises UserError where the tokenizer is none that Longhaul can carry, or another one than the model's."""
    tokenizer = load_tokenizer(choice) if choice else recognise_tokenizer(source, values)
    if not 0 <= config.vocab_size - tokenizer.vocab_size < PADDING_ROWS:
        raise UserError(
            f"the model in {source} has {config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}: they don't "
            "belong together"
        )
    return tokenizer


def check_shapes(config: ModelConfig, tensors: dict[str, Tensor], source: Path) -> None:
    """Raises UserError where the tensors are not the configuration's."""
    with torch.device("meta"):
        model = GPT(config)
    load_weights(model, tensors, source)


def write_checkpoint(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Weights and `checkpoint.json`, at step 0 and without optimizer state."""
    path = folder / WEIGHTS_FILE
    save_tensors(path, tensors)
    manifest = {
        "version": VERSION,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}},
        "model": asdict(config),
        "tokenizer": tokenizer.spec,
        "data_identity": None,
        "imported": {"architectures": values.get("architectures"), "name": values.get("_name_or_path")},
        "step": 0,
        "tokens": 0,
        "sequences": 0,
    }
    write_checkpoint_manifest(folder, manifest)


if __name__ == "__main__":
    exit_on_user_error(main)
