"""The optimizer's settings, apart from it: a configuration is read without waiting for torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimConfig:
    """AdamW's settings.

    Args:
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, applied to parameters of two or more dimensions.
        grad_clip: largest global gradient norm (L2); larger gradients are scaled down to it. 0 switches clipping off.
        fused: one kernel for the whole update, several times faster than a kernel per tensor, on CPU as well.
    """

    lr: float = 6e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    fused: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr is {self.lr}: give a positive learning rate")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"optim.beta1 and optim.beta2 are {self.beta1} and {self.beta2}: give numbers from 0 to below 1"
            )
        if self.eps <= 0 or self.weight_decay < 0 or self.grad_clip < 0:
            raise ValueError("optim.eps must be positive, optim.weight_decay and optim.grad_clip not negative")
