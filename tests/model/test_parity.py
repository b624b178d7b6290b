"""Logits and all gradients equal to Hugging Face's GPT-2 and Llama, for random configurations in float32."""

import random

import pytest
import torch
from torch.nn import functional as F

from model.loss import head_loss
from tests.model.small import random_tokens, small_model

transformers = pytest.importorskip("transformers")

LENGTH = 24


def random_shape(seed):
    choose = random.Random(seed)
    heads, size = choose.choice([1, 2, 4, 6]), choose.choice([8, 16])
    kv_heads = choose.choice([d for d in (1, 2, 3, 4, 6) if heads % d == 0])
    shape = {
        "n_layer": choose.randint(1, 3),
        "n_head": heads,
        "n_embd": heads * size,
        "vocab_size": choose.randint(40, 130),
        "mlp_hidden": choose.choice([24, 64]),
        "norm_eps": choose.choice([1e-5, 1e-6]),
    }
    return shape, kv_heads, choose


def relative_error(got, want):
    return ((got - want).norm() / want.norm().clamp(min=1e-12)).item()


def compare(model, reference, pairs):
    """`pairs`: our parameter name to a function of the reference's gradients, by its names."""
    vocab = model.config.vocab_size
    tokens, targets = random_tokens(2, LENGTH, vocab), random_tokens(2, LENGTH, vocab, seed=1)
    expected = reference(tokens).logits
    assert relative_error(model(tokens)[..., :vocab], expected) < 1e-5
    model(tokens, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    ours = dict(model.named_parameters())
    assert set(pairs) == set(ours)
    largest = max(parameter.grad.norm() for parameter in ours.values())
    for name, of_reference in pairs.items():
        got = ours[name].grad[:vocab] if name in ("wte.weight", "lm_head.weight") else ours[name].grad
        want = of_reference(gradients)
        # a key's bias has no gradient but rounding, so what is small beside the largest is compared with that
        assert (got - want).norm() < 1e-5 * max(want.norm(), 1e-3 * largest), name


def copy_into(model, reference, pairs):
    values = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = pairs[name](values)
            parameter.zero_()
            parameter[: len(value)] = value


def stir(reference):
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)


def pick(*names, flip=False):
    """Looks names up, puts what it finds one below the other, and transposes it on demand (Conv1D stores (in, out))."""
    return lambda g: torch.cat([g[name].T if flip else g[name] for name in names])


def gpt2_pairs(layers):
    pairs = {
        "wte.weight": pick("transformer.wte.weight"),
        "wpe.weight": pick("transformer.wpe.weight"),
        "ln_f.weight": pick("transformer.ln_f.weight"),
        "ln_f.bias": pick("transformer.ln_f.bias"),
    }
    for i in range(layers):
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            for kind in ("weight", "bias"):
                name = f"h.{i}.{part}.{kind}"
                pairs[name] = pick(f"transformer.{name}", flip=kind == "weight" and "c_" in part)
    return pairs


@pytest.mark.parametrize("seed", range(6))
def test_gpt2(seed):
    shape, _, choose = random_shape(seed)
    torch.manual_seed(seed)
    exact = choose.random() < 0.5
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape["vocab_size"],
            n_positions=32,
            n_embd=shape["n_embd"],
            n_layer=shape["n_layer"],
            n_head=shape["n_head"],
            n_inner=shape["mlp_hidden"],
            activation_function="gelu" if exact else "gelu_new",
            layer_norm_epsilon=shape["norm_eps"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    stir(reference)
    model = small_model(block_size=32, mlp="gelu_exact" if exact else "gelu", **shape)
    pairs = gpt2_pairs(shape["n_layer"])
    copy_into(model, reference, pairs)
    compare(model, reference, pairs)


def llama_pairs(layers, tied):
    pairs = {"wte.weight": pick("model.embed_tokens.weight"), "ln_f.weight": pick("model.norm.weight")}
    if not tied:
        pairs["lm_head.weight"] = pick("lm_head.weight")
    singles = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_gate": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for i in range(layers):
        for ours, theirs in singles.items():
            pairs[f"h.{i}.{ours}.weight"] = pick(f"model.layers.{i}.{theirs}.weight")
        stacked = [f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]
        pairs[f"h.{i}.attn.c_attn.weight"] = pick(*stacked)
    return pairs


@pytest.mark.parametrize("seed", range(6))
def test_llama(seed):
    shape, kv_heads, choose = random_shape(seed)
    torch.manual_seed(seed)
    tied, base = choose.random() < 0.5, choose.choice([1e4, 5e5])
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["n_embd"],
            intermediate_size=shape["mlp_hidden"],
            num_hidden_layers=shape["n_layer"],
            num_attention_heads=shape["n_head"],
            num_key_value_heads=kv_heads,
            max_position_embeddings=32,
            rms_norm_eps=shape["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": base},
            tie_word_embeddings=tied,
        )
    )
    stir(reference)
    options = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "rope_base": base}
    model = small_model(block_size=32, n_kv_head=kv_heads, tie_weights=tied, **options, **shape)
    pairs = llama_pairs(shape["n_layer"], tied)
    copy_into(model, reference, pairs)
    compare(model, reference, pairs)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_gemma2s_capped_logits_and_their_gradients(cap):
    """From its last norm's output on: the rest of Gemma 2 has no counterpart here."""
    torch.manual_seed(0)
    reference = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, final_logit_softcapping=cap, pad_token_id=0,
        )
    )  # fmt: skip
    stir(reference)
    tokens, targets = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1)
    hidden = reference.model(tokens).last_hidden_state.detach().requires_grad_()
    reference.model.forward = lambda *_, **__: transformers.modeling_outputs.BaseModelOutputWithPast(hidden)
    expected = reference(tokens).logits[..., :61]
    model = small_model(tie_weights=False, logit_softcap=cap)
    with torch.no_grad():
        model.lm_head.weight.copy_(reference.lm_head.weight)
    assert relative_error(model.logits(hidden)[..., :61], expected) < 1e-6
    weights = (reference.lm_head.weight, model.lm_head.weight)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    ours = head_loss(hidden, weights[1], targets, 61, softcap=cap)
    assert relative_error(ours, loss) < 1e-6
    theirs = torch.autograd.grad(loss, (hidden, weights[0]))
    for got, want in zip(torch.autograd.grad(ours, (hidden, weights[1])), theirs, strict=True):
        assert relative_error(got, want) < 1e-5
