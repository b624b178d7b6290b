"""A residual stream in bf16: what it changes of a model, and by how little."""

import pytest
import torch

from common.errors import UserError
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.number_formats import check_stream

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_every_block_adds_to_a_stream_in_bf16_and_the_loss_stays_close(options, recompute):
    config = ModelConfig(vocab_size=300, block_size=32, n_layer=3, n_head=2, n_embd=64, **options)
    tokens, targets = torch.randint(300, (2, 4, 32), generator=torch.Generator().manual_seed(1))
    found = {}
    for stream in (None, torch.bfloat16):
        model = GPT(config)
        initialise(model, seed=1)
        model.stream_dtype, model.recompute_every = stream, recompute
        dtypes = []
        for block in model.h:
            block.register_forward_hook(lambda module, inputs, output, seen=dtypes: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, targets) / targets.numel()
        loss.backward()
        assert set(dtypes) == {stream or torch.float32}
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found[stream] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    (wide, gradient), (narrow, other) = found.values()
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=2e-3)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.999


def test_it_needs_matrix_products_in_bf16():
    check_stream("bf16", "bf16")
    check_stream("fp32", "fp16")
    for dtype in ("fp32", "fp16"):
        with pytest.raises(UserError, match=f"run.stream_dtype bf16 .* run.dtype is {dtype}: leave it out"):
            check_stream("bf16", dtype)
