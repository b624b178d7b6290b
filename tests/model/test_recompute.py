"""Activation checkpointing: the same losses to the bit, with dropout, and fewer tensors kept."""

import pytest
import torch

from model.lora import add_lora, lora_tensors
from model.lora_config import LoraConfig
from tests.model.small import random_tokens, small_model

LENGTH = 24


def loss_and_gradients(recompute_every, recompute_norms=False, **options):
    model = small_model(n_layer=4, **options)
    model.recompute_every, model.recompute_norms = recompute_every, recompute_norms
    torch.manual_seed(5)
    loss = model(random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1))
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()]


def kept_numbers(recompute_every, recompute_norms=False, training=True, **options) -> int:
    """Elements of distinct tensors kept for backward, parameters apart."""
    model = small_model(n_layer=4, **options).train(training)
    model.recompute_every, model.recompute_norms = recompute_every, recompute_norms
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x  # the tensor too: a freed address may be used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(random_tokens(2, LENGTH))
    return sum(x.untyped_storage().nbytes() // 4 for address, x in kept.items() if address not in parameters)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"value_residual": True, "value_embeddings": 1},
        {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "window": 5},
    ],
    ids=str,
)
def test_losses_and_gradients_are_equal_to_the_bit_with_dropout(every, norms, options):
    loss, gradients = loss_and_gradients(0, dropout=0.3, **options)
    again, same_gradients = loss_and_gradients(every, norms, dropout=0.3, **options)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


@pytest.mark.parametrize(("every", "norms"), [(0, True), (2, True), (1, False)])
def test_gradients_of_adapters_with_dropout_are_equal_to_the_bit(every, norms):
    """The norm's projection has their dropout in it: recomputed with another mask, gradients were wrong."""
    gradients = []
    for recompute in ((0, False), (every, norms)):
        model = small_model(n_layer=4, noise=0.1, mlp="swiglu")
        add_lora(model, LoraConfig(rank=2, dropout=0.5), seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in lora_tensors(model).values():
            torch.nn.init.normal_(parameter, generator=generator)
        model.recompute_every, model.recompute_norms = recompute
        torch.manual_seed(5)
        model(random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1)).backward()
        gradients.append([parameter.grad for parameter in lora_tensors(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_recomputed_block_keeps_its_input_alone():
    nothing, half, full = kept_numbers(0), kept_numbers(2), kept_numbers(1)
    block_input = 2 * LENGTH * 32
    inside = (nothing - full) / 4  # what a block keeps beside its input
    assert inside > 10 * block_input
    assert nothing - half == pytest.approx(2 * inside, rel=0.05)
    assert full < 4 * block_input + 6 * block_input  # inputs, and what embedding, last norm and token ids need


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_recomputed_with_its_projection_frees_the_projections_input(norm):
    saved = kept_numbers(0, norm=norm) - kept_numbers(0, True, norm=norm)
    assert saved >= 4 * 2 * (2 * LENGTH * 32)  # layers, norms, (B, T, C)


def test_evaluation_recomputes_nothing():
    assert kept_numbers(1, training=False) == kept_numbers(0, training=False)
