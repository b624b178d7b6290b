"""A batch that a step did not learn from, run again sequence by sequence: which layer was first?

By an uncompiled twin of the model, without dropout. T tokens, C width, L blocks.
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.bad_batch import layer_at_fault
from common.errors import UserError
from common.publish import write_json_whole
from common.run_folder import RunFolder
from model.gpt import GPT
from model.loss import head_loss
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks
from train.batches.loader import StepBatch
from train.layer_statistics.activations import stream_of, twin_of
from train.run.recorder import Recorder

MOST = 3  # batches of a run, over all its starts


@dataclass(frozen=True)
class SequenceFigures:
    """What a sequence does to the model.

    Attributes:
        loss: its mean, in nats per target. rank: which had it.
        activation_rms, activation_max: (L,), of the residual stream after each block.
        gradient_norm: (L,), of the mean loss, by the residual stream after each block.
        first: forward or backward, and where the first value that is NaN or inf came up; None where all are finite.
    """

    sequence: int
    rank: int
    loss: float
    activation_rms: list[float]
    activation_max: list[float]
    gradient_norm: list[float]
    first: str | None

    @property
    def badness(self) -> tuple[bool, float]:
        """By which the worst is found: not finite, or the highest loss."""
        return self.first is not None, self.loss if math.isfinite(self.loss) else math.inf


class BadBatches:
    """Looks at bad batches, MOST of a run, and writes what it finds to the run's folder. All ranks call together."""

    def __init__(self, model: GPT, ranks: Ranks, folder: RunFolder, recorder: Recorder, dtype: Dtype) -> None:
        self._model = model
        self._ranks = ranks
        self._folder = folder
        self._recorder = recorder
        self._dtype = dtype

    def examine(self, batch: StepBatch, step: int, why: str) -> None:
        """Run every sequence of a step's batch again. Weights, gradients and random numbers stay as they are.

        Whatever goes wrong is a warning: the run ends, or continues, for its own reason.
        """
        path = self._folder.bad_batch(step)
        seen = len(list(path.parent.glob("step-*.json"))) if self._ranks.is_first else 0
        if self._ranks.from_first(seen >= MOST or path.exists()):
            return
        worst, trouble = None, ""
        try:
            worst = self._worst(batch)
        except (RuntimeError, UserError) as error:  # out of memory, a broken device
            trouble = str(error).splitlines()[0] if str(error) else type(error).__name__
        found = self._ranks.gather((None if worst is None else asdict(worst), trouble))
        if self._ranks.is_first:
            self._write(step, why, found)

    def _worst(self, batch: StepBatch) -> SequenceFigures | None:
        """Of this rank's sequences."""
        twin = twin_of(self._model)
        numbers, worst = iter(batch.windows.ravel().tolist()), None
        for micro_batch in batch.micro_batches(self._ranks.device):
            for row in range(len(micro_batch.tokens)):
                documents = None if micro_batch.document_ids is None else micro_batch.document_ids[row : row + 1]
                tokens, targets = micro_batch.tokens[row : row + 1], micro_batch.targets[row : row + 1]
                found = self._figures(twin, next(numbers), tokens, targets, documents)
                if worst is None or found.badness > worst.badness:
                    worst = found
        return worst

    def _figures(
        self, twin: GPT, sequence: int, tokens: Tensor, targets: Tensor, documents: Tensor | None
    ) -> SequenceFigures:
        """Forward and backward of one sequence, (1, T) each."""
        streams: list[Tensor] = []  # (1, T, C) after each block
        blocks = [block for block in twin.h if isinstance(block, nn.Module)]
        hooks = [block.register_forward_hook(lambda _, inputs, out: streams.append(stream_of(out))) for block in blocks]
        try:
            with torch.enable_grad(), autocast(self._dtype, tokens.device):
                hidden = twin.hidden(tokens, document_ids=documents)  # (1, T, C)
                head = twin.head_weight.detach()  # whose gradient nobody needs
                size, cap = twin.config.vocab_size, twin.config.logit_softcap
                loss = head_loss(hidden, head, targets, size, softcap=cap) / (targets >= 0).sum()  # ()
                gradients = torch.autograd.grad(loss, streams)
        finally:
            for hook in hooks:
                hook.remove()
        rms = [stream.detach().float().square().mean().sqrt() for stream in streams]
        largest = [stream.detach().float().abs().max() for stream in streams]
        norms = [gradient.float().norm() for gradient in gradients]
        table = torch.stack([torch.stack(rms), torch.stack(largest), torch.stack(norms)]).tolist()  # (3, L)
        first = _first(loss.item(), table[1], table[2])
        rms_by_block, largest_by_block, norm_by_block = table
        return SequenceFigures(
            sequence, self._ranks.rank, loss.item(), rms_by_block, largest_by_block, norm_by_block, first
        )

    def _write(self, step: int, why: str, found: list[tuple[dict[str, Any] | None, str]]) -> None:
        troubles = [f"rank {rank}: {trouble}" for rank, (_, trouble) in enumerate(found) if trouble]
        shares = [SequenceFigures(**figures) for figures, _ in found if figures is not None]
        worst = max(shares, key=lambda share: share.badness, default=None)
        for trouble in troubles:
            self._recorder.log(f"WARNING: the batch of step {step} could not be examined: {trouble}")
        if worst is None:
            return
        path = self._folder.bad_batch(step)
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_json_whole(path, {"step": step, "why": why, "blocks": len(worst.activation_rms)} | asdict(worst))
        self._recorder.log(describe(step, worst) + f" (details: {path})")


def describe(step: int, worst: SequenceFigures) -> str:
    """One line."""
    text = f"the batch of step {step} again: sequence {worst.sequence} (rank {worst.rank}) has loss {worst.loss:.4g}"
    return f"{text}; {layer_at_fault(worst.first, [*worst.activation_max])}"


def _first(loss: float, largest: list[float], gradients: list[float]) -> str | None:
    """Where the first value that is NaN or inf came up: the forward goes from the first block to the head."""
    for block, value in enumerate(largest):
        if not math.isfinite(value):
            return f"forward of h.{block}"
    if not math.isfinite(loss):
        return "forward of the head"
    for block in reversed(range(len(gradients))):
        if not math.isfinite(gradients[block]):
            return "backward of the head" if block == len(gradients) - 1 else f"backward of h.{block + 1}"
    return None
