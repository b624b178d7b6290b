"""The embedding that shares its table with the output layer: gradients as autograd makes them, in one table."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.shared_table import embed_with_shared_table

V, C = 97, 8


def gradient(table: Tensor, tokens: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """A loss through both uses of the table, and its gradient."""
    rows, head = embed_with_shared_table(tokens, table) if shared else (F.embedding(tokens, table), table)
    loss = F.linear(rows.tanh(), head).square().sum()
    (found,) = torch.autograd.grad(loss, table)
    return loss.detach(), found


def test_the_gradient_is_the_sum_over_both_uses() -> None:
    table = torch.randn(V, C, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 9, (3, 20))  # many of them repeated
    (loss, ours), (expected, theirs) = (gradient(table, tokens, shared=shared) for shared in (True, False))
    assert loss.equal(expected)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("used", ["rows", "head"])
def test_one_use_alone_has_its_own_gradient(used: str) -> None:
    table = torch.randn(V, C, requires_grad=True)
    rows, head = embed_with_shared_table(torch.tensor([[3, 3, 5]]), table)
    (grad,) = torch.autograd.grad((rows if used == "rows" else head).sum(), table)
    expected = torch.zeros(V, C).index_add(0, torch.tensor([3, 3, 5]), torch.ones(3, C))
    assert grad.equal(expected if used == "rows" else torch.ones(V, C))


def test_a_frozen_table_gets_none() -> None:
    rows, head = embed_with_shared_table(torch.tensor([[1]]), torch.randn(V, C))
    assert not rows.requires_grad
    assert not head.requires_grad


def test_a_models_backward_makes_one_gradient_of_the_tables_size() -> None:
    model = GPT(ModelConfig(vocab_size=1000, block_size=8, n_layer=1, n_head=1, n_embd=8))
    initialise(model, seed=1)
    tokens = torch.randint(0, 1000, (2, 8))
    scale = torch.tensor(1.0)
    loss = model(tokens, tokens, scale=scale)
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward(scale)
    table = list(model.wte.weight.shape)
    passes = [event.key for event in profile.key_averages(group_by_input_shape=True) if table in event.input_shapes]
    assert "aten::index_add_" in passes
    assert not {"aten::add", "aten::add_", "aten::mul_", "aten::zero_", "aten::fill_"} & set(passes)
