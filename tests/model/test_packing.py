"""A packed model computes what it computed before."""

import pytest
import torch
from torch import nn

from model.cache import KVCache
from model.cpu_inference import PackedLinear, can_pack, pack
from tests.model.small import option_id, pairwise_options, random_tokens, small_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
@torch.no_grad()
def test_logits_of_prompts_and_single_tokens_stay(options, dtype):
    model, plain = (small_model(noise=0.2, dtype=dtype, **options).eval() for _ in range(2))
    assert pack(model), "this torch has no packed layers any more: look for its new ones"
    assert not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if name != "lm_head")
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 0.25)
    prompts, token = random_tokens(3, 7), random_tokens(3, 1, seed=1)
    outcomes = []
    for each in (model, plain):
        cache = KVCache(each.config, 3, 12)
        outcomes.append((each(prompts), each.next_logits(prompts, cache), each.next_logits(token, cache)))
    for packed, expected in zip(*outcomes, strict=True):
        assert packed.dtype == dtype
        torch.testing.assert_close(packed, expected, rtol=rtol, atol=atol)


def test_where_there_is_no_packing_the_model_stays_as_it_is(monkeypatch):
    model = small_model()
    assert not pack(small_model(dtype=torch.float64))

    def gone(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(PackedLinear, "__init__", gone)
    assert not can_pack(model)
    assert not pack(model)
    assert isinstance(model.h[0].attn.c_attn, nn.Linear)
    assert model.packed_head is None
