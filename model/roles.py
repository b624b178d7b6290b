"""What each parameter is to an optimizer: declared by the module that has it, never guessed from a shape or a name.

A module's method `roles()` gives a role to each of its parameters, and to those of the layers that it is made of, by
name relative to it: `{"c_attn.weight": Role("matrix", rows=(512, 256, 256))}`. A parameter without a role or with two
stops a start that asks for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from common.errors import UserError


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        kind: matrix (a linear layer's inside a block), embedding, head (the output layer's own matrix), norm, bias,
            mixing (a few numbers that weigh parts of a layer) or adapter.
        rows: of a matrix, the heights of the matrices that are stacked in it; () for a single one.
    """

    kind: str
    rows: tuple[int, ...] = ()


NORM = {"weight": Role("norm"), "bias": Role("norm")}
_OF_TORCH: Mapping[type[nn.Module], Mapping[str, Role]] = {nn.LayerNorm: NORM}  # what blocks use of torch's modules


def linear_roles(name: str, layer: nn.Module, rows: Sequence[int] = ()) -> dict[str, Role]:
    """Roles of a linear layer's parameters in a block.

    Args:
        rows: heights of the matrices that are stacked in its weight (out, in).
    """
    matrix = {f"{name}.weight": Role("matrix", tuple(rows))}
    return matrix | ({f"{name}.bias": Role("bias")} if getattr(layer, "bias", None) is not None else {})


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every trained parameter by its name; a tied tensor is listed once, under its first name.

    Raises UserError naming a parameter that has none, or two, or whose blocks of rows are not all of its rows.
    """
    declared: dict[str, list[Role]] = {}
    for prefix, module in model.named_modules():
        own = module.roles() if hasattr(module, "roles") else _OF_TORCH.get(type(module), {})
        for name, role in own.items():
            declared.setdefault(f"{prefix}.{name}" if prefix else name, []).append(role)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: _only(name, parameter, declared.get(name, [])) for name, parameter in trained.items()}


def _only(name: str, parameter: Tensor, roles: Sequence[Role]) -> Role:
    if len(roles) != 1:
        raise UserError(
            f"{name} has {'no role' if not roles else 'several roles'} (model/roles.py), by which an optimizer of "
            "several parts divides a model: declare one in the method roles() of its module, or use --optim.kind adamw"
        )
    (role,) = roles
    if role.rows and sum(role.rows) != parameter.shape[0]:
        raise UserError(f"{name} has {parameter.shape[0]} rows, not the {sum(role.rows)} of its role: mend its roles()")
    return role
