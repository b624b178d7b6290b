"""First weights: deviations, reproducibility across processes of any shape, and independence of parameters."""

import torch

from model.initialisation import empty_gpt, initialise
from tests.model.small import random_tokens, small_config, small_model


def parameters(**options):
    return dict(small_model(**options).named_parameters())


def test_deviations_are_gpt2s():
    values = parameters(n_layer=8, n_embd=128)
    assert abs(values["wte.weight"][:61].std() - 0.02) < 0.001
    assert abs(values["h.3.attn.c_attn.weight"].std() - 0.02) < 0.001
    for name in ("h.3.attn.c_proj.weight", "h.3.mlp.c_proj.weight"):
        assert abs(values[name].std() - 0.02 / 4) < 0.0003
    assert (values["h.0.mlp.c_fc.bias"] == 0).all()
    assert (values["h.0.ln_1.weight"] == 1).all()
    assert (values["wte.weight"][61:] == 0).all()


def test_a_seed_means_one_set_of_weights_whatever_was_drawn_before():
    first = parameters()
    torch.rand(100)
    second = parameters()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = parameters(seed=1)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_a_part_more_does_not_change_the_others_and_no_two_parameters_are_alike():
    plain, more = parameters(bias=False), parameters(bias=True, qk_norm=True, tie_weights=False)
    assert all(torch.equal(plain[name], more[name]) for name in plain)
    assert not torch.equal(plain["h.0.attn.c_proj.weight"], plain["h.1.attn.c_proj.weight"])


def test_a_model_built_without_memory_gets_the_same_weights():
    model = empty_gpt(small_config(position="rope"), "cpu")
    initialise(model, 0)
    assert all(parameter.is_meta for parameter in empty_gpt(small_config()).parameters())
    expected, tokens = small_model(position="rope"), random_tokens(1, 8)
    assert not list(model.buffers())
    assert torch.equal(model(tokens), expected(tokens))
