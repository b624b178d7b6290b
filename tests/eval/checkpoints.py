"""Checkpoints of tiny models, by the trainer's own writer."""

from dataclasses import asdict
from pathlib import Path

import torch

from common.checkpoint_files import CHECKPOINT_MANIFEST, read_checkpoint_manifest
from common.publish import sha256_file
from data_prep.tokenization.loading import load_tokenizer
from model.gpt import GPT
from model.lora import add_lora, lora_tensors
from model.lora_config import LoraConfig
from model.ranks import start_ranks
from model.weights import load_model
from tests.model.small import small_model
from train.checkpoints.writer import CheckpointWriter
from train.progress import Progress


def write_checkpoint(folder: Path, *, tokenizer="byte", step=7, noise=0.1, seed=0, always=None, **options) -> Path:
    """A checkpoint below `folder` of a model with the tokenizer's vocabulary; its folder.

    Args: always: the id that the model generates, whatever it sees.
    """
    spec = load_tokenizer(tokenizer).spec
    model = small_model(seed, noise=noise, **{"vocab_size": spec["vocab_size"], **options})
    if always is not None:
        generate_always(model, always)
    facts = {"model": asdict(model.config), "tokenizer": spec, "data_identity": "d" * 64}
    return _save(folder, model, facts, step)


@torch.no_grad()
def generate_always(model: GPT, token: int) -> None:
    """Make a model with a tied head and biases generate this id, whatever it sees."""
    model.wte.weight.zero_()
    model.get_parameter("ln_f.bias").fill_(1.0)
    model.wte.weight[token] = 1.0


def write_adapters(run: Path, lora: LoraConfig, *, noise=0.1, step=7, **options) -> Path:
    """A run's folder whose newest checkpoint holds adapters beside a base of such a model; the checkpoint's folder."""
    checkpoints = run / "checkpoints"
    base = write_checkpoint(checkpoints, noise=noise, **options).rename(checkpoints / "base")
    model, manifest = load_model(base), read_checkpoint_manifest(base)
    add_lora(model, lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    facts = {name: manifest[name] for name in ("model", "tokenizer", "data_identity")}
    kept = {"identity": "b" * 64, "folder": "base", "sha256": sha256_file(base / CHECKPOINT_MANIFEST)}
    return _save(checkpoints, model, facts | {"lora": asdict(lora), "base": kept}, step)


def _save(folder: Path, model, facts, step: int) -> Path:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    writer = CheckpointWriter(folder, start_ranks("cpu"), model, optimizer)
    return writer.save(Progress(step, 1000 * step, 10 * step), facts)
