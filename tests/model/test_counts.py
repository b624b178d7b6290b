"""Parameter, FLOP and peak figures against hand numbers and against models built without memory."""

import pytest
import torch

from model.config import PRESETS, ModelConfig
from model.counts import flops_per_token, matrix_rows, parameter_count, parameter_shapes, trained_shapes
from model.device_table import peak_flops
from model.gpt import GPT
from model.lora import add_lora
from model.lora_config import LoraConfig
from model.roles import parameter_roles
from tests.model.small import AXES, pairwise_options, small_config

BY_HAND = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1p3b": 1_315_723_264,
    # 50257·768 + 12·(4·768² + 3·768·2048 + 2·768) + 768
    "llama-124m": 123_551_232,
}


def built_parameters(config):
    """Elements of a real model, less the padding rows of its tables."""
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * (1 if config.tie_weights else 2)
    return sum(parameter.numel() for parameter in model.parameters()) - padding


@pytest.mark.parametrize("name", BY_HAND)
def test_presets_have_the_published_sizes(name):
    assert parameter_count(PRESETS[name]) == BY_HAND[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_what_is_built(name):
    assert parameter_count(PRESETS[name]) == built_parameters(PRESETS[name])


@pytest.mark.parametrize("size", ["124m", "355m", "774m", "1p3b"])
def test_llamas_are_of_equal_size(size):
    assert parameter_count(PRESETS[f"llama-{size}"]) == pytest.approx(
        parameter_count(PRESETS[f"gpt2-{size}"]), rel=0.01
    )


@pytest.mark.parametrize("kind", AXES["attention"])
def test_any_structure_counts_what_is_built(kind):
    for options in pairwise_options():
        config = small_config(**{**options, "attention": kind}, mlp_hidden=100)
        assert parameter_count(config) == built_parameters(config), options
        with torch.device("meta"):
            model = GPT(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert parameter_shapes(config) == trained_shapes(config) == shapes, options
        matrices = {name: role.rows for name, role in parameter_roles(model).items() if role.kind == "matrix"}
        assert matrix_rows(config) == matrices, options
        targets = ("q", "v", "down") if config.bias else ("c_attn", "c_fc", "c_gate", "c_proj")
        adapters = LoraConfig(rank=3, targets=targets)
        add_lora(model, adapters, seed=0)
        trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        assert trained_shapes(config, adapters) == trained, options


def test_flops_of_gpt2_by_hand():
    config = ModelConfig()
    without_positions = 124_439_808 - 1024 * 768
    assert flops_per_token(config) == 6 * without_positions + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(config, length=100) == 6 * without_positions + 12 * 12 * 12 * 64 * 100


def test_an_untied_table_is_looked_up_and_not_multiplied():
    untied = ModelConfig(tie_weights=False)
    assert flops_per_token(untied) == flops_per_token(ModelConfig())
    assert parameter_count(untied) == parameter_count(ModelConfig()) + 50257 * 768


def test_value_embeddings_are_looked_up_and_not_multiplied():
    with_values = ModelConfig(value_embeddings=2, n_kv_head=4)
    without = ModelConfig(n_kv_head=4)
    weights = 2 * 4  # of the values of four layers
    assert parameter_count(with_values) == parameter_count(without) + 2 * 50257 * 256 + weights
    assert flops_per_token(with_values) == flops_per_token(without) + 6 * weights


def test_a_window_is_credited_with_the_keys_it_sees():
    full = flops_per_token(ModelConfig())
    windowed = flops_per_token(ModelConfig(window=256, window_pattern="SSSL"))
    assert full - windowed == 9 * 12 * 12 * 64 * (1024 - 256)
    assert flops_per_token(ModelConfig(window=4096)) == full


def test_differential_attention_multiplies_two_maps_with_the_values():
    config = ModelConfig(attention="differential")
    weights = 6 * (parameter_count(config) - 1024 * 768)
    assert flops_per_token(config) - weights == 12 * (6 + 12) * 12 * 64 * 1024


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX A6000", 154.8),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI250X/MI250", 191.5),
        ("AMD Instinct MI250", 181.05),
    ],
)
def test_known_devices(name, teraflops):
    assert peak_flops(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "Quadro M4000",
        "cpu",
    ],
)
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops(name) is None
