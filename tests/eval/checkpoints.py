"""Checkpoints of tiny models, by the trainer's own writer."""

from dataclasses import asdict
from pathlib import Path

import torch

from data_prep.tokenization.loading import load_tokenizer
from model.ranks import start_ranks
from tests.model.small import small_model
from train.checkpoints.writer import CheckpointWriter
from train.progress import Progress


def write_checkpoint(folder: Path, *, tokenizer="byte", step=7, noise=0.1, seed=0, **options) -> Path:
    """A checkpoint below `folder` of a model with the tokenizer's vocabulary; its folder."""
    spec = load_tokenizer(tokenizer).spec
    model = small_model(seed, noise=noise, **{"vocab_size": spec["vocab_size"], **options})
    optimizer = torch.optim.AdamW(model.parameters())
    facts = {"model": asdict(model.config), "tokenizer": spec, "data_identity": "d" * 64}
    writer = CheckpointWriter(folder, start_ranks("cpu"), model, optimizer)
    return writer.save(Progress(step, 1000 * step, 10 * step), facts)
