"""The memory estimate against what a real forward keeps, byte by byte of distinct storage."""

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT
from model.memory import memory_estimate

BATCH, LENGTH, WIDTH = 3, 192, 128
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
OPTIONS = [
    {},
    {"dropout": 0.1},
    {"norm": "rmsnorm", "bias": False},
    {"position": "rope"},
    {"mlp": "swiglu"},
    {"mlp": "relu2"},
    {"qk_norm": True},
    {"n_kv_head": 1},
    {"attention": "differential"},
    {"window": 64},
    LLAMA,
    {**LLAMA, "qk_norm": True, "n_kv_head": 2},
]


def config_of(options):
    return ModelConfig(vocab_size=1000, block_size=LENGTH, n_layer=4, n_head=4, n_embd=WIDTH, **options)


def kept_bytes(config, dtype, every, norms):
    """Bytes kept by the blocks and the last norm, parameters and their casts apart (no activation has their shape)."""
    model = GPT(config)
    model.recompute_every, model.recompute_norms = every, norms
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.T.shape) for p in model.parameters() if p.dim() == 2
    }
    kept = {}

    def keep(x):
        if tuple(x.shape) not in shapes:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        model.hidden(tokens)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(
    ("dtype", "every", "norms"),
    [("fp32", 0, False), ("bf16", 0, False), ("fp32", 0, True), ("fp32", 2, False), ("bf16", 1, False)],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_activations_are_what_a_forward_keeps(options, dtype, every, norms):
    config = config_of(options)
    estimate = memory_estimate(
        config,
        micro_batch=BATCH,
        dtype=dtype,
        recompute_every=every,
        recompute_norms=norms,
        device_type="cpu",
        optimizer_bytes=0,
    ).activations
    if every:  # the one block that is whole during the backward is not there after the forward
        whole = memory_estimate(
            config, micro_batch=BATCH, dtype=dtype, recompute_every=0, device_type="cpu", optimizer_bytes=0
        ).activations
        tail = BATCH * LENGTH * WIDTH * 4
        estimate -= (whole - tail) // 4
    assert kept_bytes(config, dtype, every, norms) == pytest.approx(estimate, rel=0.06)


def test_weights_gradients_and_moments_of_gpt2():
    padded = 124_439_808 + 47 * 768
    estimate = memory_estimate(
        ModelConfig(), micro_batch=1, dtype="fp32", recompute_every=0, optimizer_bytes=8 * padded
    )
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * padded, 4 * padded, 8 * padded)
    assert estimate.total == sum(vars(estimate).values())


def test_a_compiled_loss_holds_all_logits_and_an_eager_one_a_chunk():
    sizes = {
        (compiled, micro_batch): memory_estimate(
            ModelConfig(),
            micro_batch=micro_batch,
            dtype="bf16",
            recompute_every=0,
            compiled=compiled,
            optimizer_bytes=0,
        ).head
        for compiled in (False, True)
        for micro_batch in (32, 64)
    }
    tokens = 32 * 1024
    assert sizes[True, 64] - sizes[True, 32] == 2 * tokens * 50304 * 2 + 2 * tokens * 768 * 4
    assert sizes[False, 64] - sizes[False, 32] == 2 * tokens * 768 * 4
