"""Ids that are appended to a vocabulary: their first rows, and rows that are trained beside adapters."""

import pytest
import torch

from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.template import read_template
from data_prep.tokenization.loading import load_tokenizer
from model.config import ModelConfig
from model.counts import check_parameters, trained_shapes
from model.gpt import GPT
from model.lora import add_lora, drop_lora, lora_tensors, set_merged
from model.lora_config import LoraConfig, adapter_count
from model.vocabulary import with_ids
from tests.model.small import random_tokens, small_model
from train.startup.from_checkpoint import appends_to

NEW = 3


def tensors_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("known", [250, 256])  # padded to 256: rows of padding are there for 6 more, or for none
def test_new_rows_are_the_mean_of_the_others_and_reuse_padding(known: int, tied: bool) -> None:
    options = {"tie_weights": tied, "value_embeddings": 1, "noise": 0.1}
    old, new = small_model(vocab_size=known, **options), small_model(vocab_size=known + NEW, **options)
    with torch.no_grad():
        old.wte.weight[known:] = 7.0  # padding that must not be averaged
    grown = with_ids(tensors_of(old), known, new.config)
    for name, value in new.named_parameters():
        before = dict(old.named_parameters())[name]
        assert grown[name].shape == value.shape
        if name.startswith(("wte", "lm_head", "wve")):
            mean = before[:known].double().mean(0).float().expand(NEW, -1)
            assert torch.equal(grown[name][:known], before[:known])
            assert torch.equal(grown[name][known : known + NEW], mean)
        else:
            assert torch.equal(grown[name], before)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_beside_adapters_learn_what_they_would_in_a_whole_model(tied: bool) -> None:
    model, whole = (small_model(3, vocab_size=300, tie_weights=tied, noise=0.1) for _ in range(2))
    tokens, targets = random_tokens(2, 8, vocab=300), random_tokens(2, 8, vocab=300, seed=1)
    tokens[:, 3], targets[:, 2] = 298, 299
    before = model(tokens)
    lora = LoraConfig(rank=2, new_rows=NEW)
    add_lora(model, lora, seed=0)
    check_parameters(model, adapters=adapter_count(model.config, lora))
    trained = {name: tuple(value.shape) for name, value in lora_tensors(model).items()}
    assert trained == trained_shapes(model.config, lora)
    assert torch.equal(model(tokens), before)
    for one in (model, whole):
        one(tokens, targets).backward()
    for layer in ("wte",) if tied else ("wte", "lm_head"):
        expected = whole.get_parameter(f"{layer}.weight").grad
        assert expected is not None
        torch.testing.assert_close(
            lora_tensors(model)[f"{layer}.lora_rows"].grad, expected[297:300], rtol=1e-5, atol=1e-6
        )
        assert model.get_parameter(f"{layer}.weight").grad is None
    with torch.no_grad():
        for name, rows in lora_tensors(model).items():
            rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.eval()
    learned = model(tokens)
    assert not torch.allclose(learned, before, atol=1e-3)
    set_merged(model, True)
    torch.testing.assert_close(model(tokens), learned, rtol=1e-4, atol=1e-5)
    set_merged(model, False)
    torch.testing.assert_close(model(tokens), learned, rtol=1e-4, atol=1e-5)
    drop_lora(model)
    torch.testing.assert_close(model(tokens), learned, rtol=1e-4, atol=1e-5)
    assert tensors_of(model).keys() == tensors_of(whole).keys()
    assert {type(module) for module in model.modules()} == {type(module) for module in whole.modules()}


@pytest.mark.parametrize("kind", ["gpt2", "byte"])
def test_which_tokenizers_only_append_ids(kind: str) -> None:
    base, other = load_tokenizer(kind), load_tokenizer("gpt2-8k")
    chatml, llama3 = (ChatTokenizer.of(base, read_template(name)) for name in ("chatml", "llama3"))
    both = ChatTokenizer.of(chatml, read_template("llama3"))

    assert appends_to(base.spec, base.spec)
    assert appends_to(chatml.spec, base.spec) and appends_to(both.spec, chatml.spec)
    assert not appends_to(base.spec, chatml.spec)  # the checkpoint's format for conversations would be lost
    assert not appends_to(llama3.spec, chatml.spec) and not appends_to(chatml.spec, both.spec)
    assert not appends_to(chatml.spec, other.spec) and not appends_to(base.spec, other.spec)


def test_a_config_has_rows_of_zero_where_the_base_has_no_padding() -> None:
    config = ModelConfig(vocab_size=130, n_layer=1, n_head=1, n_embd=8, block_size=8)
    grown = with_ids({"wte.weight": torch.ones(128, 8)}, 128, config)["wte.weight"]

    assert grown.shape == (256, 8) and grown[128:130].eq(1).all() and grown[130:].eq(0).all()
