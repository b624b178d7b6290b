"""Tiny models that the tests of this folder share, and every way to choose a model's parts."""

import itertools
from typing import Any

import torch

from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "vocab_multiple": 16,
    "block_size": 160,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
}

AXES: dict[str, list[Any]] = {
    "norm": ["layernorm", "rmsnorm"],
    "position": ["learned", "rope"],
    "mlp": ["gelu", "gelu_exact", "swiglu", "relu2"],
    "bias": [True, False],
    "tie_weights": [True, False],
    "n_kv_head": [None, 2, 1],
    "qk_norm": [False, True],
    "window": [None, 5],
    "attention": ["softmax", "differential"],
}
MORE_AXES: dict[str, list[Any]] = {  # covered in pairs, not in every combination
    "logit_softcap": [None, 2.0],
    "norm_weights": [True, False],
    "embedding": ["plain", "scaled", "normed"],
    "value_residual": [False, True],
    "value_embeddings": [0, 1],
}


def small_config(**options) -> ModelConfig:
    return ModelConfig(**{**BASE, **options})


def small_model(seed=0, *, noise=0.0, dtype=torch.float32, **options) -> GPT:
    """An initialised model; `noise` moves every parameter, biases and norms included, off its first value."""
    model = GPT(small_config(**options))
    initialise(model, seed)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model.to(dtype)


def random_tokens(batch=2, length=160, vocab=61, seed=0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def all_options() -> list[dict[str, Any]]:
    """Every combination of `AXES`."""
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def pairwise_options() -> list[dict[str, Any]]:
    """Few combinations in which every pair of values of two axes occurs.

    Greedy: each combination is built axis by axis around the first pair that is still missing.
    """
    axes = AXES | MORE_AXES
    missing = {((a, x), (b, y)): None for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b]}
    chosen = []
    while missing:
        options = dict(next(iter(missing)))
        for axis in sorted(axes.keys() - options.keys(), key=list(axes).index):
            options[axis] = max(axes[axis], key=lambda value: _covered({**options, axis: value}, axis, axes, missing))
        chosen.append({axis: options[axis] for axis in axes})
        for pair in itertools.combinations(chosen[-1].items(), 2):
            missing.pop(pair, None)
    return chosen


def _covered(options, axis, axes, missing):
    """How many missing pairs an axis would cover with those that have a value already."""
    order = list(axes)
    pairs = (sorted(((axis, options[axis]), (b, y)), key=lambda item: order.index(item[0])) for b, y in options.items())
    return sum(tuple(pair) in missing for pair in pairs)


def option_id(options) -> str:
    return "-".join(str(value) for value in options.values())
