"""Language modelling: predict every token from those before it. The loss is the cross-entropy in nats."""

from collections.abc import Callable

from torch import Tensor

from train.batches.loader import MicroBatch, StepBatch


class LanguageModelling:
    """The objective of pre-training, and of fine-tuning on texts."""

    def target_count(self, batch: StepBatch) -> int:
        """Each token but a sequence's first is a target once."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """As many in every step."""
        return batch.total_target_count

    def loss(self, model: Callable[..., Tensor], batch: MicroBatch, scale: Tensor) -> Tensor:
        """The summed cross-entropy of a micro-batch in nats: (), float32."""
        return model(batch.tokens, batch.targets, document_ids=batch.document_ids, scale=scale)

    def record(self, loss: float) -> dict[str, float]:
        """Nats per token."""
        return {"loss": loss}
