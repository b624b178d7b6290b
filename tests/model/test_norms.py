"""RMSNorm with its backward written by hand: against the formula, in every dtype and by finite differences."""

import pytest
import torch
from torch.nn import functional as F

from model.norms import RMSNorm


def norm_of(size, dtype=torch.float64, weight=True):
    norm = RMSNorm(size, 1e-5, weight=weight).to(dtype)
    if not weight:
        return norm
    with torch.no_grad():
        norm.weight.add_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return norm


def input_of(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def test_gradients_are_those_of_finite_differences():
    norm, x = norm_of(5), input_of(2, 3, 5)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))
    assert torch.autograd.gradcheck(norm_of(5, weight=False), (x,))


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("weight", [True, False])
def test_it_equals_torchs(shape, weight):
    norm, x, g = norm_of(16, weight=weight), input_of(*shape), input_of(*shape).detach().exp()
    expected = F.rms_norm(x, (16,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), expected)
    inputs = (x, *norm.parameters())
    for got, want in zip(
        torch.autograd.grad(norm(x), inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_half_precision_is_normalised_in_float32():
    x = input_of(4, 512, dtype=torch.bfloat16)
    norm = norm_of(512, torch.float32)
    assert norm(x).dtype == torch.bfloat16
    exact = F.rms_norm(x.double(), (512,), norm.weight.double())
    torch.testing.assert_close(norm(x).double(), exact, rtol=0.02, atol=0.01)
    (got,) = torch.autograd.grad(norm(x).float().square().sum(), x)
    (want,) = torch.autograd.grad(exact.square().sum(), x)
    assert got.dtype == torch.bfloat16
    assert (got - want).double().norm() < 0.03 * x.double().norm() + 0.02 * want.double().norm()


@pytest.mark.parametrize("weight", [True, False])
def test_only_the_input_is_kept(weight):
    norm, x = norm_of(512, weight=weight), input_of(64, 512)
    kept = []

    def keep(y):
        kept.append(y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        norm(x)
    assert [y.data_ptr() for y in kept if y.numel() == x.numel()] == [x.data_ptr()]


@pytest.mark.parametrize("weight", [True, False])
def test_compiled_is_the_same(weight):
    norm, x = norm_of(16, torch.float32, weight), input_of(7, 16, dtype=torch.float32)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))
