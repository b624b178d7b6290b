"""A Hugging Face model as a checkpoint: read, checked against its own description, and written."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint_files import write_checkpoint_manifest
from common.errors import UserError
from common.progress import format_count
from common.publish import TEMPORARY_SUFFIX, publish_folder, sha256_file
from common.version import VERSION
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Tokenizer
from eval.hugging_face.hf_config import from_config, with_defaults
from eval.hugging_face.hf_tensors import check_tensors, from_tensors, with_head_of
from eval.hugging_face.hub_files import read_described, stands
from eval.hugging_face.hub_shapes import HubConfig
from eval.hugging_face.hub_weights import read_weights
from eval.hugging_face.tokenizer_import import recognise_tokenizer
from model.config import ModelConfig
from model.counts import parameter_count
from model.gpt import GPT
from model.weights import load_weights, save_tensors

WEIGHTS_FILE = "weights-00000-of-00001.safetensors"
PADDING_ROWS = 1024  # a table is padded to a multiple of at most this; more rows are another vocabulary's


def import_model(source: Path, out: Path, tokenizer_kind: str | None) -> None:
    """Publish the model in the folder `source` as the checkpoint `out`. Raises UserError where that is impossible."""
    values, theirs = read_source(source)
    described = from_config(values, {name: tensor for name, tensor in theirs.items() if name.endswith(".bias")})
    config = with_head_of(described, theirs)
    check_tensors(config, with_defaults(values), theirs)
    tokenizer = tokenizer_of(source, tokenizer_kind, config, values)
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


def read_source(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's configuration, and its tensors under the names that `transformers` uses today.

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
    """The tokenizer. Raises UserError where Longhaul can't use it, or it is another one than the model's."""
    tokenizer = load_tokenizer(choice) if choice else recognise_tokenizer(source, values)
    if not 0 <= config.vocab_size - tokenizer.vocab_size < PADDING_ROWS:
        raise UserError(
            f"the model in {source} has {config.vocab_size} ids, but its tokenizer {tokenizer.vocab_size}: they don't "
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
