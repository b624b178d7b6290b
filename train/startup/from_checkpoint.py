"""A run that starts from a checkpoint's weights: a fine-tuning, with adapters or of all weights.

Adapters are saved without the weights they belong to: those are copied once, to `checkpoints/base`, so that a run's
folder holds all that the run needs, wherever it is moved to. A checkpoint names its base by hash.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint_files import (
    CHECKPOINT_MANIFEST,
    BadCheckpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    weights_identity,
    write_checkpoint_manifest,
)
from common.checkpoint_manifest import CheckpointManifest
from common.errors import UserError
from common.progress import format_count
from common.publish import TEMPORARY_SUFFIX, publish_folder, sha256_file
from common.run_folder import RunFolder
from model.config import ModelConfig, config_from_dict
from model.counts import parameter_count
from model.lora_config import LoraConfig
from train.run.provenance import read_starts

if TYPE_CHECKING:  # a start is checked without torch
    import torch

    from data_prep.token_sets.token_set import TokenSet
    from model.gpt import GPT
    from train.settings.sections import Config

BASE_FOLDER = "base"  # below a run's checkpoints
WEIGHTS_FILE = "weights-00000-of-00001.safetensors"


@dataclass(frozen=True)
class FromCheckpoint:
    """The weights of a checkpoint: a fine-tuning.

    Attributes:
        source: a checkpoint with its weights: the one given, or the run's own copy.
        manifest: its manifest.
        identity: of the weights of the checkpoint that was given when the run started.
        adapters: what is trained beside the weights; None: the weights themselves.
        tokenizer: the spec of the data's tokenizer, which may append ids to the base's.
        given: as the command line names it: a checkpoint, or a run, whose newest one it was at the first start.
        note: what has changed about `given` since.
        is_reference: the run compares itself with these weights, so that it keeps a copy also without adapters.
    """

    source: Path
    manifest: CheckpointManifest
    identity: str
    adapters: LoraConfig | None = None
    given: str = ""
    note: str = ""
    tokenizer: dict[str, Any] | None = None
    is_reference: bool = False
    untrained = False

    def __str__(self) -> str:
        return f"the weights of {self.source}"

    @property
    def model(self) -> ModelConfig:
        return config_from_dict(self.manifest["model"], self.source)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def fitted(self, tokens: TokenSet, config: Config) -> FromCheckpoint:
        """For these data, with the adapters that the configuration has for them.

        Raises UserError where they were not made with the base's tokenizer, or one that only appends ids to it: ids
        would mean something else.
        """
        theirs, ours = tokens.tokenizer_spec, self.manifest["tokenizer"]
        if not appends_to(theirs, ours):
            raise UserError(
                f"{tokens.folder} was made with a {theirs['kind']} tokenizer of {theirs['vocab_size']} ids, the base "
                f"with a {ours['kind']} one of {ours['vocab_size']}: prepare the data again with "
                f"--tokenizer {self.source}"
            )
        adapters = config.for_tokenizer(theirs).adapters()
        return replace(self, tokenizer=theirs, adapters=adapters, is_reference=config.needs_reference)

    def check_checkpoint(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        """Raises UserError where a checkpoint to resume from is not of a fine-tuning, or of another base's."""
        if "base" not in manifest:
            raise UserError(
                f"{checkpoint} was not written by finetune.py: give it as the base, and a --run.name of its own"
            )
        if manifest["base"]["identity"] != self.identity:
            kept = checkpoint.resolve().parent / BASE_FOLDER
            which = f"that base ({kept})" if kept.is_dir() else "that base"
            raise UserError(
                f"{checkpoint} was trained on another base: give {which}, or --run.name NAME for another run"
            )

    def check_files(self, *, resumed: bool) -> None:
        from model.weights import fitting_checkpoint

        if self.adapters is not None or not resumed:
            fitting_checkpoint(self.source)

    def settled(self, folder: RunFolder) -> FromCheckpoint:
        """The base once the run's lock is held: another start may have started the run, a running run its next
        checkpoint.

        Raises UserError as `find_base` does. One rank calls, and all take its answer: a run that is still training has
        another newest checkpoint a moment later.
        """
        begun = _started_with(folder)
        if begun is None and (self.source / CHECKPOINT_MANIFEST).exists():
            return self
        if begun is not None and begun.source == self.source:
            return self
        found = find_base(self.given, folder)
        return replace(found, adapters=self.adapters, tokenizer=self.tokenizer, is_reference=self.is_reference)

    def recorded(self) -> dict[str, Any]:
        given, source = Path(self.given).resolve(), self.source.resolve()
        return {"base": {"given": str(given), "checkpoint": str(source), "identity": self.identity}}

    def keep(self, checkpoints: Path, model: ModelConfig) -> None:
        """Copy the weights to where the run looks for them, whole or not at all. One rank calls.

        Raises OSError where they can't be written.
        """
        final = checkpoints / BASE_FOLDER
        if (self.adapters is None and not self.is_reference) or final.exists():
            return
        from model.weights import save_tensors

        temporary = checkpoints / f".{BASE_FOLDER}{TEMPORARY_SUFFIX}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        path = temporary / WEIGHTS_FILE
        try:
            save_tensors(path, self._weights(model))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        manifest: dict[str, Any] = {
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}},
            "model": asdict(model),
            "tokenizer": self.tokenizer or self.manifest["tokenizer"],
            "data_identity": self.manifest["data_identity"],
            "identity": self.identity,
            "step": self.manifest["step"],
            "tokens": self.manifest["tokens"],
            "sequences": self.manifest["sequences"],
        }
        write_checkpoint_manifest(temporary, manifest)
        publish_folder(temporary, final)

    def fill(self, model: GPT, checkpoints: Path, seed: int, *, resumed: bool) -> None:
        """Give a new model the base's weights, and the adapters that are to be trained. All ranks call.

        A resumed run's checkpoint brings what is trained: of all weights, nothing is left to be filled.
        """
        from model.lora import add_lora
        from model.weights import load_model, load_weights

        if self.adapters is None:
            if not resumed:
                load_weights(model, self._weights(model.config), self.source)
        else:
            kept = checkpoints / BASE_FOLDER
            load_weights(model, dict(load_model(kept).named_parameters()), kept)
            add_lora(model, self.adapters, seed)

    def facts(self, checkpoints: Path) -> dict[str, Any]:
        """What every checkpoint of the run records of its base."""
        if self.adapters is None:
            return {"base": {"identity": self.identity}}
        sha256 = sha256_file(checkpoints / BASE_FOLDER / CHECKPOINT_MANIFEST)
        base = {"identity": self.identity, "folder": BASE_FOLDER, "sha256": sha256}
        return {"lora": asdict(self.adapters), "base": base}

    def describe(self, model: GPT) -> list[str]:
        """Log lines: the base, and what is trained."""
        lines = [f"base: {self.source}, {format_count(parameter_count(self.model))} parameters"]
        if added := model.config.vocab_size - self.vocab_size:
            lines.append(f"{added} ids more than the base has: their rows start as the mean of the others")
        if self.adapters is not None:
            from model.lora import lora_tensors

            trained = sum(value.numel() for value in lora_tensors(model).values())
            of = ", ".join(self.adapters.targets)
            rows = f", the rows of {self.adapters.new_rows} ids whole" if self.adapters.new_rows else ""
            lines.append(f"adapters of rank {self.adapters.rank} on {of}{rows}: {trained:,} parameters are trained")
        return [*lines, self.note] if self.note else lines

    def _weights(self, model: ModelConfig) -> dict[str, torch.Tensor]:
        """The base's weights as `model` takes them: learned positions beyond its block size are dropped, ids that it
        has beyond the base's get rows. A scalar head that the base lacks is 0, one that `model` lacks is dropped.
        """
        import torch

        from model.vocabulary import with_ids
        from model.weights import load_model

        weights = {name: value.detach() for name, value in load_model(self.source).named_parameters()}
        if "wpe.weight" in weights:
            weights["wpe.weight"] = weights["wpe.weight"][: model.block_size]
        if not model.scalar_head:
            weights.pop("scalar_head.weight", None)
        elif not self.model.scalar_head:
            weights["scalar_head.weight"] = torch.zeros(1, model.n_embd)
        return with_ids(weights, self.model.vocab_size, model)


