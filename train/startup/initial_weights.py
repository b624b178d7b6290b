"""What a run starts from: random weights here, or those of a checkpoint (`from_checkpoint`).

Both have the same methods, so that no caller asks which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.checkpoint_manifest import CheckpointManifest
from common.run_folder import RunFolder
from model.config import ModelConfig
from model.lora_config import LoraConfig

if TYPE_CHECKING:  # a start is checked without torch
    from data_prep.token_sets.token_set import TokenSet
    from model.gpt import GPT
    from train.settings.sections import Config


class InitialWeights(Protocol):
    """What a run starts from."""

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters trained beside frozen weights; None: the weights themselves are trained."""

    @property
    def vocab_size(self) -> int | None:
        """The number of ids they know; None where any number does."""

    @property
    def untrained(self) -> bool:
        """Whether the model is untrained."""

    def fitted(self, tokens: TokenSet, config: Config) -> InitialWeights:
        """For these data, and with the adapters that the configuration has for them.

        Raises UserError where the data were not made with the weights' tokenizer, or one that only appends ids to it:
        ids would mean something else.
        """

    def check_checkpoint(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        """Raises UserError where a checkpoint to resume from did not start from these weights."""

    def settled(self, folder: RunFolder) -> InitialWeights:
        """The weights once the run's lock is held: another start may have started the run."""

    def check_files(self, *, resumed: bool) -> None:
        """Raises UserError where the files that will be read don't hold the model of their manifest. One rank calls."""

    def recorded(self) -> dict[str, Any]:
        """What the record of a start holds of them, by which the next one finds them again."""

    def keep(self, checkpoints: Path, model: ModelConfig) -> None:
        """Copy what the run's checkpoints don't hold into its folder. One rank calls. Raises OSError."""

    def fill(self, model: GPT, checkpoints: Path, seed: int, *, resumed: bool) -> None:
        """Give a new model its initial weights. All ranks call."""

    def facts(self, checkpoints: Path) -> dict[str, Any]:
        """What every checkpoint of the run records of them."""

    def describe(self, model: GPT) -> list[str]:
        """Lines for the log."""


@dataclass(frozen=True)
class FromScratch:
    """Random weights, drawn from the run's seed."""

    adapters = None
    vocab_size = None
    untrained = True

    def __str__(self) -> str:
        return "scratch"

    def fitted(self, tokens: TokenSet, config: Config) -> FromScratch:
        return self

    def check_checkpoint(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        pass  # train.checkpoints.resume refuses adapters

    def settled(self, folder: RunFolder) -> FromScratch:
        return self

    def check_files(self, *, resumed: bool) -> None:
        pass

    def recorded(self) -> dict[str, Any]:
        return {}

    def keep(self, checkpoints: Path, model: ModelConfig) -> None:
        pass

    def fill(self, model: GPT, checkpoints: Path, seed: int, *, resumed: bool) -> None:
        from model.initialisation import initialise

        if not resumed:  # the checkpoint has them all; drawing 1.3 billion takes a core a quarter of a minute
            initialise(model, seed)

    def facts(self, checkpoints: Path) -> dict[str, Any]:
        return {}

    def describe(self, model: GPT) -> list[str]:
        return []
