"""Language modelling: predict every token from those before it. The loss is the cross-entropy in nats."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.batches.loader import MicroBatch, StepBatch


class LanguageModelling:
    """The objective of pre-training, and of fine-tuning on texts.

    Args:
        z_loss: coefficient of logsumexp(logits)², which is learned from and reported beside the cross-entropy
            (`model.loss.head_loss_and_z`); 0: none.
    """

    unit = "target_tokens"

    def __init__(self, z_loss: float = 0.0) -> None:
        self._z_loss = z_loss
        self.terms: tuple[str, ...] = ("z_loss",) if z_loss else ()

    def target_count(self, batch: StepBatch) -> int:
        """Each token but a sequence's first is a target once."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """As many in every step."""
        return batch.total_target_count

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of a micro-batch in nats, (), float32, with the z-loss; each of them detached."""
        documents, targets = batch.document_ids, batch.targets
        if not self._z_loss:
            loss = model(batch.tokens, targets, document_ids=documents, scale=scale)
            return loss, loss.detach().unsqueeze(0)
        loss, z = model(batch.tokens, targets, document_ids=documents, scale=scale, z_loss=self._z_loss)
        return loss, torch.stack([loss.detach() - z, z])

    def record(self, loss: float) -> dict[str, float]:
        """Nats per token."""
        return {"loss": loss}
