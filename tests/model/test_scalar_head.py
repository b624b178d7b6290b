"""The scalar head: a number a token, 0 at first, wherever a text stands, trained with or beside all other weights."""

import pytest
import torch

from model.counts import check_parameters, parameter_count, trained_shapes
from model.gpt import GPT
from model.lora import add_lora, drop_lora, lora_tensors
from model.lora_config import LoraConfig, adapter_count
from tests.model.small import random_tokens, small_model

LENGTHS = (5, 17, 11)


def with_head(**options) -> GPT:
    """Its head is moved off 0."""
    return small_model(seed=3, noise=0.2, scalar_head=True, **options)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_values_are_zero_at_first_and_do_not_depend_on_the_layout(position):
    assert not small_model(scalar_head=True)(random_tokens(), values=True).any()
    model, exact = with_head(position=position), with_head(position=position, dtype=torch.float64)
    texts = [random_tokens(1, length, seed=length)[0] for length in LENGTHS]
    padded, packed = torch.full((3, 20), 7), torch.cat(texts)[None]  # 7 is in the texts, too
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    in_rows = model(padded, values=True)  # (3, 20)
    in_one = model(packed, values=True, document_ids=documents)[0].split(LENGTHS)
    assert in_rows.dtype == torch.float32 and in_rows.shape == padded.shape
    for row, text, part in zip(in_rows, texts, in_one, strict=True):
        wanted = (exact.hidden(text[None])[0] @ exact.scalar_head.weight[0]).float()  # (n)
        torch.testing.assert_close(row[: len(text)], wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(part, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(text[None], values=True)[0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_values_beside_losses_and_alone_give_every_parameter_a_gradient(tied):
    model, tokens = with_head(tie_weights=tied), random_tokens()
    losses, values = model(tokens, tokens, reduction="none", values=True)
    torch.testing.assert_close(losses, model(tokens, tokens, reduction="none"), atol=0, rtol=0)
    torch.testing.assert_close(values, model(tokens, values=True), atol=1e-6, rtol=0)
    model(tokens, values=True).square().sum().backward()
    for name, parameter in model.named_parameters():  # else DDP would wait for it
        assert parameter.grad is not None, name
        assert parameter.grad.any() == (name != "lm_head.weight"), name
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a score of 8 bits would tell few answers apart
        assert model(tokens, values=True).dtype == torch.float32


def test_it_is_counted_trained_beside_adapters_and_merged():
    model, tokens, lora = with_head(tie_weights=False), random_tokens(), LoraConfig(rank=2)
    assert parameter_count(model.config) == sum(
        parameter.numel() - (parameter.shape[0] - 61) * 32 * (name in ("wte.weight", "lm_head.weight"))
        for name, parameter in model.named_parameters()
    )
    before = model(tokens, values=True)
    add_lora(model, lora, seed=1)
    check_parameters(model, adapters=adapter_count(model.config, lora))
    tensors = lora_tensors(model)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == trained_shapes(model.config, lora)
    assert torch.equal(model(tokens, values=True), before)
    with torch.no_grad():
        tensors["scalar_head.lora_rows"].mul_(2)
    doubled = model(tokens, values=True)
    torch.testing.assert_close(doubled, 2 * before)
    drop_lora(model)
    check_parameters(model)
    torch.testing.assert_close(model(tokens, values=True), doubled)
