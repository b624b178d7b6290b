"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with AdamW's part, as one optimizer.

The momentum of a block's matrix is replaced by the nearest orthogonal matrix, about, by a few Newton-Schulz iterations.
torch.optim.Muon can't do that here: it takes whole matrices, and queries, keys and values are stacked in one.
n rows, m columns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.optimization.declared_state import OptimizerState

# Jordan's: a steep slope at zero, after which singular values lie between about 0.7 and 1.2 rather than at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-15  # below it float32's sum of squares underflows; a zero gradient stays zero


def orthogonalised(matrix: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ for a matrix U S Vᵀ (n, m), computed in `dtype`."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller product of the two
    norm = torch.linalg.vector_norm(wide.float()).clamp(min=SMALLEST_NORM)
    x = (wide / norm).to(dtype)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x


def update_scale(shape: Sequence[int], convention: str) -> float:
    """What an orthogonal matrix of this shape is multiplied by, beside the learning rate.

    Args:
        convention: rms: updates as large as AdamW's usually are (root mean square 0.2; Liu et al. 2025,
            arXiv:2502.16982). shape: as large in the spectral norm, corrected for tall matrices (Jordan et al.).
    """
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if convention == "rms" else math.sqrt(max(1.0, rows / columns))


@contextmanager
def passing_on(outer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> Iterator[None]:
    """Around the step of an inner optimizer: it clips and refuses as the outer one was asked to."""
    asked: dict[str, Any] = {name: vars(outer)[name] for name in ("found_inf", "grad_scale") if name in vars(outer)}
    vars(inner).update(asked)
    try:
        yield
    finally:
        for name in asked:
            vars(inner).pop(name, None)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for all else: one state, one decision to skip, one zeroing of gradients.

    Like torch's fused optimizers it reads on the device whether to update (`found_inf`) and what to divide the
    gradients by (`grad_scale`), unless AdamW's part can't.

    Attributes:
        declared: what is kept of each parameter.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, tuple[int, ...]]],
        rest: torch.optim.AdamW,
        declared: OptimizerState,
        options: Mapping[str, Any],
    ) -> None:
        """Made for parameters that are each in one of the two parts.

        Args:
            matrices: with the heights of what is stacked in each; () for a single matrix.
            rest: AdamW, whose groups and state become this optimizer's as well.
            options: lr, lr_ratio, weight_decay, momentum, nesterov, iterations and scale of the matrices.
        """
        group = {"params": [p for p, _ in matrices], "rows": [rows for _, rows in matrices], **options}
        super().__init__([group], {})
        self._matrices, self._rest, self.declared = self.param_groups[0], rest, declared
        self.param_groups += rest.param_groups
        rest.state = self.state
        if getattr(rest, "_step_supports_amp_scaling", False):
            self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` is 1."""
        with passing_on(self, self._rest):
            self._rest.step()
        found, divisor = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for parameter, rows in zip(self._matrices["params"], self._matrices["rows"], strict=True):
            if parameter.grad is not None:
                grad = parameter.grad if divisor is None else parameter.grad / divisor
                self._update(parameter, grad, rows, found)

    def _update(self, parameter: nn.Parameter, grad: Tensor, rows: tuple[int, ...], found: Tensor | None) -> None:
        """One matrix (n, m) and its momentum. The host does not wait for a verdict that a GPU holds."""
        group, state = self._matrices, self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        if found is not None and found.device.type == "cpu":
            if bool(found):
                return
            found = None
        momentum = state["momentum_buffer"].lerp(grad, 1 - group["momentum"])
        ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        updated = parameter * (1 - group["lr"] * group["weight_decay"])
        dtype = torch.bfloat16 if parameter.is_cuda else torch.float32
        heights = list(rows or parameter.shape[:1])
        for target, block in zip(updated.split(heights), ahead.split(heights), strict=True):
            scale = update_scale(block.shape, group["scale"])
            target.add_(orthogonalised(block, group["iterations"], dtype), alpha=-group["lr"] * scale)
        for kept, new in ((state["momentum_buffer"], momentum), (parameter, updated)):
            kept.copy_(new if found is None else torch.where(found > 0, kept, new))
