"""Initial weights: the same for a seed on every rank, device and world size, whatever else the model contains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.seeds import seed_of
from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig
from model.gpt import GPT

STANDARD_DEVIATION = 0.02  # GPT-2 (Radford et al. 2019)


class _WithoutWeights(TorchFunctionMode):
    """Modules that are built inside leave their parameters as they are: `torch.nn.init` does nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def empty_gpt(config: ModelConfig, device: torch.device | str = "meta") -> GPT:
    """A GPT whose weights are still to be set; on the meta device it takes no memory.

    (torch draws its own values on the meta device, too, and fills another one from there, by code that imports its
    compiler and sympy: 1.4 s of processor time.)
    """
    with torch.device(device), _WithoutWeights():
        return GPT(config)


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Fill a GPT's parameters in place, GPT-2's way.

    Matrices and embeddings are normal with deviation 0.02, the two projections that end in the residual stream
    0.02/sqrt(2L), so that its variance does not grow with depth; biases 0, norms 1, padding rows of the vocabulary 0. A
    scalar head is 0, so that its first values are.
    Value embeddings have 0.02·sqrt(C), as large as the values that are projected from a normalised stream; the values
    that a layer mixes have equal weights whose sum is 1 (Zhou et al. 2024: 0.5 and 0.5).

    Each parameter has a generator of its own, seeded from (seed, name), on the CPU: neither the device nor the order
    of creation nor one parameter more changes the others' values.
    """
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=torch.float32)
        _fill(values, name, parameter_generator(seed, name), model.config)
        parameter.copy_(values)


def _fill(values: Tensor, name: str, generator: torch.Generator, config: ModelConfig) -> None:
    if name.endswith(".bias") or ".lora_b" in name or name == "scalar_head.weight":
        values.zero_()
    elif (deviation := ATTENTION_KINDS[config.attention].deviations.get(name.rpartition(".")[2])) is not None:
        values.normal_(0.0, deviation, generator=generator)
    elif name.endswith(".value_mix"):
        values.fill_(1.0 / len(values))
    elif name.startswith("wve."):
        values.normal_(0.0, STANDARD_DEVIATION * config.n_embd**0.5, generator=generator)
    elif values.dim() == 1:
        values.fill_(1.0)
    elif name.endswith(".c_proj.weight"):
        values.normal_(0.0, STANDARD_DEVIATION / (2 * config.n_layer) ** 0.5, generator=generator)
    else:
        values.normal_(0.0, STANDARD_DEVIATION, generator=generator)
    if name in ("wte.weight", "lm_head.weight"):
        values[config.vocab_size :] = 0.0


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the parameter's name."""
    return torch.Generator().manual_seed(seed_of(f"{seed}:{name}", bits=63))
