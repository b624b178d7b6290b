"""The trained model that a fine-tuning begins with.

Adapters are saved without the weights they stand beside: those are copied once, to `checkpoints/base`, so that a run's
folder holds all that the run needs, wherever it is moved to. A checkpoint names its base by hash.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.checkpoint_files import (
    CHECKPOINT_MANIFEST,
    BadCheckpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    weights_identity,
    write_checkpoint_manifest,
)
from common.errors import UserError
from common.progress import format_count
from common.publish import TEMPORARY_SUFFIX, publish_folder, sha256_file
from common.run_folder import RunFolder
from data_prep.token_set import TokenSet
from model.config import ModelConfig
from model.counts import parameter_count
from model.gpt import GPT
from model.lora import LoraConfig, add_lora, lora_tensors
from model.weights import config_from_dict, load_model, load_weights, save_tensors

BASE_FOLDER = "base"  # below a run's checkpoints
WEIGHTS_FILE = "weights-00000-of-00001.safetensors"


@dataclass(frozen=True)
class Base:
    """What a fine-tuning begins with.

    Attributes:
        source: a checkpoint with its weights: the one given, or the run's own copy.
        manifest: what it says of itself.
        identity: of the weights of the checkpoint that was given when the run began.
        adapters: what is trained beside the weights; None: the weights themselves.
    """

    source: Path
    manifest: dict[str, Any]
    identity: str
    adapters: LoraConfig | None = None

    def __str__(self) -> str:
        return f"the weights of {self.source}"

    @property
    def model(self) -> ModelConfig:
        return config_from_dict(self.manifest["model"])

    def check_tokens(self, tokens: TokenSet) -> None:
        """Raises UserError where the data were not made with the base's tokenizer: ids would mean something else."""
        theirs, ours = tokens.tokenizer_spec, self.manifest["tokenizer"]
        if theirs["sha256"] != ours["sha256"]:
            raise UserError(
                f"{tokens.folder} was made with a {theirs['kind']} tokenizer of {theirs['vocab_size']} ids, the base "
                f"with a {ours['kind']} one of {ours['vocab_size']}: prepare the data again with "
                f"--tokenizer {self.source}"
            )

    def check_checkpoint(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        """Raises UserError where a checkpoint to go on from is of no fine-tuning, or of another base's."""
        if "base" not in manifest:
            raise UserError(
                f"{checkpoint} was not written by finetune.py: give it as the base, and a --run.name of its own"
            )
        if manifest["base"]["identity"] != self.identity:
            raise UserError(
                f"{checkpoint} was trained on another base: give that base, or --run.name NAME for another run"
            )

    def keep(self, checkpoints: Path, model: ModelConfig) -> None:
        """Copy the weights to where the adapters' checkpoints look for them, whole or not at all. One rank calls.

        Raises OSError where they can't be written.
        """
        final = checkpoints / BASE_FOLDER
        if self.adapters is None or final.exists():
            return
        temporary = checkpoints / f".{BASE_FOLDER}{TEMPORARY_SUFFIX}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        path = temporary / WEIGHTS_FILE
        try:
            save_tensors(path, self._weights(model))
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        manifest = {
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}},
            "model": asdict(model),
            "tokenizer": self.manifest["tokenizer"],
            "data_identity": self.manifest.get("data_identity"),
            "identity": self.identity,
            **{name: self.manifest[name] for name in ("step", "tokens", "sequences")},
        }
        write_checkpoint_manifest(temporary, manifest)
        publish_folder(temporary, final)

    def fill(self, model: GPT, checkpoints: Path, seed: int, *, resumed: bool) -> None:
        """Give a new model the base's weights, and the adapters that are to be trained. All ranks call.

        A resumed run's checkpoint brings what is trained: of all weights, nothing is left to be filled.
        """
        if self.adapters is None:
            if not resumed:
                load_weights(model, self._weights(model.config), self.source)
        else:
            kept = checkpoints / BASE_FOLDER
            load_weights(model, dict(load_model(kept).named_parameters()), kept)
            add_lora(model, self.adapters, seed)

    def facts(self, checkpoints: Path) -> dict[str, Any]:
        """What every checkpoint of the run says of its base."""
        if self.adapters is None:
            return {"base": {"identity": self.identity}}
        sha256 = sha256_file(checkpoints / BASE_FOLDER / CHECKPOINT_MANIFEST)
        base = {"identity": self.identity, "folder": BASE_FOLDER, "sha256": sha256}
        return {"lora": asdict(self.adapters), "base": base}

    def describe(self, model: GPT) -> list[str]:
        """What is trained, beside what."""
        lines = [f"base: {self.source}, {format_count(parameter_count(self.model))} parameters"]
        if self.adapters is not None:
            trained = sum(value.numel() for value in lora_tensors(model).values())
            of = ", ".join(self.adapters.targets)
            lines.append(f"adapters of rank {self.adapters.rank} on {of}: {trained:,} parameters are trained")
        return lines

    def _weights(self, model: ModelConfig) -> dict[str, torch.Tensor]:
        """The base's weights as `model` takes them: learned positions beyond its block size are left off."""
        weights = {name: value.detach() for name, value in load_model(self.source).named_parameters()}
        if "wpe.weight" in weights:
            weights["wpe.weight"] = weights["wpe.weight"][: model.block_size]
        return weights


def find_base(given: str, folder: RunFolder) -> Base:
    """The base a run begins with; for one that has begun, the base it has begun with.

    Raises UserError where there is none, or the run has begun with another one. (What was given may be gone by then.)
    """
    own = _begun_with(folder)
    try:
        source = find_checkpoint(given)
    except UserError:
        if own is None:
            raise
        return own
    manifest = read_checkpoint_manifest(source)
    identity = weights_identity(manifest)
    if own is None:
        return Base(source, manifest, identity)
    if own.identity != identity:
        raise UserError(
            f"{folder.path} has begun with another base than {source}: give that one, or another --run.name"
        )
    return own


def _begun_with(folder: RunFolder) -> Base | None:
    """The base that a run's files tell of, if it has begun."""
    kept = folder.checkpoints / BASE_FOLDER
    if (kept / CHECKPOINT_MANIFEST).exists():
        try:
            manifest = read_checkpoint_manifest(kept)
        except BadCheckpoint as error:
            raise UserError(
                f"{error}: without its base the run can't go on; copy it again from where the run was copied from, or "
                "give another --run.name"
            ) from None
        return Base(kept, manifest, manifest["identity"])
    for _, path in list_checkpoints(folder.checkpoints):
        try:
            manifest = read_checkpoint_manifest(path)
        except BadCheckpoint:
            continue
        if "base" not in manifest:
            raise UserError(f"{folder.path} is no run of finetune.py: give another --run.name")
        return Base(path, manifest, manifest["base"]["identity"])
    return None


def with_adapters(base: Base, adapters: LoraConfig | None) -> Base:
    return replace(base, adapters=adapters)
