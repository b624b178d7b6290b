"""The optimizer that a configuration asks for: AdamW (Loshchilov & Hutter 2017), or Muon with AdamW for the rest.

Either may be sharded: each rank then builds it for the parameters that it owns.
"""

from collections.abc import Collection

import torch
from torch import nn

from common.errors import UserError
from model.ranks import Ranks
from model.roles import Role, parameter_roles
from train.optimization.adamw import AdamW
from train.optimization.declared_state import ADAMW, OptimizerState, muon_state
from train.optimization.muon import Muon
from train.optimization.optimizer_state import shapes_of
from train.optimization.owners import owners_of
from train.optimization.sharded import Sharded
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


def build_optimizer(model: nn.Module, config: OptimConfig, ranks: Ranks | None = None) -> torch.optim.Optimizer:
    """An optimizer of every trainable parameter, each in exactly one of its groups.

    Args:
        ranks: over which it is sharded, if the configuration asks for that; all of them call.

    Raises UserError where a parameter's role is not known.
    """
    parameters = trained_parameters(model)
    if ranks is None or not config.is_sharded(ranks.world_size):
        return _build_part(model, config, parameters)
    owner = owners_of(shapes_of(parameters.items()), declared_state(model, config), ranks.world_size)
    own = _build_part(model, config, {name for name, rank in owner.items() if rank == ranks.rank})
    return Sharded(own, parameters, owner, ranks)


def _build_part(model: nn.Module, config: OptimConfig, mine: Collection[str]) -> torch.optim.Optimizer:
    """Args: mine: names of the parameters that it updates."""
    if config.kind == "adamw":
        return _build_adamw(model, config, mine)
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
    with_rows = [(parameters[name], role.rows) for name, role in matrices.items() if name in mine]
    rest = _build_adamw(model, config, [name for name in mine if name not in matrices])
    return Muon(with_rows, rest, muon_state(matrices), options)


def _build_adamw(model: nn.Module, config: OptimConfig, mine: Collection[str]) -> AdamW:
    """AdamW over two groups, one of which may be empty, or both where another part updates all of the rank's tensors.

    Args: mine: names of the parameters that it updates.
    """
    decayed, plain = decay_groups(model)
    groups = [
        {"params": [p for name, p in group.items() if name in mine], "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
    ]
    return AdamW(
        [group for group in groups if group["params"]] or groups,
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


def set_weight_decay(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Args: factor: of what the groups were built with."""
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = group.setdefault("full_weight_decay", group["weight_decay"]) * factor


def set_momentum(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> None:
    """Muon's momentum in optimizer step `step`, counted from 1; other optimizers have none."""
    momentum, warm_up = config.muon_momentum, config.muon_momentum_warmup
    if step <= warm_up:
        momentum += (config.muon_momentum_start - momentum) * (1 - (step - 1) / warm_up)
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum
