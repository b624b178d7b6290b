"""One optimizer step, from a batch to changed weights. docs/one-step.md reads it line by line."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.seeds import seed_of
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks
from train.batches.loader import MicroBatch, StepBatch
from train.batches.plan import BatchPlan
from train.errors import NonFiniteLoss
from train.objectives.objective import Objective
from train.optimization.compute_timer import ComputeTimer
from train.optimization.ddp import Parallel

CLIP_EPSILON = 1e-6  # as in torch's clip_grad_norm_
SMALLEST_LOSS_SCALE = 1.0  # of fp16: what overflows without being scaled up will overflow in every step


class Verdict(IntEnum):
    """What became of a step, the same on all ranks."""

    LEARNED = 0
    OVERFLOW = 1  # fp16's loss scale was too high: no update, and the scale has been lowered
    BEYOND_LIMITS = 2  # loss or gradient norm: no update
    NON_FINITE = 3  # loss or gradient norm is NaN or inf: no update

    @property
    def skips(self) -> bool:
        """Whether the step was skipped for its loss or gradient norm, and has changed nothing, fp16's scale neither."""
        return self in (Verdict.BEYOND_LIMITS, Verdict.NON_FINITE)


@dataclass(frozen=True)
class Limits:
    """The largest loss (nats) and gradient norm that a step learns from."""

    loss: float = math.inf
    grad_norm: float = math.inf


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    loss: mean over the targets of all ranks, before the update. grad_norm: global L2 norm before clipping.
    targets: their number, in the objective's unit. Of a step with several updates of the optimizer these figures are
    means over its updates, the gradient norm is the largest, and the targets are those of all.
    terms: means of what the objective learns from beside the loss, by their keys in metrics.jsonl.
    by_source: the loss of each source of a mix that has targets in the step, by name.
    """

    loss: float
    grad_norm: float
    verdict: Verdict
    terms: Mapping[str, float] = field(default_factory=dict)
    by_source: Mapping[str, float] = field(default_factory=dict)
    targets: float = 0.0
    updates: int = 1  # of the optimizer


class UpdateWatcher(Protocol):
    """What looks at every update. All ranks call both, in each step that does not end the run."""

    def before_update(self, step: int) -> None:
        """The gradients are averaged over ranks, free of fp16's loss scale and not clipped yet."""

    def after_update(self, step: int) -> None:
        """The update is done, or has been refused."""


