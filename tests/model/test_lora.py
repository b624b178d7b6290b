"""Adapters start as nothing, only they are trained, and they merge and come out again."""

import pytest
import torch

from model.gpt import GPT
from model.initialisation import initialise
from model.lora import add_lora, drop_lora, lora_layers, lora_tensors, set_merged
from model.lora_config import LoraConfig
from tests.model.small import random_tokens, small_model

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
KINDS = pytest.mark.parametrize("options", [{}, LLAMA, {"attention": "differential"}], ids=str)


def trained(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        model(random_tokens(2, 16, seed=step), random_tokens(2, 16, seed=step + 50)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@KINDS
def test_an_adapted_model_begins_as_its_base_and_trains_its_adapters_alone(options):
    model, base, tokens = small_model(noise=0.1, **options), small_model(noise=0.1, **options), random_tokens(2, 16)
    add_lora(model, LoraConfig(rank=2), seed=3)
    assert torch.equal(model(tokens), base(tokens))
    trained(model)
    frozen = dict(base.named_parameters())
    adapters = lora_tensors(model)
    assert len(adapters) == 2 * len(list(lora_layers(model))) == 2 * 2 * (5 if options == LLAMA else 4)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in adapters)
        assert name in adapters or torch.equal(parameter, frozen[name]), name
    assert all((value != 0).any() for value in adapters.values())
    assert not torch.equal(model(tokens), base(tokens))


@KINDS
def test_merging_keeps_the_outputs_and_can_be_undone(options):
    model, tokens = small_model(noise=0.1, **options), random_tokens(2, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, LoraConfig(rank=2), seed=4)
    apart = trained(model)(tokens)
    set_merged(model, True)
    set_merged(model, True)
    torch.testing.assert_close(model(tokens), apart, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.state_dict()["h.0.attn.c_attn.weight"], before["h.0.attn.c_attn.weight"])
    set_merged(model, False)
    torch.testing.assert_close(model.state_dict()["h.0.attn.c_attn.weight"], before["h.0.attn.c_attn.weight"])
    torch.testing.assert_close(model(tokens), apart, rtol=1e-4, atol=1e-5)


@KINDS
def test_dropped_adapters_leave_a_plain_model_with_what_they_learnt(options):
    model, tokens = small_model(noise=0.1, **options), random_tokens(2, 16)
    names = set(model.state_dict())
    add_lora(model, LoraConfig(rank=2), seed=4)
    apart = trained(model)(tokens)
    drop_lora(model)
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain = GPT(model.config)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(tokens), apart, rtol=1e-4, atol=1e-5)


def test_adapters_depend_on_the_seed_and_nothing_else():
    first, second, other = (small_model() for _ in range(3))
    add_lora(first, LoraConfig(), seed=1)
    torch.rand(7)
    add_lora(second, LoraConfig(), seed=1)
    add_lora(other, LoraConfig(), seed=2)
    name = "h.1.mlp.c_fc.lora_a"
    assert torch.equal(lora_tensors(first)[name], lora_tensors(second)[name])
    assert not torch.equal(lora_tensors(first)[name], lora_tensors(other)[name])
    initialise(second, 1)  # knows what a fresh adapter looks like
    assert torch.equal(second(random_tokens(1, 8)), small_model(seed=1)(random_tokens(1, 8)))


def test_only_the_targets_are_adapted():
    model = small_model()
    add_lora(model, LoraConfig(rank=2, targets=("c_attn",)), seed=0)
    assert [name for name, _ in lora_layers(model)] == ["h.0.attn.c_attn", "h.1.attn.c_attn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"targets": ("q_proj",)}, "choose from c_attn"),
        ({"targets": ()}, "choose from c_attn"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_adapting_twice_and_adapting_nothing_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"none of lora\.targets"):
        add_lora(model, LoraConfig(targets=("c_gate",)), seed=0)
    add_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(model, LoraConfig(), seed=0)
