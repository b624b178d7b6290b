"""Twenty steps of the whole trainer against a textbook loop with transformers' GPT-2 and torch's AdamW."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train
from train.batches.shuffle import windows_at

T, C, L, H, V = 16, 32, 2, 2, 257
STEPS, SEQUENCES, PEAK, WARMUP, FINAL, DECAY, CLIP = 20, 32, 1e-2, 3, 0.1, 0.1, 1.0
OWN_DECAY = 2.0  # as large that 1e-4 of a loss shows where it is not what it should be


def as_gpt2(weights: dict[str, torch.Tensor]) -> GPT2LMHeadModel:
    """Transformers' GPT-2 with our weights: its Conv1D keeps (in, out)."""
    config = GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    state = {}
    for name, tensor in weights.items():
        conv = name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name
        state[f"transformer.{name}"] = tensor[:V] if name == "wte.weight" else tensor.T if conv else tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    return model


def as_llama(weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """Transformers' Llama with our weights: q, k and v apart."""
    hidden = weights["h.0.mlp.c_fc.weight"].shape[0]
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=hidden,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=H,
        max_position_embeddings=T,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    names = {
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_gate": "mlp.gate_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    }
    state = {"model.embed_tokens.weight": weights["wte.weight"][:V], "model.norm.weight": weights["ln_f.weight"]}
    for layer in range(L):
        for part, tensor in zip("qkv", weights[f"h.{layer}.attn.c_attn.weight"].chunk(3), strict=True):
            state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = tensor
        for ours, theirs in names.items():
            state[f"model.layers.{layer}.{theirs}.weight"] = weights[f"h.{layer}.{ours}.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    return model


def textbook_losses(model: torch.nn.Module, data: Path, *, own_decay: bool) -> list[float]:
    """Train as papers describe it: the whole batch at once, cosine with warm-up, clipping, decay on matrices.

    Args: own_decay: weight decay is the peak rate's, OWN_DECAY of it, and falls linearly, whatever the rate's schedule.
    """
    tokens = TokenSet.open(data).split("train")
    stream = tokens.read(0, len(tokens)).astype(np.int64)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    found = []
    for step in range(1, STEPS + 1):
        chosen = windows_at((step - 1) * SEQUENCES, SEQUENCES, (len(stream) - 1) // T, 1337)
        batch = torch.from_numpy(np.stack([stream[w * T : w * T + T + 1] for w in chosen]))
        progress = (step - WARMUP) / (STEPS - WARMUP)
        cosine = FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * (step / WARMUP if step <= WARMUP else cosine)
            if own_decay and group["weight_decay"]:
                group["weight_decay"] = OWN_DECAY * (1 - step / STEPS) * PEAK / group["lr"]
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found.append(loss.item())
    return found


LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("kind", "options"), [("gpt2", {}), ("llama", LLAMA)])
def test_twenty_steps_of_the_whole_trainer(
    tmp_path: Path, world_size: int, kind: str, options: dict[str, object]
) -> None:
    data = tmp_path / "data"
    make_token_set(data, train_tokens=9_000, val_tokens=500)
    more = [f"--model.{key}={json.dumps(value).strip(chr(34))}" for key, value in options.items()]
    if kind == "llama":
        more += ["--schedule.weight_decay=linear", "--schedule.independent_weight_decay=true"]
        more.append(f"--optim.weight_decay={OWN_DECAY}")
    train(world_size, tmp_path, tiny_arguments(tmp_path, data, kind, "--model.dropout=0", *more))
    ours = GPT(ModelConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C, **options))  # type: ignore[arg-type]
    initialise(ours, seed=1337)
    weights = {name: p.detach().clone() for name, p in ours.named_parameters()}
    torch.manual_seed(0)
    theirs = as_gpt2(weights) if kind == "gpt2" else as_llama(weights)
    expected = textbook_losses(theirs.train(), data, own_decay=kind == "llama")
    found = losses(run_of(tmp_path, kind))
    assert [found[step] for step in range(1, STEPS + 1)] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 1  # it does learn something
