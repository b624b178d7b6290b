"""The chunked loss against F.cross_entropy, values and gradients, in every dtype and mode it meets."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model import kernel_sizes
from model.chunk_kernel import compiled_kernel, losses_and_gradient
from model.loss import IGNORE_INDEX, head_entropies, head_loss, head_losses

ROWS, WIDTH, VOCAB, PADDED = 150, 16, 61, 64


def problem(dtype=torch.float64, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, ROWS // 2, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCAB, (2, ROWS // 2), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, targets


def reference(hidden, weight, targets, reduction="sum", softcap=None):
    logits = F.linear(hidden, weight)[..., :VOCAB].flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets.flatten(), reduction=reduction, ignore_index=IGNORE_INDEX)
    return losses if reduction == "sum" else losses.view(targets.shape)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernel_sizes, "CHUNK_ROWS_CPU", 32)  # does not divide 150


@given(
    seed=st.integers(0, 2**31),
    chunk=st.integers(1, 200),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    softcap=st.sampled_from([None, 3.0]),
)
@settings(deadline=None, max_examples=40)
def test_value_and_gradients_equal_cross_entropy(seed, chunk, ignored, softcap):
    kernel_sizes.CHUNK_ROWS_CPU = chunk
    hidden, weight, targets = problem(seed=seed, ignored=ignored)
    expected = reference(hidden, weight, targets, softcap=softcap)
    expected_grads = torch.autograd.grad(expected * 0.37, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_sizes, "CHUNK_ROWS_CPU", chunk)
        actual = head_loss(hidden, weight, targets, VOCAB, softcap=softcap)
    actual_grads = torch.autograd.grad(actual * 0.37, (hidden, weight))
    torch.testing.assert_close(actual, expected)
    for got, want in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want)


Z_LOSS = 0.05


def with_z(hidden, weight, targets, softcap):
    """The definition: the sum of cross-entropies and of the coefficient times logsumexp², and the latter."""
    logits = F.linear(hidden, weight)[..., :VOCAB].flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = Z_LOSS * logits.logsumexp(-1)[targets.flatten() != IGNORE_INDEX].square().sum()
    return reference(hidden, weight, targets, softcap=softcap) + z, z


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("way", ["chunks", "kernel", "compiled"])
@pytest.mark.parametrize("z_loss", [None, Z_LOSS])
def test_what_the_loss_consists_of_is_returned_apart(way, softcap, z_loss):
    hidden, weight, targets = problem()
    with torch.no_grad():
        hidden[0, ::9] *= 100  # rows whose target has next to no probability
    total, z = with_z(hidden, weight, targets, softcap)
    if z_loss is None:
        total, z = total - z, z * 0
    expected = torch.autograd.grad(total * 0.37, (hidden, weight))
    scale = torch.tensor(0.37, dtype=torch.float64)
    ours = torch.compile(head_losses, backend="aot_eager") if way == "compiled" else head_losses
    kernel = losses_and_gradient if way == "kernel" else None
    found, apart, each = ours(hidden, weight, targets, VOCAB, z_loss, scale=scale, kernel=kernel, softcap=softcap)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(apart, z)
    torch.testing.assert_close(each, reference(hidden, weight, targets, "none", softcap))
    assert not apart.requires_grad and not each.requires_grad
    grads = torch.autograd.grad(found, (hidden, weight), scale)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)
    if z_loss is None and way != "compiled":  # to the bit what it is without its parts
        alone = head_loss(hidden, weight, targets, VOCAB, scale=scale, kernel=kernel, softcap=softcap)
        assert torch.equal(alone, found)
        for got, want in zip(torch.autograd.grad(alone, (hidden, weight), scale), grads, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_z_loss_in_half_precision(dtype, announced):
    hidden, weight, targets = problem(torch.float32)
    total, z = with_z(hidden, weight, targets, None)
    expected = torch.autograd.grad(total * 64.0, (hidden, weight))
    scale = torch.tensor(64.0)
    with torch.autocast("cpu", dtype=dtype):
        found = head_losses(hidden, weight, targets, VOCAB, Z_LOSS, scale=scale if announced else None)
    torch.testing.assert_close(found[:2], (total, z), rtol=0.01, atol=0.01)
    for got, want in zip(torch.autograd.grad(found[0], (hidden, weight), scale), expected, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


def test_float32_is_as_close_to_float64_as_cross_entropy_is():
    hidden, weight, targets = problem()
    exact = torch.autograd.grad(reference(hidden, weight, targets), (hidden, weight))
    narrow = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    ours = torch.autograd.grad(head_loss(narrow[0], narrow[1], targets, VOCAB), narrow)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = problem(torch.float32)
    loss = head_loss(hidden * 1000, weight, targets, VOCAB)
    torch.testing.assert_close(loss, reference(hidden * 1000, weight, targets))
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("way", ["quiet", "chunks", "kernel", "compiled"])
def test_per_token_losses_and_their_gradients(way, softcap):
    """Each token has a weight of its own, which only the backward tells."""
    hidden, weight, targets = problem()
    ours = torch.compile(head_loss, backend="aot_eager") if way == "compiled" else head_loss
    kernel = losses_and_gradient if way == "kernel" else None
    with torch.set_grad_enabled(way != "quiet"):
        losses = ours(hidden, weight, targets, VOCAB, "none", kernel=kernel, softcap=softcap)
    assert losses.shape == targets.shape
    assert losses.requires_grad == (way != "quiet")
    expected = reference(hidden, weight, targets, "none", softcap)
    torch.testing.assert_close(losses, expected)
    assert (losses[targets == IGNORE_INDEX] == 0).all()
    if way != "quiet":
        weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
        grads = torch.autograd.grad(losses, (hidden, weight), weights)
        for got, want in zip(grads, torch.autograd.grad(expected, (hidden, weight), weights), strict=True):
            torch.testing.assert_close(got, want)
        frozen = head_loss(hidden, weight.detach(), targets, VOCAB, "none", kernel=kernel, softcap=softcap)
        torch.testing.assert_close(torch.autograd.grad(frozen, hidden, weights)[0], grads[0])


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.6, 3.0)])
@pytest.mark.parametrize("way", ["quiet", "chunks", "kernel", "compiled"])
def test_losses_and_entropies_at_a_temperature(way, temperature, softcap):
    hidden, weight, targets = problem()
    ours = torch.compile(head_entropies, backend="aot_eager") if way == "compiled" else head_entropies
    kernel = losses_and_gradient if way == "kernel" else None
    with torch.set_grad_enabled(way != "quiet"):
        losses, entropies = ours(hidden, weight, targets, VOCAB, temperature, kernel=kernel, softcap=softcap)
    logits = hidden @ weight[:VOCAB].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    chances = torch.distributions.Categorical(logits=logits / temperature)
    counts = targets != IGNORE_INDEX
    expected = -chances.log_prob(targets.clamp(min=0)) * counts
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(entropies, chances.entropy() * counts)
    assert not entropies.requires_grad
    if way != "quiet":
        weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
        grads = torch.autograd.grad(losses, (hidden, weight), weights)
        for got, want in zip(grads, torch.autograd.grad(expected, (hidden, weight), weights), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_per_token_losses_in_half_precision(dtype):
    hidden, weight, targets = problem(torch.float32)
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1)) * 64
    expected = torch.autograd.grad(reference(hidden, weight, targets, "none"), (hidden, weight), weights)
    with torch.autocast("cpu", dtype=dtype):
        losses = head_loss(hidden, weight, targets, VOCAB, "none")
    assert losses.dtype == torch.float32
    for got, want in zip(torch.autograd.grad(losses, (hidden, weight), weights), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()


def test_without_gradients_the_sum_is_the_same():
    hidden, weight, targets = problem(torch.float32)
    with torch.no_grad():
        quiet = head_loss(hidden, weight, targets, VOCAB)
    assert torch.equal(quiet, head_loss(hidden, weight, targets, VOCAB).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_sums_in_float32(dtype):
    hidden, weight, targets = problem(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss = head_loss(hidden, weight, targets, VOCAB)
        grads = torch.autograd.grad(loss, (hidden, weight))
        logits = F.linear(hidden, weight)
        assert logits.dtype == dtype
    exact = F.cross_entropy(
        logits.float()[..., :VOCAB].flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    for got, want in zip(grads, torch.autograd.grad(reference(hidden, weight, targets), (hidden, weight)), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen):
    hidden, weight, targets = problem()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    head_loss(hidden, weight, targets, VOCAB).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_padding_rows_change_nothing_and_learn_nothing():
    hidden, weight, targets = problem()
    loss = head_loss(hidden, weight, targets, VOCAB)
    (grad,) = torch.autograd.grad(loss, weight)
    assert (grad[VOCAB:] == 0).all()
    with torch.no_grad():
        weight[VOCAB:] = 100.0
        assert torch.equal(head_loss(hidden, weight, targets, VOCAB), loss)


def test_an_unknown_target_is_an_error_and_no_number():
    hidden, weight, targets = problem()
    targets[0, 0] = -1
    with pytest.raises((RuntimeError, IndexError)):
        head_loss(hidden, weight, targets, VOCAB)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tensor_of_all_logits_is_kept_for_backward(reduction):
    hidden, weight, targets = problem()
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        head_loss(hidden, weight, targets, VOCAB, reduction)
    assert max(kept) <= max(hidden.numel(), weight.numel()) < ROWS * PADDED


def test_a_second_backward_is_refused():
    hidden, weight, targets = problem()
    loss = head_loss(hidden, weight, targets, VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("got", [0.37, 2.0])  # as announced, or another
def test_gradients_are_right_whichever_scale_was_announced(got):
    hidden, weight, targets = problem()
    expected = torch.autograd.grad(reference(hidden, weight, targets) * got, (hidden, weight))
    loss = head_loss(hidden, weight, targets, VOCAB, scale=torch.tensor(0.37, dtype=torch.float64))
    torch.testing.assert_close(loss, reference(hidden, weight, targets))
    actual = torch.autograd.grad(loss, (hidden, weight), torch.tensor(got, dtype=torch.float64))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_announced_scale_costs_no_pass_over_the_gradients():
    hidden, weight, targets = problem()
    scale = torch.tensor(0.37, dtype=torch.float64)
    loss = head_loss(hidden, weight, targets, VOCAB, scale=scale)
    with torch.profiler.profile() as profile:
        loss.backward(scale)
    assert {"_ChunkedLossBackward", "aten::mul_"} & {event.key for event in profile.key_averages()} == {
        "_ChunkedLossBackward"
    }


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("scale", [64.0, 65504.0])  # the larger one overflows float16 somewhere in the products
def test_float16_in_chunks_is_float16_of_all_logits(scale, softcap):
    hidden, weight, targets = problem(torch.float32)
    with torch.no_grad():
        hidden[0, 0] *= 8
    scale = torch.tensor(scale)
    found = []
    for announced in (None, scale):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = head_loss(hidden, weight, targets, VOCAB, scale=announced, softcap=softcap)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight), scale)))
    (plain_loss, *plain), (loss, *grads) = found
    torch.testing.assert_close(loss, plain_loss)
    for ours, theirs in zip(grads, plain, strict=True):
        assert ours.dtype == torch.float32
        assert torch.isfinite(ours).all() == torch.isfinite(theirs).all() == (scale < 1000)
        if scale < 1000:
            assert (ours - theirs).norm() < 2e-3 * theirs.norm()


def test_float16_in_chunks_keeps_no_logits():
    hidden, weight, targets = problem(torch.float32)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", dtype=torch.float16):
        head_loss(hidden, weight, targets, VOCAB, scale=torch.tensor(1.0))
    assert max(kept) <= max(hidden.numel(), weight.numel()) < ROWS * PADDED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_of_no_probability_has_the_loss_of_its_logit(dtype):
    hidden, weight, targets = problem(torch.float32, ignored=0.0)
    with torch.no_grad():
        hidden[:, ::2] *= 100  # every other row
        narrow = hidden.to(dtype), weight.to(dtype)
        losses = head_loss(*narrow, targets, VOCAB, "none")
        expected = reference(F.linear(*narrow).float(), torch.eye(PADDED), targets, "none")
    assert (losses > 200).sum() > 10
    torch.testing.assert_close(losses, expected)


def test_no_rows_have_no_loss_and_no_gradient():
    hidden, weight, targets = problem()
    loss = head_loss(hidden[:0], weight, targets[:0], VOCAB)
    assert loss == 0
    assert (torch.autograd.grad(loss, weight)[0] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_gives_what_the_chunks_give_without_it(dtype, softcap):
    hidden, weight, targets = problem(torch.float64 if dtype == torch.float64 else torch.float32)
    scale = torch.tensor(0.37, dtype=hidden.dtype)
    found = []
    for kernel in (None, losses_and_gradient):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            given = {"kernel": kernel, "softcap": softcap}
            loss = head_loss(hidden, weight, targets, VOCAB, scale=scale, **given)
            with torch.no_grad():
                quiet = head_loss(hidden, weight, targets, VOCAB, **given)
                losses = head_loss(hidden, weight, targets, VOCAB, "none", **given)
        found.append((loss.detach(), quiet, losses, *torch.autograd.grad(loss, (hidden, weight), scale)))
    (*plain, plain_rows, plain_weight), (*ours, ours_rows, ours_weight) = found
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want)
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-5
    for got, want in ((ours_rows, plain_rows), (ours_weight, plain_weight)):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler on CPUs"
)
def test_the_compiled_kernel_is_compiled_once_and_keeps_nothing_wide():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    kernel = compiled_kernel()
    hidden, weight, targets = problem(torch.float32)
    for count in (150, 100, 70):  # other chunks, and other last ones
        rows, ids = hidden.flatten(0, 1)[:count], targets.flatten()[:count]
        loss, plain = (head_loss(rows, weight, ids, VOCAB, kernel=each) for each in (kernel, None))
        torch.testing.assert_close(loss, plain)
        for got, want in zip(*(torch.autograd.grad(each, (hidden, weight)) for each in (loss, plain)), strict=True):
            torch.testing.assert_close(got, want)
    assert counters["unique_graphs"] - before == 1
    logits = torch.randn(64, 4096).bfloat16()
    arguments = torch.zeros(64, dtype=torch.int64), torch.ones(64, 1), 4000
    kernel(logits, *arguments, None, None)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        kernel(logits, *arguments, None, None)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 64 * 4096


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_compiled_gives_the_same_loss(softcap):
    hidden, weight, targets = problem(torch.float32)
    compiled = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    loss = compiled(hidden, weight, targets, VOCAB, softcap=softcap)
    grads = torch.autograd.grad(loss, (hidden, weight))
    expected = head_loss(hidden, weight, targets, VOCAB, softcap=softcap)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(got, want)
