"""AdamW (Loshchilov & Hutter 2017), with weight decay on matrices alone."""

from dataclasses import dataclass

import torch
from torch import nn


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


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decayed, not decayed) trainable parameters by name; a tied tensor stands once, under its first name.

    Matrices and embeddings (two or more dimensions) decay; biases and the scales of norms don't.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name: parameter for name, parameter in parameters.items() if parameter.dim() >= 2}
    plain = {name: parameter for name, parameter in parameters.items() if parameter.dim() < 2}
    owned = [id(parameter) for group in (decayed, plain) for parameter in group.values()]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(owned) == len(set(owned)) and set(owned) == trainable, "a parameter is in no group, or in two"
    return decayed, plain


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, each in exactly one of two groups."""
    decayed, plain = decay_groups(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.fused and next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
