"""The memory estimate against what a real forward keeps, byte by byte of distinct storage."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.gpt import GPT
from model.loss import head_entropies, head_loss
from model.memory import FRAMEWORK_CPU, memory_estimate
from model.precision import stream_dtype
from tests.helpers.training import PROJECT

BATCH, LENGTH, WIDTH = 3, 192, 128
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
OPTIONS = [
    {},
    {"dropout": 0.1},
    {"norm": "rmsnorm", "bias": False, "norm_weights": False},
    {"position": "rope"},
    {"mlp": "swiglu"},
    {"mlp": "relu2"},
    {"qk_norm": True},
    {"n_kv_head": 1, "embedding": "normed"},
    {"attention": "differential"},
    {"window": 64},
    {"value_residual": True, "n_kv_head": 2},
    {"value_embeddings": 2, "value_residual": True},
    LLAMA,
    {**LLAMA, "qk_norm": True, "n_kv_head": 2},
]


def config_of(options):
    return ModelConfig(vocab_size=1000, block_size=LENGTH, n_layer=4, n_head=4, n_embd=WIDTH, **options)


def kept_bytes(config, dtype, every, norms, stream):
    """Bytes kept by the blocks and the last norm, parameters and their casts apart (no activation has their shape)."""
    model = GPT(config)
    model.recompute_every, model.recompute_norms, model.stream_dtype = every, norms, stream_dtype(stream)
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
    ("dtype", "every", "norms", "stream"),
    [
        ("fp32", 0, False, "fp32"),
        ("bf16", 0, False, "fp32"),
        ("fp32", 0, True, "fp32"),
        ("fp32", 2, False, "fp32"),
        ("bf16", 1, False, "fp32"),
        ("bf16", 0, False, "bf16"),
        ("bf16", 2, True, "bf16"),
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_activations_are_what_a_forward_keeps(options, dtype, every, norms, stream):
    config = config_of(options)
    estimate = memory_estimate(
        config,
        micro_batch=BATCH,
        dtype=dtype,
        recompute_every=every,
        recompute_norms=norms,
        stream=stream,
        device_type="cpu",
        optimizer_bytes=0,
    ).activations
    if every == 1:  # the last block, whole during the backward, is not there after the forward; the last norm is
        whole = memory_estimate(
            config,
            micro_batch=BATCH,
            dtype=dtype,
            recompute_every=0,
            recompute_norms=norms,
            stream=stream,
            device_type="cpu",
            optimizer_bytes=0,
        ).activations
        tail = BATCH * LENGTH * WIDTH * 4
        estimate += tail + BATCH * LENGTH * WIDTH * (2 if stream == "bf16" else 4) - (whole - tail) // 4
    assert kept_bytes(config, dtype, every, norms, stream) == pytest.approx(estimate, rel=0.06)


def test_weights_gradients_and_moments_of_gpt2():
    padded = 124_439_808 + 47 * 768
    estimate = memory_estimate(
        ModelConfig(), micro_batch=1, dtype="fp32", recompute_every=0, optimizer_bytes=8 * padded
    )
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * padded, 4 * padded, 8 * padded)
    kept = 16 * padded
    assert estimate.phases["forward and loss"] == kept + estimate.activations + estimate.head
    assert estimate.total == estimate.phases[estimate.largest_phase] == max(estimate.phases.values())
    one = memory_estimate(
        ModelConfig(), micro_batch=1, dtype="fp32", recompute_every=0, optimizer_bytes=8 * padded, gradients_stay=False
    )
    assert one.total < estimate.total  # gradients come as activations go


def test_layer_statistics_take_a_copy_where_the_activations_were():
    def estimate(block_size, ranks):
        config = ModelConfig(block_size=block_size)
        return memory_estimate(
            config, micro_batch=1, dtype="fp32", recompute_every=1, optimizer_bytes=0, statistics_ranks=ranks
        )

    assert estimate(1024, 2).total == estimate(1024, 0).total  # logits alone are more than half of the weights
    short, none = estimate(1, 1), estimate(1, 0)
    assert (short.largest_phase, none.largest_phase) == ("layer statistics", "forward and loss")
    assert short.total - none.total == short.gradients - none.activations - none.head > 0
    assert estimate(1, 8).total == none.total


def test_the_loss_holds_a_chunk_of_logits_and_a_compiled_one_none_wide():
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
    assert sizes[True, 64] - sizes[True, 32] == sizes[False, 64] - sizes[False, 32] == 2 * tokens * 768 * 4
    assert sizes[True, 32] - sizes[False, 32] == 16_384 * 50304 * 2 - 4096 * 50304 * (2 + 4)


def head_peak_bytes(dtype, tokens, config, reduction="sum"):
    """The most that forward and backward of the real head have allocated at once."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, config.n_embd, generator=generator, requires_grad=True)
    weight = torch.randn(config.padded_vocab_size, config.n_embd, generator=generator, requires_grad=True)
    targets = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            scale, cap = torch.tensor(1024.0), config.logit_softcap
            if reduction == "entropies":
                loss = head_entropies(hidden, weight, targets, config.vocab_size, softcap=cap)[0].sum()
            else:
                loss = head_loss(hidden, weight, targets, config.vocab_size, reduction, scale=scale, softcap=cap).sum()
        loss.backward(torch.tensor(1024.0))
    allocated = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(allocated))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("dtype", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_the_head_takes_what_is_estimated(dtype, name, softcap):
    """fp16 ran out of memory: its loss held every logit, which the estimate did not count."""
    config = ModelConfig(vocab_size=6300, block_size=512, n_layer=1, n_head=2, n_embd=64, logit_softcap=softcap)
    estimate = memory_estimate(
        config, micro_batch=1, dtype=dtype, recompute_every=0, device_type="cpu", optimizer_bytes=0
    ).head
    # the weight's gradient that stays is counted with the other parameters'
    weight = config.padded_vocab_size * config.n_embd * 4
    assert estimate + weight == pytest.approx(head_peak_bytes(name, 512, config), rel=0.2)
    for other in ("none", "entropies"):
        assert head_peak_bytes(name, 512, config, other) < 1.1 * head_peak_bytes(name, 512, config)


ONE_STEP = """
import torch, train.assemble
from model.config import ModelConfig
from model.gpt import GPT
from train.optimization.optimizer import build_optimizer
from train.settings.sections import OptimConfig
model = GPT(ModelConfig(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=16))
optimizer = build_optimizer(model, OptimConfig())
tokens = torch.zeros(2, 16, dtype=torch.int64)
model(tokens, tokens).backward()
optimizer.step()
status = open("/proc/self/status", encoding="utf-8").read().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of a process's peak")
def test_a_process_takes_what_is_estimated_for_the_framework():
    command, environment = [sys.executable, "-c", ONE_STEP], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, check=True, encoding="utf-8")
    assert FRAMEWORK_CPU / 2 < int(done.stdout) * 1024 < FRAMEWORK_CPU * 2  # builds for CUDA have larger libraries
