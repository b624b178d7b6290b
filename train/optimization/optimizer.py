"""The optimizer that a configuration asks for: AdamW (Loshchilov & Hutter 2017), or Muon with AdamW for the rest."""

from collections.abc import Mapping

import torch
from torch import nn

from common.errors import UserError
from model.roles import Role, parameter_roles
from train.optimization.muon import Muon
from train.optimization.optimizer_state import ADAMW, OptimizerState, muon_state
from train.settings.sections import OptimConfig

MUONS_KINDS = ("matrix",)  # of roles; the others are AdamW's
ADAMWS_KINDS = ("embedding", "head", "norm", "bias", "mixing", "adapter")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Without weights frozen beside adapters; a tied tensor is listed once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decayed, not decayed) trainable parameters by name; a tied tensor is listed once, under its first name.

    Matrices and embeddings (two or more dimensions) decay; biases and the scales of norms don't.
    """
    parameters = trained_parameters(model)
    decayed = {name: parameter for name, parameter in parameters.items() if parameter.dim() >= 2}
    plain = {name: parameter for name, parameter in parameters.items() if parameter.dim() < 2}
    owned = [id(parameter) for group in (decayed, plain) for parameter in group.values()]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(owned) == len(set(owned)) and set(owned) == trainable, "a parameter is in no group, or in two"
    return decayed, plain


def muons_matrices(model: nn.Module) -> dict[str, Role]:
    """The parameters by name that Muon updates.

    Raises UserError where one has a role that no part of the optimizer knows, or none, or two.
    """
    roles = parameter_roles(model)
    for name, role in roles.items():
        if role.kind not in (*MUONS_KINDS, *ADAMWS_KINDS):
            raise UserError(
                f"{name} has the role {role.kind!r}, which no part of the optimizer knows: add it to "
                "train/optimization/optimizer.py, or use --optim.kind adamw"
            )
    return {name: role for name, role in roles.items() if role.kind in MUONS_KINDS}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of every trainable parameter, each in exactly one of its groups.

    Raises UserError where a parameter's role is not known.
    """
    if config.kind == "adamw":
        return _build_adamw(model, config, {})
    matrices, parameters = muons_matrices(model), trained_parameters(model)
    lr, decay = config.muon_lr, config.muon_weight_decay
    options = {
        "lr": config.lr if lr is None else lr,
        "lr_ratio": 1.0 if lr is None else lr / config.lr,
        "weight_decay": config.weight_decay if decay is None else decay,
        "momentum": config.muon_momentum,
        "nesterov": config.muon_nesterov,
        "iterations": config.muon_iterations,
        "scale": config.muon_scale,
    }
    with_rows = [(parameters[name], role.rows) for name, role in matrices.items()]
    return Muon(with_rows, _build_adamw(model, config, matrices), muon_state(matrices), options)


def _build_adamw(model: nn.Module, config: OptimConfig, without: Mapping[str, Role]) -> torch.optim.AdamW:
    """AdamW over two groups. Args: without: by name, what another part updates."""
    decayed, plain = decay_groups(model)
    groups = [
        {"params": [p for name, p in group.items() if name not in without], "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.fused and next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def declared_state(model: nn.Module, config: OptimConfig) -> OptimizerState:
    """What the optimizer that `build_optimizer` builds keeps of each parameter. Raises UserError as that does."""
    return ADAMW if config.kind == "adamw" else muon_state(muons_matrices(model))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Args: lr: of AdamW's groups; Muon's have a stated ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
