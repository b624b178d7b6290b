"""Impossible models are refused in one line that says what to change."""

import dataclasses

import pytest

from model.config import PRESETS, ModelConfig, preset_config

IMPOSSIBLE = [
    ({"n_embd": 770}, "model.n_embd is 770, not a multiple of model.n_head 12: use 11 heads"),
    ({"n_kv_head": 5}, "n_head is 12, not a multiple of model.n_kv_head 5: use 4 key and value heads"),
    ({"n_kv_head": 24}, "use 12 key"),
    ({"n_kv_head": 0}, "use 1 key"),
    ({"position": "rope", "n_embd": 36}, "choose n_embd and n_head so that it is even"),
    ({"attention": "differential", "n_embd": 36}, "differential attention halves it: make it even"),
    ({"attention": "differential", "position": "rope", "n_embd": 72}, "so that it is even"),
    ({"window": 0}, "model.window is 0"),
    ({"window_pattern": "SL"}, "model.window_pattern is set, but not model.window"),
    ({"window": 8, "window_pattern": "SX"}, "use only S"),
    ({"window": 8, "window_pattern": ""}, "use only S"),
    ({"dropout": 1.0}, "model.dropout is 1.0"),
    ({"norm": "batchnorm"}, "use one of layernorm, rmsnorm"),
    ({"mlp": "relu"}, "use one of gelu"),
    ({"embedding": "unit"}, "use one of plain, scaled, normed"),
    ({"n_layer": 0}, "model.n_layer is 0"),
    ({"mlp_hidden": 0}, "model.mlp_hidden is 0"),
    ({"rope_base": 0.0}, "model.rope_base"),
    ({"rope_scaling": "linear"}, "set model.position to rope"),
    ({"rope_scaling": "yarn", "position": "rope"}, "model.rope_scaling"),
    ({"rope_scaling": "linear", "position": "rope", "rope_factor": 0.5}, "model.rope_factor"),
    ({"rope_scaling": "llama3", "position": "rope", "rope_low_factor": 4.0}, "model.rope_low_factor"),
    ({"rope_scaling": "llama3", "position": "rope", "rope_original_length": 0}, "model.rope_original_length"),
    ({"norm_eps": 0.0}, "model.norm_eps"),
    ({"value_embeddings": 7}, "model.value_embeddings is 7: use 0 to 6, half of model.n_layer"),
    ({"logit_softcap": 0.0}, "model.logit_softcap is 0.0"),
    ({"norm_eps": float("nan")}, "model.norm_eps is nan"),
    ({"rope_base": float("inf")}, "model.rope_base is inf"),
    # each was counted up to for minutes, or for ever
    ({"n_embd": 10**12}, "model.n_embd is 1000000000000: use less than 2,147,483,648"),
    ({"n_head": 2**31 - 1}, "not a multiple of model.n_head 2147483647: use 768 heads"),
    ({"n_embd": 2**31 - 1}, "of model.n_head 12: use 1 heads"),
    ({"window": 2**63}, "model.window is 9223372036854775808"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=str)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        ModelConfig(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_presets_are_found_by_name_and_an_unknown_one_lists_them():
    assert preset_config("gpt2-124m") == ModelConfig()
    with pytest.raises(ValueError, match=r"gpt2-124m.*llama-1p3b"):
        preset_config("gpt2-125m")


def test_sizes_inside_follow_from_the_options():
    config = PRESETS["llama-355m"]
    assert (config.padded_vocab_size, config.hidden_size, config.head_size) == (50304, 2752, 64)
    assert ModelConfig(mlp_hidden=100).hidden_size == 100
    assert ModelConfig(attention="differential").score_size == 32


def test_a_pattern_repeats_over_the_layers():
    config = ModelConfig(n_layer=6, window=256, window_pattern="SSSL")
    assert config.windows == (256, 256, 256, None, 256, 256)
    assert ModelConfig(n_layer=2, window=9).windows == (9, 9)
    assert set(ModelConfig().windows) == {None}


def test_a_table_of_values_serves_one_of_the_first_layers_and_one_of_the_last():
    config = ModelConfig(n_layer=7, value_embeddings=3, value_residual=True)
    assert [config.value_table(layer) for layer in range(7)] == [0, 1, 2, None, 0, 1, 2]
    assert [config.other_values(layer) for layer in range(7)] == [1, 2, 2, 1, 2, 2, 2]
    assert [ModelConfig(n_layer=4, value_embeddings=2).value_table(layer) for layer in range(4)] == [0, 1, 0, 1]


def test_a_configuration_survives_json_like_storage():
    config = ModelConfig(n_kv_head=3, window=64, window_pattern="SL")
    assert ModelConfig(**dataclasses.asdict(config)) == config
