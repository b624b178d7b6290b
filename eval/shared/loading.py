"""Where the evaluation scripts start: a model and its tokenizer from a run's folder or a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.checkpoint_files import find_checkpoint, read_checkpoint_manifest
from common.checkpoint_manifest import CheckpointManifest, origin_of
from common.errors import UserError
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Tokenizer
from model.devices import DeviceChoice, choose_device, share_threads
from model.gpt import GPT
from model.number_formats import Dtype, DtypeChoice
from model.precision import resolve_dtype
from model.ranks import Ranks, agreed, start_ranks
from model.weights import load_model


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and what its checkpoint records."""

    model: GPT
    tokenizer: Tokenizer
    checkpoint: Path
    manifest: CheckpointManifest
    weights: str = "trained"  # or ema

    @property
    def facts(self) -> dict[str, Any]:
        """What every evaluation's JSON records of it. weights: as trained, or what they are the mean of."""
        own = {"checkpoint": str(self.checkpoint), "step": self.manifest["step"]}
        return own | {"weights": origin_of(self.manifest, self.weights)}


def load_checkpoint(
    run_or_checkpoint: Path | str,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    *,
    weights: str = "trained",
) -> Loaded:
    """Load a run's newest good checkpoint, or this one. Raises UserError where there is none.

    Args:
        weights: trained, or ema: the exponential average that the run has kept.
        ranks: the ranks that load the same one, which the first rank looks for (all must call): a running run may save
            between one rank's look and another's.
    """
    if ranks is None:
        checkpoint = find_checkpoint(run_or_checkpoint)
    else:
        checkpoint = agreed(ranks, lambda: find_checkpoint(run_or_checkpoint))
    manifest = read_checkpoint_manifest(checkpoint)
    try:
        tokenizer = load_tokenizer(manifest["tokenizer"])
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    model = load_model(checkpoint, device, weights=weights)
    if tokenizer.vocab_size != model.config.vocab_size:  # an id beyond the model's would end in an IndexError
        raise UserError(
            f"the model of {checkpoint} has {model.config.vocab_size:,} ids, but its tokenizer "
            f"{tokenizer.vocab_size:,}: they don't belong together, copy the checkpoint again"
        )
    return Loaded(model, tokenizer, checkpoint, manifest, weights)


def start_evaluation(choice: DeviceChoice) -> Ranks:
    """This process among those of the launcher, if there is one, with its share of the cores.

    Raises UserError where the device is not available.
    """
    if choice != "auto":
        device_for(choice)
    ranks = start_ranks(choice)
    share_threads(ranks.local_world_size)
    return ranks


def device_for(choice: DeviceChoice) -> torch.device:
    """The device of an evaluation's `--device`. Raises UserError where it is not available."""
    try:
        return choose_device(choice)
    except UserError:
        if choice == "auto":
            raise
        raise UserError(f"--device is {choice}, which PyTorch doesn't see here: use --device cpu") from None


def evaluation_dtype(choice: DtypeChoice, device: torch.device) -> Dtype:
    """What an evaluation's `--dtype` means on this device.

    `auto` is bf16 on GPUs that multiply in it, as in training there, and else fp32, which stays full float32.
    """
    if choice != "auto":
        return choice
    return "bf16" if device.type == "cuda" and resolve_dtype("auto", device)[0] == "bf16" else "fp32"