class Stepper:
    """Everything about a step that stays the same from one to the next."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        plan: BatchPlan,
        objective: Objective,
        *,
        dtype: Dtype,
        grad_clip: float,
        seed: int,
        limits: Limits = Limits(),
        skip_nonfinite: bool = False,
        on_act: Callable[[str], None] = lambda act: None,
        watcher: UpdateWatcher | None = None,
    ) -> None:
        """Made on every rank.

        Args:
            limits: of the first step; each later one has those that `limits` holds by then, the same on all ranks.
            skip_nonfinite: skip a step whose loss or gradient norm is NaN or inf, rather than raise.
            on_act: called at the start of each part of a step, which a rank that hangs is named by.
        """
        self._parallel = parallel
        self._optimizer = optimizer
        self._ranks = ranks
        self._plan = plan
        self.objective = objective
        self.dtype = dtype
        self._grad_clip = grad_clip or math.inf
        self._seed = seed
        self.limits = limits
        self._skip_nonfinite = skip_nonfinite
        self._on_act = on_act
        self._watcher = watcher
        self.compute_timer = ComputeTimer(ranks.device)
        self._parameters = [p for p in parallel.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == "fp16")
        self._summed = torch.float32 if ranks.device.type == "mps" else torch.float64  # which MPS lacks
        self._refused = torch.zeros((), device=ranks.device)  # (): 1.0 where there must be no update
        self._divisor: Tensor | None = None  # (): of the gradients, where the optimizer is to clip them
        # Fused optimizers read on the device whether to update: the host need not wait for loss and norm first.
        self._on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    def __call__(self, batch: StepBatch, step: int) -> StepResult:
        """Learn from one step's batch, or of a step with several updates from that of the next.

        Raises NonFiniteLoss on all ranks, with the parameters untouched, unless such steps are skipped. An fp16
        overflow counts too once the loss scale has been halved down to 1.
        """
        # Count the targets of all ranks, before the first backward: their number weighs every loss.
        target_count = self._count_targets(batch)
        divisor = max(1.0, target_count)  # a step without any target has the loss 0

        # Accumulate the gradient of the mean over all targets. (DDP averages over ranks, hence their number.)
        weight = self.scaler.scale(torch.tensor(1.0 / divisor, device=self._ranks.device)) * self._ranks.world_size
        parts, sources = 1 + len(self.objective.terms), len(self.objective.sources)
        loss_sum = torch.zeros(parts + sources, device=self._ranks.device)  # (P + S): the loss, its terms; by source
        self.compute_timer.start()
        with autocast(self.dtype, self._ranks.device):  # around all of them: weights are cast once a step
            for index, micro_batch in enumerate(batch.micro_batches(self._ranks.device)):
                self._seed_dropout(step, index)
                loss_sum += self._backward(micro_batch, weight, last=index == len(batch.tokens) - 1)

        # Take the loss scale of fp16 off again, and clip: the norm is that of the true gradient.
        self.scaler.unscale_(self._optimizer)
        if self._watcher is not None:
            self._watcher.before_update(step)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])  # ()
        self._clip(norm)

        # Judge loss and norm on the device; both are the same on all ranks.
        summed = self._ranks.sum_tensor(loss_sum.to(self._summed))  # (P + S)
        loss = summed[:parts] / divisor  # (P)
        within = (loss[0] <= self.limits.loss) & (norm.to(self._summed) <= self.limits.grad_norm)
        self._refused = 1.0 - (within & torch.isfinite(loss).all() & torch.isfinite(norm)).float()  # ()
        report = torch.cat([torch.stack([norm, self._refused]).to(self._summed), loss, summed[parts:]])  # (2 + P + S)

        # Update, unless refused. Where the optimizer learns that on the device, the host waits once: for the report.
        self._on_act("update")
        result = None if self._on_device else self._read(report, batch, step, loss_sum)
        if result is None or result.verdict is Verdict.LEARNED:
            with self._refusing():
                self.scaler.step(self._optimizer)
        result = replace(result or self._read(report, batch, step, loss_sum), targets=target_count)
        if self._watcher is not None:
            self._watcher.after_update(step)
        self._update_scale(result.verdict)
        self._parallel.zero_grad(self._optimizer, accumulating=self._plan.accumulation > 1)
        return result

    def _count_targets(self, batch: StepBatch) -> float:
        """Those of all ranks. Where their number is known ahead, no rank waits for the others' counts."""
        known = self.objective.total_target_count(batch)
        if known is not None:
            return float(known)
        self._on_act("count of targets")
        (counted,) = self._ranks.sum([float(self.objective.target_count(batch))])
        return counted

    def warm_up(self, block_size: int, *, document_mask: bool = False) -> None:
        """One forward and backward of a micro-batch's shape whose gradients are thrown away.

        DDP rebuilds its buckets after the first backward, which changes the order of its sums from 3 ranks on: a
        resumed run would differ from the undisturbed one in its first step. Compilation happens here as well.
        """
        shape, device = (self._plan.micro_batch, block_size), self._ranks.device
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)  # (M, T)
        batch = MicroBatch(tokens, tokens, tokens if document_mask else None)
        accumulating = self._plan.accumulation > 1
        for last in (False, True) if accumulating else (True,):
            self._backward(batch, torch.zeros((), device=device), last=last)
        self._parallel.zero_grad(self._optimizer, accumulating=accumulating)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _backward(self, batch: MicroBatch, weight: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch, times `weight` (); return what it reports, (P + S), summed."""
        with self._parallel.backward_of(last=last):
            self._on_act("forward")
            with autocast(self.dtype, self._ranks.device):
                loss, reported = self.objective.loss(self._parallel.replica, batch, weight)  # (), (P + S)
            self._on_act("backward")
            with torch.autocast(self._ranks.device.type, enabled=False):
                self._parallel.backward(loss, weight, on_reduction=self._end_own_part)
        return reported

    def _end_own_part(self) -> None:
        """This rank's own gradients are done: what follows waits for the other ranks."""
        self.compute_timer.stop()
        self._on_act("reduction")

    def _clip(self, norm: Tensor) -> None:
        """Scale gradients above the limit down to it, or have the optimizer do so as it reads them."""
        self._divisor = None
        if math.isinf(self._grad_clip) or (norm.device.type == "cpu" and bool(norm <= self._grad_clip)):
            return
        if self._on_device:
            self._divisor = ((norm + CLIP_EPSILON) / self._grad_clip).clamp(min=1.0)  # ()
        else:
            clip_grads_with_norm_(self._parameters, self._grad_clip, norm)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Around the optimizer's step: pass one that reads it on the device whether it may update, and to clip."""
        if not self._on_device:
            yield
            return
        hook = self._optimizer.register_step_pre_hook(self._tell_optimizer)
        try:
            yield
        finally:
            hook.remove()
            for name in ("found_inf", "grad_scale"):  # the scaler removes them where there is one
                vars(self._optimizer).pop(name, None)

    def _tell_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before its step: no update where this one was refused, nor where fp16's scaler has found an overflow.

        The gradients are unscaled by now, so that the scaler has set no `grad_scale`, by which they are divided.
        """
        if self._divisor is not None:
            optimizer.grad_scale = self._divisor  # type: ignore[attr-defined]
        overflow = getattr(optimizer, "found_inf", None)
        found = self._refused if overflow is None else torch.maximum(overflow, self._refused)
        optimizer.found_inf = found  # type: ignore[attr-defined]

    def _update_scale(self, verdict: Verdict) -> None:
        """Let fp16's loss scale follow the step; one that was skipped is no sign of anything."""
        before = self.scaler.state_dict() if verdict.skips else {}
        self.scaler.update()
        if before:
            self.scaler.load_state_dict(before)

    def _read(self, report: Tensor, batch: StepBatch, step: int, loss_sum: Tensor) -> StepResult:
        """The step's report on the host. Raises NonFiniteLoss."""
        norm, refused, loss, *rest = report.tolist()
        names = self.objective.terms
        terms, sums = rest[: len(names)], rest[len(names) :]
        by_source = zip(self.objective.sources, sums, batch.source_target_counts)  # noqa: B905 (none may be reported)
        means = {name: total / count for name, total, count in by_source if count}
        others = dict(zip(names, terms, strict=True)), means
        if not refused:
            return StepResult(loss, norm, Verdict.LEARNED, *others)
        if all(map(math.isfinite, (loss, norm, *terms))):
            return StepResult(loss, norm, Verdict.BEYOND_LIMITS, *others)
        if self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > SMALLEST_LOSS_SCALE:
            return StepResult(loss, norm, Verdict.OVERFLOW, *others)
        if self._skip_nonfinite:
            return StepResult(loss, norm, Verdict.NON_FINITE, *others)
        raise NonFiniteLoss(self._describe(batch, step, loss, norm, loss_sum[0].item()))

    def _seed_dropout(self, step: int, accumulation_index: int) -> None:
        """Dropout depends only on seed, step and the micro-batch's index within it: no random state is saved."""
        number = self._plan.micro_batch_number(self._ranks.rank, accumulation_index)
        torch.manual_seed(seed_of(f"dropout {self._seed} {step} {number}"))

    def _describe(self, batch: StepBatch, step: int, loss: float, norm: float, loss_sum: float) -> str:
        """One line, the same on all ranks. (All ranks get here together: loss and norm are the same everywhere.)"""
        shares = self._ranks.gather((loss_sum, sorted(batch.windows.ravel().tolist())))
        culprits = [(rank, windows) for rank, (share, windows) in enumerate(shares) if not math.isfinite(share)]
        where = "; ".join(f"rank {rank}, sequences {windows}" for rank, windows in culprits) or "every loss was finite"
        return f"step {step}: loss {loss}, gradient norm {norm}, before the update ({where})"


def of_all(results: Sequence[StepResult]) -> StepResult:
    """A step's result from those of its updates, as `StepResult` says."""
    if len(results) == 1:
        return results[0]
    names = results[0].terms
    return replace(
        results[-1],
        loss=math.fsum(result.loss for result in results) / len(results),
        grad_norm=max(result.grad_norm for result in results),
        terms={name: math.fsum(result.terms[name] for result in results) / len(results) for name in names},
        targets=math.fsum(result.targets for result in results),
        updates=len(results),
    )
