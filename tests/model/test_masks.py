"""All ways to attend under a window and documents are one function: blocks, dense masks, FlexAttention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import attention_masks, flex
from model.attention_masks import attend, see_before
from model.cache import KVCache
from model.kernel_sizes import LARGEST_WIDENED
from tests.model.small import random_tokens, small_model


def heads(count, length, seed):
    return torch.randn(2, count, length, 16, generator=torch.Generator().manual_seed(seed))


def dense(length, window, document_ids):
    index = torch.arange(length)
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    return seen if document_ids is None else seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])


@given(
    length=st.integers(1, 70),
    window=st.one_of(st.none(), st.integers(1, 80)),
    kv_heads=st.sampled_from([1, 2, 4]),
    cuts=st.one_of(st.none(), st.lists(st.integers(0, 70), max_size=5)),
    smallest_block=st.sampled_from([1, 8, 64]),
    shortest_apart=st.sampled_from([1, 8, 1000]),
)
@settings(deadline=None, max_examples=100)
def test_blocks_and_documents_apart_equal_a_dense_mask_values_and_gradients(
    length, window, kv_heads, cuts, smallest_block, shortest_apart
):
    q, k, v = (heads(n, length, seed).requires_grad_() for seed, n in enumerate((4, kv_heads, kv_heads)))
    ids = None if cuts is None else sum((torch.arange(length) >= cut).long() for cut in [0, *cuts]).expand(2, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_masks, "SMALLEST_BLOCK", smallest_block)
        patch.setattr(attention_masks, "SHORTEST_APART", shortest_apart)
        visibility = see_before(length, window, ids)
        if window is None and ids is not None:
            assert bool(visibility.apart) == (len(ids[0].unique()) * shortest_apart <= length)
    out = attend(q, k, v, visibility)
    groups = 4 // kv_heads
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) / 4
    weights = scores.masked_fill(~dense(length, window, ids), -torch.inf).softmax(-1)
    expected = weights @ v.repeat_interleave(groups, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(out.shape, generator=generator)
    got = torch.autograd.grad((out * direction).sum(), (q, k, v))
    want = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_window_over_a_long_sequence_runs_in_blocks_and_full_attention_without_a_mask():
    assert see_before(2048, 256, None).block == 256
    assert see_before(2048, None, None) == see_before(2048, 4096, None) == attention_masks.Visibility()
    assert see_before(300, 256, None).block is None  # two blocks would be the whole
    mask = see_before(2048, 256, None).mask
    assert mask is not None
    assert mask.numel() == 2048 * 2 * 256  # not 2048²


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # the CPU's form is meant
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_sees_the_same(window, documents, kv_heads):
    ids = (torch.arange(200) // 70).expand(2, -1) if documents else None
    q, k, v = heads(4, 200, 0), heads(kv_heads, 200, 1), heads(kv_heads, 200, 2)
    with torch.no_grad():
        expected = attend(q, k, v, see_before(200, window, ids))
        flex = see_before(200, window, ids, torch.device("cpu"), flex=True)
        assert (flex.flex is not None) == (window is not None or documents)
        torch.testing.assert_close(attend(q, k, v, flex), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"n_kv_head": 2}, {"attention": "differential"}], ids=str)
def test_flex_trains_as_the_other_paths_do(options, compiled):
    shape = {"n_embd": 128, "block_size": 512, "window": 100, "window_pattern": "SL", "position": "rope"}
    model = small_model(noise=0.1, **shape, **options).cuda()
    tokens, targets = random_tokens(2, 512).cuda(), random_tokens(2, 512, seed=1).cuda()
    ids = (torch.arange(512) // 200).expand(2, -1).cuda()
    run = torch.compile(model) if compiled else model
    fast = torch.autograd.grad(run(tokens, targets, document_ids=ids), list(model.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.gpt.flex_works", lambda *_: False)
        slow = torch.autograd.grad(model(tokens, targets, document_ids=ids), list(model.parameters()))
    for a, b in zip(fast, slow, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-4


def test_flex_is_tried_only_where_something_is_masked_and_as_it_is_used(monkeypatch):
    asked = []
    monkeypatch.setattr("model.gpt.flex_works", lambda *kind: asked.append(kind))
    tokens, ids = random_tokens(1, 40), torch.zeros(1, 40, dtype=torch.int64)
    small_model(n_embd=128)(tokens)
    small_model(n_embd=128, window=64)(tokens)  # which nothing of 40 tokens fills
    assert asked == []
    small_model(n_embd=128, window=30)(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        small_model(n_embd=128)(tokens, document_ids=ids)
    cpu = torch.device("cpu")
    assert asked == [(cpu, torch.float32, 32), (cpu, torch.bfloat16, 32)]


def test_flex_is_tried_in_the_format_and_head_size_that_are_used(monkeypatch):
    tried = []

    def attend_without_a_kernel(q, k, v, mask, scale):
        tried.append((q.dtype, q.shape[-1]))
        return q + k + v

    monkeypatch.setattr(flex, "flex_attend", attend_without_a_kernel)
    for _ in range(2):  # once for each kind
        assert flex._trial(torch.device("cpu"), torch.bfloat16, 48)
    assert tried == [(torch.bfloat16, 48)]
    assert not flex.flex_works(torch.device("cuda"), torch.bfloat16, 8)  # too narrow for its kernels


def test_only_training_may_take_kernels_that_are_planned_for_each_shape(monkeypatch):
    """As on CUDA; what a CPU computes with them is the same."""
    attention, may_plan = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*arguments, **options):
        may_plan.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted)
    monkeypatch.setattr("model.gpt.kernels_for", lambda device: attention_masks.kernels_for(torch.device("cuda")))
    model, tokens = small_model(n_layer=1), random_tokens(2, 9)
    model(tokens)
    with torch.no_grad():
        model(tokens)
        cache = KVCache(model.config, 2, 20)
        model.next_logits(tokens, cache)
        model.next_logits(tokens[:, :1], cache)
    assert may_plan == [True, False, False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("short", [True, False])
def test_on_a_cpu_short_sequences_train_in_float32_under_bf16(short):
    length = 16 if short else 2 * LARGEST_WIDENED // 16

    def outcome(dtype, autocast):
        q, k, v = (heads(2, length, seed).bfloat16().to(dtype).requires_grad_() for seed in range(3))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attend(q, k, v, see_before(length, None, None))
        out.float().square().sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    lowered, wide = outcome(torch.bfloat16, True), outcome(torch.float32, False)
    assert {tensor.dtype for tensor in lowered} == {torch.bfloat16}
    assert lowered[0].equal(wide[0].bfloat16()) == short
    for tensor, exact in zip(lowered, wide, strict=True):
        torch.testing.assert_close(tensor.float(), exact, rtol=0.05, atol=0.05)
