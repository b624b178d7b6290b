"""A kind of attention from outside: one class, one entry; and blocks that the closed forms don't know stop a run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from eval.hugging_face.hf_config import home_of
from model.attention import Attention
from model.attention_kinds import ATTENTION_KINDS, AttentionKind, Sizes
from model.attention_masks import Visibility
from model.config import PRESETS, ModelConfig
from model.counts import check_parameters, flops_per_token, parameter_count
from model.gpt import GPT
from model.lora import add_lora
from model.lora_config import LoraConfig, adapter_count
from model.memory import memory_estimate
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train_as_rank
from tests.model.small import random_tokens, small_config, small_model
from tests.model.test_memory import BATCH, LENGTH, config_of, kept_bytes


class TemperedAttention(Attention):
    """Every head has a temperature of its own."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.temperature = nn.Parameter(torch.empty(config.n_head, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        return super().attend(q * self.temperature, k, v, visibility)


class TemperedKind(AttentionKind):
    def shapes(self, config: Sizes) -> dict[str, tuple[int, ...]]:
        return super().shapes(config) | {"temperature": (config.n_head, 1, 1)}

    def kept_per_token(self, config: Sizes, *, in_blocks: bool) -> int:
        return super().kept_per_token(config, in_blocks=in_blocks) + config.n_embd  # queries before they are scaled


@pytest.fixture
def tempered(monkeypatch: pytest.MonkeyPatch) -> str:
    kind = TemperedKind(__name__, "TemperedAttention", {"temperature": 3.0})
    monkeypatch.setitem(ATTENTION_KINDS, "tempered", kind)
    return "tempered"


def temperatures_of(model: GPT) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".attn.temperature")]


def test_a_kind_from_outside_is_built_and_learns(tempered: str) -> None:
    model = small_model(attention=tempered)
    temperatures = torch.cat([temperature.detach().flatten() for temperature in temperatures_of(model)])
    assert 1.0 < temperatures.std() < 6.0  # of first values with deviation 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens, losses = random_tokens(), []
    for _ in range(3):
        loss = model(tokens, tokens, reduction="sum")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in temperatures_of(model))


def test_a_kind_from_outside_is_counted(tempered: str) -> None:
    for options in ({}, {"bias": False, "qk_norm": True, "n_kv_head": 2}):
        plain, config = small_config(**options), small_config(attention=tempered, **options)
        check_parameters(GPT(config))
        assert parameter_count(config) == parameter_count(plain) + config.n_layer * config.n_head
        assert flops_per_token(config) == flops_per_token(plain) + 6 * config.n_layer * config.n_head


def test_a_kind_from_outside_is_in_the_memory_estimate(tempered: str) -> None:
    estimates = {}
    for attention in ("softmax", tempered):
        config = config_of({"attention": attention})
        estimates[attention] = memory_estimate(
            config, micro_batch=BATCH, dtype="fp32", recompute_every=0, device_type="cpu", optimizer_bytes=0
        ).activations
    assert estimates[tempered] == estimates["softmax"] + 4 * config.n_layer * config.n_embd * BATCH * LENGTH
    assert kept_bytes(config, "fp32", 0, False, "fp32") == pytest.approx(estimates[tempered], rel=0.01)


def test_a_kind_from_outside_is_not_exported(tempered: str) -> None:
    with pytest.raises(UserError, match=r"model\.attention tempered: this model can't be exported"):
        home_of(small_config(attention=tempered))


def test_a_kind_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.attention is 'linear': use one of softmax, differential"):
        small_config(attention="linear")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_built_as_they_are_counted(name: str) -> None:
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    check_parameters(model)
    add_lora(model, LoraConfig(rank=2, targets=("c_attn",)), seed=0)
    with pytest.raises(UserError, match=r"parameters of adapters, but its closed form counts 0"):
        check_parameters(model)
    check_parameters(model, adapters=adapter_count(model.config, LoraConfig(rank=2, targets=("c_attn",))))


class WrongKind(AttentionKind):
    def parameters(self, config: Sizes) -> int:
        return super().parameters(config) - 1


def train_with_wrong_counts(arguments: list[str]) -> None:
    ATTENTION_KINDS["softmax"] = WrongKind("model.attention", "Attention")
    train_as_rank(arguments)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_block_that_the_closed_forms_do_not_know_stops_the_run(tmp_path: Path, world_size: int) -> None:
    make_token_set(tmp_path / "data", train_tokens=2_001, val_tokens=500)
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "run")
    group = RankGroup(world_size, tmp_path / "store", train_with_wrong_counts, arguments)
    assert group.join() == [2] * world_size
    run = run_of(tmp_path, "run")
    state = run.read_state()
    assert state is not None
    assert state["status"] == "failed"
    built = parameter_count(ModelConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32))
    assert f"the model has {built:,} parameters, but its closed form counts {built - 2:,}" in str(state["reason"])
    assert "bring model/counts.py" in str(state["reason"])
    assert not list(run.checkpoints.iterdir())
