"""Parameter groups: every parameter in exactly one, decay on matrices alone."""

import dataclasses

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from train.optimization.optimizer import build_optimizer, decay_groups
from train.settings.sections import OptimConfig

TINY = ModelConfig(vocab_size=257, block_size=8, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", [{}, {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}])
def test_every_parameter_is_in_exactly_one_group(tie: bool, kind: dict[str, str]) -> None:
    model = GPT(dataclasses.replace(TINY, tie_weights=tie, **kind))  # type: ignore[arg-type]
    decayed, plain = decay_groups(model)
    assert not set(decayed) & set(plain)
    assert set(decayed) | set(plain) == {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in decayed) is not tie
    assert all(name.endswith(".weight") and "ln_" not in name for name in decayed)
    assert all("ln_" in name or name.endswith(".bias") for name in plain)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_the_fused_update_is_adamw() -> None:
    """Three steps against the formula of Loshchilov & Hutter, in float64."""
    model = GPT(TINY)
    initialise(model, seed=0)
    config = OptimConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    generator = torch.Generator().manual_seed(0)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            decay = 0.1 if parameter.dim() >= 2 else 0.0
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            expected[name] = expected[name] * (1 - 1e-2 * decay) - 1e-2 * update
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"beta1": 1.0}, {"eps": 0.0}, {"weight_decay": -1.0}, {"grad_clip": -1.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig(**wrong)  # type: ignore[arg-type]
