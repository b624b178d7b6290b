"""One optimizer step."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.precision import Dtype
from model.ranks import Ranks
from train.batches.loader import StepBatch
from train.batches.plan import BatchPlan
from train.errors import NonFiniteLoss
from train.optimization.ddp import Parallel

SMALLEST_LOSS_SCALE = 1.0  # of fp16: what overflows without being scaled up will overflow in every step


@dataclass(frozen=True)
class StepResult:
    """What a step tells of itself.

    loss: mean over the target tokens of all ranks, before the update. grad_norm: global L2 norm before clipping.
    skipped: fp16's loss scale was too high, so that the update was left out; the scale has been lowered.
    """

    loss: float
    grad_norm: float
    skipped: bool


class Stepper:
    """Everything about a step that stays the same from one to the next."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        plan: BatchPlan,
        *,
        dtype: Dtype,
        grad_clip: float,
        seed: int,
    ) -> None:
        self._parallel = parallel
        self._optimizer = optimizer
        self._ranks = ranks
        self._plan = plan
        self._grad_clip = grad_clip or math.inf
        self._seed = seed
        self._parameters = [p for p in parallel.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == "fp16")

    def warm_up(self, block_size: int, *, document_mask: bool = False) -> None:
        """Go through a discarded step in the shapes of training: see `Parallel.warm_up`."""
        shape = (self._plan.micro_batch, block_size)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self._ranks.device)
        self._parallel.warm_up(tokens, tokens if document_mask else None, self._optimizer)

    def __call__(self, batch: StepBatch, step: int) -> StepResult:
        """Learn from one step's batch.

        Raises NonFiniteLoss on all ranks, with parameters and optimizer untouched. An overflow in fp16 is one as well
        once the loss scale, halved in each of a row of them, explains it no longer.
        """
        (target_count,) = self._ranks.sum([float(batch.target_count)])  # known before the first backward
        loss_sum = self._accumulate(batch, step, target_count)
        self.scaler.unscale_(self._optimizer)  # clipping must see the true gradients
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._grad_clip).item()
        (total,) = self._ranks.sum([loss_sum])
        loss = total / target_count
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        overflow = overflow and self.scaler.get_scale() > SMALLEST_LOSS_SCALE
        if not (math.isfinite(loss) and math.isfinite(norm)) and not overflow:
            raise NonFiniteLoss(self._describe(batch, step, loss, norm, loss_sum))
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._parallel.zero_grad(self._optimizer)
        return StepResult(loss, norm, skipped=overflow)

    def _accumulate(self, batch: StepBatch, step: int, target_count: float) -> float:
        """Forward and backward of this rank's micro-batches; return the sum of their losses."""
        device = self._ranks.device
        scale: Tensor = self.scaler.scale(torch.tensor(1.0 / target_count, device=device))  # ()
        loss_sum = torch.zeros((), device=device)
        last = len(batch.tokens) - 1
        for index, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
            self._seed_dropout(step, index)
            documents = None if batch.document_ids is None else batch.document_ids[index]
            loss_sum += self._parallel.backward(
                tokens.to(device, non_blocking=True),  # (M, T)
                targets.to(device, non_blocking=True),  # (M, T)
                None if documents is None else documents.to(device, non_blocking=True),  # (M, T)
                scale=scale,
                last=index == last,
            )
        return loss_sum.item()

    def _seed_dropout(self, step: int, accumulation_index: int) -> None:
        """Dropout depends on the step and the micro-batch's place in it alone: no random state is carried or saved."""
        number = self._plan.micro_batch_number(self._ranks.rank, accumulation_index)
        digest = hashlib.sha256(f"dropout {self._seed} {step} {number}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))

    def _describe(self, batch: StepBatch, step: int, loss: float, norm: float, loss_sum: float) -> str:
        """One line, the same on all ranks. (All ranks get here together: loss and norm are the same everywhere.)"""
        shares = self._ranks.gather((loss_sum, sorted(batch.windows.ravel().tolist())))
        culprits = [(rank, windows) for rank, (share, windows) in enumerate(shares) if not math.isfinite(share)]
        where = "; ".join(f"rank {rank}, windows {windows}" for rank, windows in culprits) or "every loss was finite"
        return f"step {step}: loss {loss}, gradient norm {norm}, before the update ({where})"
