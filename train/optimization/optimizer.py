"""AdamW (Loshchilov & Hutter 2017), with weight decay only on matrices."""

import torch
from torch import nn

from train.optimization.optimizer_name import optimizer_name
from train.optimization.optimizer_state import DECLARED, OptimizerState
from train.settings.sections import OptimConfig


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decayed, not decayed) trainable parameters by name; a tied tensor is listed once, under its first name.

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


def declared_state(config: OptimConfig) -> OptimizerState:
    """What the optimizer that `build_optimizer` builds keeps of each parameter."""
    return next(state for state in DECLARED.values() if state.name == optimizer_name(config))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
