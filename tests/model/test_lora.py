"""Adapters start as nothing, only they are trained, and they merge and come out again."""

import pytest
import torch

from model.gpt import GPT
from model.initialisation import initialise
from model.lora import add_lora, drop_lora, lora_layers, lora_tensors, set_merged
from model.lora_config import LoraConfig
from tests.model.small import random_tokens, small_model

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
KINDS = pytest.mark.parametrize("options", [{}, LLAMA, {"attention": "differential", "value_residual": True}], ids=str)


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


@pytest.mark.parametrize("options", [LLAMA, {"n_embd": 36, "n_head": 3}], ids=str)
@pytest.mark.parametrize(
    ("targets", "rows"),
    [
        (("q", "k"), {"attn.c_attn": "qk"}),
        (("v", "o", "down"), {"attn.c_attn": "v", "attn.c_proj": "", "mlp.c_proj": ""}),
        (("c_attn", "up"), {"attn.c_attn": "qkv", "mlp.c_fc": ""}),
        (("c_proj", "o"), {"attn.c_proj": "", "mlp.c_proj": ""}),
    ],
    ids=str,
)
def test_only_the_targets_are_adapted_and_merged(options, targets, rows):
    model, base, tokens = small_model(noise=0.1, **options), small_model(noise=0.1, **options), random_tokens(2, 16)
    add_lora(model, LoraConfig(rank=2, targets=targets), seed=0)
    assert {name for name, _ in lora_layers(model)} == {f"h.{i}.{layer}" for layer in rows for i in range(2)}
    assert torch.equal(model(tokens), base(tokens))
    apart = trained(model)(tokens)
    drop_lora(model)
    torch.testing.assert_close(model(tokens), apart, rtol=1e-4, atol=1e-5)
    config, frozen = model.config, dict(base.named_parameters())
    heights = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    for name, parameter in model.named_parameters():
        layer, last = ".".join(name.split(".")[2:-1]), name.split(".")[-1]
        changed = [not torch.equal(*pair) for pair in zip(parameter, frozen[name], strict=True)]
        if rows.get(layer) and last == "weight":
            parts = [any(part) for part in torch.tensor(changed).split(heights)]
            assert "".join(part for part, moved in zip("qkv", parts, strict=True) if moved) == rows[layer], name
        else:
            assert any(changed) == (layer in rows and last == "weight"), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"targets": ("q_proj",)}, "choose from c_attn"),
        ({"targets": ()}, "choose from c_attn"),
        ({"targets": ("v", "c_attn")}, "has v twice"),
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
