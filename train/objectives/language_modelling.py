"""Language modelling: predict every token from those before it. The loss is the cross-entropy in nats."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.batches.loader import MicroBatch, StepBatch


class LanguageModelling:
    """The objective of pre-training, and of fine-tuning on texts.

    Args:
        z_loss: coefficient of logsumexp(logits)², which is learned from and reported beside the cross-entropy
            (`model.loss.head_losses`); 0: none.
        sources: names of a mix's sources, whose losses are reported apart; none for a single set.
    """

    unit = "target_tokens"

    def __init__(self, z_loss: float = 0.0, sources: Sequence[str] = ()) -> None:
        self._z_loss, self.sources = z_loss, tuple(sources)
        self.terms: tuple[str, ...] = ("z_loss",) if z_loss else ()

    def updates(self, batch: StepBatch, step: int) -> Iterable[StepBatch]:
        """One, from the batch."""
        return (batch,)

    def target_count(self, batch: StepBatch) -> int:
        """Each token but a sequence's first is a target once."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """As many in every step."""
        return batch.total_target_count

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of a micro-batch in nats, (), float32, with the z-loss; each of them detached."""
        z_loss, by_source = self._z_loss or None, bool(self.sources)
        more = {"by_sequence": True} if by_source else {}  # a model of one's own need not know it
        found = model(batch.tokens, batch.targets, document_ids=batch.document_ids, scale=scale, z_loss=z_loss, **more)
        loss, *parts = found if isinstance(found, tuple) else (found,)
        terms = parts[: len(self.terms)]
        own = loss.detach()
        for term in terms:
            own = own - term
        reported = torch.stack([own, *terms])  # (1 + len(terms))
        return loss, torch.cat([reported, self._by_source(parts[-1], batch)]) if by_source else reported

    def _by_source(self, losses: Tensor, batch: MicroBatch) -> Tensor:
        """Losses of sequences (M,) summed by source: (S,)."""
        if batch.sources is None:  # a micro-batch to warm up
            return losses.new_zeros(len(self.sources))
        numbers = torch.arange(len(self.sources), device=losses.device)  # (S,)
        return torch.where(batch.sources.unsqueeze(1) == numbers, losses.unsqueeze(1), 0.0).sum(dim=0)

    def record(self, loss: float) -> dict[str, float]:
        """Nats per token."""
        return {"loss": loss}

    def report(self, terms: Mapping[str, float]) -> None:
        """Nothing more."""