def appends_to(spec: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's spec is another's, or only appends ids to it, those of the tokens around turns."""
    if spec["sha256"] == base["sha256"]:
        return True
    if spec["kind"] != "chat":
        return False
    known = base if base["kind"] != "chat" else base["base"]
    kept = list(base.get("turn_tokens", ()))
    return bool(spec["base"]["sha256"] == known["sha256"] and spec["turn_tokens"][: len(kept)] == kept)


def find_base(given: str, folder: RunFolder) -> FromCheckpoint:
    """The base a run starts from; for one that has started, the base it started from.

    A run that is given means its newest checkpoint at the first start, and that one from then on: a run that is still
    training moves on.

    Raises UserError where there is none, or the run started from another one. (What was given may be gone by then.)
    """
    begun, first = _started_with(folder), _first_start(given, folder)
    if begun is not None:
        return replace(begun, given=given, note=_check_given(given, folder, begun, first is not None))
    note = ""
    if first:
        try:
            return _base_of(Path(first["checkpoint"]), given)
        except UserError:  # nothing has been saved of the start that recorded it
            note = f"{first['checkpoint']}, the base of an earlier start, is gone: another is used"
    return replace(_base_of(find_checkpoint(given), given), note=note)


def _base_of(checkpoint: Path, given: str) -> FromCheckpoint:
    """Raises UserError where the checkpoint is not whole."""
    source = find_checkpoint(checkpoint)
    manifest = read_checkpoint_manifest(source)
    return FromCheckpoint(source, manifest, _identity(manifest), given=given)


def _identity(manifest: CheckpointManifest) -> str:
    """Of a checkpoint's weights; of a run's copy of its base: of what it was copied from."""
    return manifest.get("identity") or weights_identity(manifest)


def _check_given(given: str, folder: RunFolder, begun: FromCheckpoint, as_before: bool) -> str:
    """A note where the run given has moved on since; "" where all is as at the first start, or what was given is gone.

    Args:
        as_before: whether an earlier start of this run was given the same.

    Raises UserError where another base is given than the run started from.
    """
    path = Path(given)
    is_run = not (path / CHECKPOINT_MANIFEST).exists()
    checkpoints = [saved for _, saved in list_checkpoints(RunFolder(path).checkpoints)] if is_run else [path]
    there = [(checkpoint, _identity(manifest)) for checkpoint in checkpoints if (manifest := _manifest(checkpoint))]
    if not there or there[0][1] == begun.identity:
        return ""
    if is_run and (as_before or begun.identity in (identity for _, identity in there)):
        return f"{given} has moved on to {there[0][0].name}: this run keeps the base it started from"
    raise UserError(f"{folder.path} started from another base than {there[0][0]}: give that one, or another --run.name")


def _manifest(checkpoint: Path) -> CheckpointManifest | None:
    try:
        return read_checkpoint_manifest(checkpoint)
    except BadCheckpoint:
        return None


def _first_start(given: str, folder: RunFolder) -> dict[str, Any] | None:
    """What this run's starts have recorded of the base that `given` names; None where it was another, or nothing."""
    for start in reversed(read_starts(folder.provenance)):
        base = start.get("base")
        if isinstance(base, dict) and base.get("given") == str(Path(given).resolve()):
            return base
        if base is None and _first_argument(str(start.get("command"))) == given:  # older versions recorded no more
            return {}
    return None


def _first_argument(command: str) -> str | None:
    try:
        return shlex.split(command)[2]  # after the interpreter and the script
    except (ValueError, IndexError):
        return None


def _started_with(folder: RunFolder) -> FromCheckpoint | None:
    """The base that a run's files record, if it has started."""
    kept = folder.checkpoints / BASE_FOLDER
    if os.path.lexists(kept):
        try:
            manifest = read_checkpoint_manifest(kept)
            if "identity" not in manifest:
                raise BadCheckpoint(f"{kept / CHECKPOINT_MANIFEST} is damaged (identity: it is missing)")
        except BadCheckpoint as error:
            raise UserError(
                f"{error}: without its base the run can't continue; copy it again from where the run was copied from, "
                "or give another --run.name"
            ) from None
        return FromCheckpoint(kept, manifest, manifest["identity"])
    for _, path in list_checkpoints(folder.checkpoints):
        try:
            manifest = read_checkpoint_manifest(path)
        except BadCheckpoint:
            continue
        if "base" not in manifest:
            raise UserError(f"{folder.path} is not a run of finetune.py: give another --run.name")
        return FromCheckpoint(path, manifest, manifest["base"]["identity"])
    return None


def with_adapters(base: FromCheckpoint, adapters: LoraConfig | None) -> FromCheckpoint:
    return replace(base, adapters=adapters)
