"""Which checkpoints a run saves, keeps and deletes."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.checkpoint_files import CHECKPOINT_MANIFEST, list_checkpoints
from common.progress import format_bytes, format_duration
from common.publish import TEMPORARY_SUFFIX
from train.between import Validator
from train.checkpoint import CheckpointWriter, Progress
from train.parallel import check_replicas
from train.recorder import Recorder
from train.run_config import CheckpointConfig


@dataclass
class CheckpointKeeper:
    """Saves a run's checkpoints and deletes those that are due. All ranks call `save` together."""

    folder: Path
    writer: CheckpointWriter
    config: CheckpointConfig
    facts: dict[str, Any]  # what every manifest says: model, tokenizer, data, configuration
    validator: Validator
    recorder: Recorder
    resumed_from: Path | None
    scaler: torch.amp.GradScaler
    deletes: bool  # one rank's task

    def save(self, progress: Progress) -> None:
        """Save the state after `progress`.

        Raises ReplicasDiffer before anything is written if the ranks' weights are no longer the same.
        """
        started = time.monotonic()
        check_replicas(self.writer.ranks, self.writer.model)
        facts = {**self.facts, "val_loss": self.validator.latest, "scaler": self.scaler.state_dict()}
        path = self.writer.save(progress, facts)
        if self.deletes:
            prune(
                self.folder,
                keep_last=self.config.keep_last,
                keep_every_steps=self.config.keep_every_steps,
                never=self.resumed_from,
            )
            size = sum(file.stat().st_size for file in path.iterdir())
            seconds = time.monotonic() - started
            record = {"kind": "save", "step": progress.step, "save_seconds": seconds, "save_bytes": size}
            self.recorder.note({**record, "time": time.time()})
            self.recorder.say(f"saved {path} ({format_bytes(size)}, {format_duration(seconds)})")


def prune(folder: Path, *, keep_last: int, keep_every_steps: int, never: Path | None) -> None:
    """Delete checkpoints that are neither among the newest, nor at a multiple, nor the one resumed from."""
    for index, (step, path) in enumerate(list_checkpoints(folder)):
        for_good = keep_every_steps > 0 and step % keep_every_steps == 0
        if index >= keep_last and not for_good and path != never and (path / CHECKPOINT_MANIFEST).exists():
            # the manifest first: a deletion that is cut short leaves no checkpoint that looks whole
            (path / CHECKPOINT_MANIFEST).unlink()
            shutil.rmtree(path)


def sweep_leftovers(folder: Path) -> None:
    """Delete what a save that was cut short left under its temporary name."""
    for path in folder.glob(f".step-*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)
