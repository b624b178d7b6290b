"""What a Longhaul model is in Hugging Face's `transformers`: the class and its config.json, both ways.

Five classes of `transformers` hold what can be exported; the rest is refused, and the error names it. This module
needs no `transformers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, replace
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.json_file import BadJson, as_shape
from eval.hugging_face.hub_shapes import Gpt2Config, RotaryConfig
from model.config import ModelConfig

GPT2, STARCODER2, LLAMA, MISTRAL = "GPT2LMHeadModel", "Starcoder2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"
QWEN3 = "Qwen3ForCausalLM"
MODEL_TYPES = {GPT2: "gpt2", STARCODER2: "starcoder2", LLAMA: "llama", MISTRAL: "mistral", QWEN3: "qwen3"}
LAYER_TYPES = {True: "sliding_attention", False: "full_attention"}  # by whether the layer has a window
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "relu2": "relu2", "swiglu": "silu"}
UNGATED = ("gelu", "gelu_exact", "relu2")
# What export knows of every option of a model: the kinds that some class computes, and what may have any value. An
# option that is added later is refused until it is listed here.
KINDS: dict[str, tuple[Any, ...]] = {
    "attention": ("softmax",), "position": ("learned", "rope"), "norm": ("layernorm", "rmsnorm"),
    "mlp": (*UNGATED, "swiglu"), "rope_scaling": ("none", "linear", "llama3"), "qk_norm": (False, True),
}  # fmt: skip
SIZES = (
    "vocab_size", "vocab_multiple", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "norm_eps", "rope_base",
    "rope_factor", "rope_low_factor", "rope_high_factor", "rope_original_length", "mlp_hidden", "bias", "dropout",
    "tie_weights", "window", "window_pattern",
)  # fmt: skip
MLPS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {  # and other names of the same functions
    "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python_tanh": "gelu", "gelu_python": "gelu_exact", "swish": "swiglu",
}  # fmt: skip
# what a field that config.json leaves out is, by transformers' configuration classes
GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "tie_word_embeddings": True,
    "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
STARCODER2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
    "num_attention_heads": 24, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "use_bias": True, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MISTRAL_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
    "max_window_layers": 28, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
DEFAULTS = {
    GPT2: GPT2_DEFAULTS, STARCODER2: STARCODER2_DEFAULTS, LLAMA: LLAMA_DEFAULTS, MISTRAL: MISTRAL_DEFAULTS,
    QWEN3: QWEN3_DEFAULTS,
}  # fmt: skip
GPT2_OTHER_NAMES = {  # under which its configuration class takes the same fields
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
OWN_FACTS = "longhaul"  # key of config.json for what their classes have no word for
MOST_PADDING = 1 << 16  # rows of a table: what models are trained with, below what a damaged file may hold
WRITTEN_PLAIN = ("norm_weights", "embedding", "tie_weights")  # what `plain_config` changes
OWN_FIELDS = ("bias", "dropout", "vocab_multiple")


def plain_config(config: ModelConfig) -> ModelConfig:
    """The model that computes the same with options that their classes have (`hf_tensors.plain_model` has its weights).

    Norms without weights are norms whose weights are ones. A scaled or normed embedding is one of other numbers; a head
    that was tied to it becomes a table of its own.
    """
    rewritten = config.embedding in ("scaled", "normed")
    embedding = "plain" if rewritten else config.embedding
    return replace(config, norm_weights=True, embedding=embedding, tie_weights=config.tie_weights and not rewritten)


def home_of(config: ModelConfig) -> str:
    """The class of `transformers` that computes exactly this model, in its plain form.

    Raises UserError naming the option that none of them has.
    """
    for option in fields(config):  # before another is made of it, which accepts the model's own kinds only
        if option.name not in WRITTEN_PLAIN:
            _accept(_is_known(config, option), f"model.{option.name} {getattr(config, option.name)}")
    config = plain_config(config)
    _accept(config.embedding == "plain", f"model.embedding {config.embedding}")
    several, window = len(set(config.windows)) > 1, config.windows[0]
    # Qwen2 has such windows, but transformers splits its texts as Qwen does, whatever tokenizer.json has
    _accept(not several or config.qk_norm, "windows that differ between layers (model.window_pattern) without QK-norm")
    if config.position == "learned" or config.norm == "layernorm":
        beside = "learned positions" if config.position == "learned" else "LayerNorm"
        _accept(not config.qk_norm, f"QK-norm with {beside}")
    if config.position == "learned":
        _accept(config.norm == "layernorm", "learned positions with RMSNorm")
        _accept(config.mlp in UNGATED, "learned positions with SwiGLU")
        _accept(config.kv_heads == config.n_head, "learned positions with n_kv_head")
        _accept(window is None, "learned positions with a window")
        return GPT2
    if config.norm == "layernorm":
        _accept(config.mlp in UNGATED, "rotary positions with LayerNorm and SwiGLU")
        return STARCODER2
    _accept(config.mlp == "swiglu", f"rotary positions with RMSNorm and {config.mlp}")
    if config.qk_norm:
        _accept(not config.bias, "biases with QK-norm")
        return QWEN3
    _accept(window is None or not config.bias, "biases with RMSNorm, SwiGLU and a window")
    return LLAMA if window is None else MISTRAL


def _is_known(config: ModelConfig, option: Field[Any]) -> bool:
    """Whether an option has a value that some class computes; for one that no list here names, whether it is unused."""
    value = getattr(config, option.name)
    if option.name in KINDS:
        return value in KINDS[option.name]
    return option.name in SIZES or value == option.default


def _accept(known: bool, what: str) -> None:
    if not known:
        raise UserError(f"no class of transformers that Longhaul exports to has {what}: this model can't be exported")


def to_config(
    config: ModelConfig, begin: int | None, ends: Sequence[int] = (), dtype: str = "float32"
) -> dict[str, Any]:
    """The contents of `config.json`. Raises UserError for a model that no class can hold.

    Args:
        begin, ends: the ids that start and end texts, if there are any. dtype: torch's name of the weights'.
    """
    config = plain_config(config)
    home = home_of(config)
    shared: dict[str, Any] = {
        "architectures": [home],
        "model_type": MODEL_TYPES[home],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": begin,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
        "torch_dtype": dtype,
        OWN_FACTS: {name: getattr(config, name) for name in OWN_FIELDS},
    }
    if home == GPT2:
        return shared | {
            "n_positions": config.block_size,
            "n_ctx": config.block_size,  # the older name, by which llama.cpp's converter and mlx-lm still go
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.hidden_size,
            "activation_function": "gelu_new" if config.mlp == "gelu" else ACTIVATIONS[config.mlp],
            "layer_norm_epsilon": config.norm_eps,
            "attn_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
        }
    specifics: dict[str, dict[str, Any]] = {
        STARCODER2: {"norm_epsilon": config.norm_eps, "use_bias": config.bias, "sliding_window": config.windows[0]},
        LLAMA: {"rms_norm_eps": config.norm_eps, "attention_bias": config.bias, "mlp_bias": config.bias},
        MISTRAL: {"rms_norm_eps": config.norm_eps, "sliding_window": config.windows[0]},
        QWEN3: {"rms_norm_eps": config.norm_eps, "attention_bias": False} | _layer_windows(config),
    }
    return (
        shared
        | specifics[home]
        | {
            "max_position_embeddings": config.block_size,
            "hidden_size": config.n_embd,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "intermediate_size": config.hidden_size,
            "hidden_act": ACTIVATIONS[config.mlp],
            "attention_dropout": config.dropout,
            # the place of the base before transformers 5, and since
            "rope_theta": config.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base} | _rope_scaling(config),
        }
        | ({"rope_scaling": _rope_scaling(config)} if config.rope_scaling != "none" else {})
    )


def _layer_windows(config: ModelConfig) -> dict[str, Any]:
    """The windows of every layer, as Qwen3 has them."""
    sliding = [window is not None for window in config.windows]
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.window if any(sliding) else None,
        "layer_types": [LAYER_TYPES[slides] for slides in sliding],
        "max_window_layers": sliding.index(True) if any(sliding) else config.n_layer,  # by which some programs still go
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        scaling["low_freq_factor"] = config.rope_low_factor
        scaling["high_freq_factor"] = config.rope_high_factor
        scaling["original_max_position_embeddings"] = config.rope_original_length
    return scaling


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with its architecture named, and with the defaults of what it leaves out.

    Raises UserError for a model of another architecture, one whose weights are not plain numbers, and impossible
    values.
    """
    home = _home(values)
    if values.get("quantization_config"):
        raise UserError("config.json has a quantization_config: give the model's files that are not quantised")
    if home == GPT2:
        values = {GPT2_OTHER_NAMES.get(name, name): value for name, value in values.items()} | dict(values)
    whole = DEFAULTS[home] | dict(values) | {"architectures": [home]}
    try:
        as_shape(whole, Gpt2Config if home == GPT2 else RotaryConfig)
    except BadJson as error:
        raise UserError(f"config.json is damaged ({error}): correct it, or download the model again") from None
    return whole


def _home(values: Mapping[str, Any]) -> str:
    """The class by the model type, as in `transformers`; where `architectures` names another, one of them is wrong."""
    named = next(iter(values.get("architectures") or []), None)
    of_type = next((home for home, its_type in MODEL_TYPES.items() if its_type == values.get("model_type")), None)
    home = named or of_type or values.get("model_type")
    if home not in MODEL_TYPES or (values.get("model_type") and of_type is None):
        its = home if home not in MODEL_TYPES else f"the model type {values['model_type']}"
        raise UserError(f"{its} can't be imported: Longhaul reads {', '.join(MODEL_TYPES)}")
    if of_type not in (None, home):
        raise UserError(
            f"config.json has the model type {values['model_type']} and the architecture {home}, another one's: "
            "correct the one that is wrong"
        )
    return str(home)


def from_config(values: Mapping[str, Any], biases: Mapping[str, Tensor]) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        biases: the folder's bias tensors; a model that was exported without biases has zeros for some of them.

    Raises UserError where Longhaul has no such model.
    """
    values = with_defaults(values)
    home = values["architectures"][0]
    own = values.get(OWN_FACTS) or {}
    bias = bool(biases)
    if own.get("bias") is False and not any(bool(tensor.any()) for tensor in biases.values()):
        bias = False
    multiple = own.get("vocab_multiple", ModelConfig().vocab_multiple)
    if multiple > MOST_PADDING:
        raise UserError(f"config.json's vocab_multiple is {multiple}: use at most {MOST_PADDING:,}")
    try:
        shared = {
            "vocab_size": values["vocab_size"],
            "vocab_multiple": multiple,
            "tie_weights": values["tie_word_embeddings"],
            "bias": bias,
        }
        fields = _gpt2_fields(values) if home == GPT2 else _rotary_fields(values, home)
        fields["dropout"] = own.get("dropout", fields["dropout"])
        return ModelConfig(**shared, **fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"Longhaul has no such model: {error}") from None


def has_bias(values: Mapping[str, Any], theirs: str) -> bool:
    """Whether their module of this name has a bias, by a `config.json` with its defaults."""
    home = values["architectures"][0]
    if home == STARCODER2:
        return theirs.endswith("norm") or bool(values["use_bias"])
    if home == LLAMA:
        return bool(values["attention_bias"] if ".self_attn." in theirs else values["mlp_bias"] and ".mlp." in theirs)
    if home == QWEN3:
        return bool(values["attention_bias"]) and ".self_attn." in theirs and theirs.endswith("_proj")
    return home == GPT2


def _gpt2_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    for option, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if values.get(option, plain) is not plain:
            raise UserError(f"{option} {values[option]} can't be imported: Longhaul's attention has no such scaling")
    return {
        "block_size": values.get("n_positions") or values.get("n_ctx") or 1024,
        "n_layer": values["n_layer"],
        "n_head": values["n_head"],
        "n_embd": values["n_embd"],
        "mlp": _mlp(values.get("activation_function", "gelu_new"), gated=False),
        "mlp_hidden": values.get("n_inner") or 4 * values["n_embd"],
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "dropout": values.get("resid_pdrop", 0.1),
    }


def _rotary_fields(values: Mapping[str, Any], home: str) -> dict[str, Any]:
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (
        kind not in ("default", "linear", "llama3")
        or rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1)) != 1
    ):
        raise UserError(
            f"rotary positions of kind {kind} {rope} can't be imported: Longhaul has the plain ones, linear and llama3"
        )
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if (values.get("head_dim") or width // heads) * heads != width:
        raise UserError(f"heads of {values['head_dim']} features can't be imported: Longhaul's are hidden_size / heads")
    layernorm = home == STARCODER2
    return {
        "position": "rope",
        "norm": "layernorm" if layernorm else "rmsnorm",
        "norm_eps": values.get("norm_epsilon", 1e-5) if layernorm else values.get("rms_norm_eps", 1e-6),
        "mlp": _mlp(values.get("hidden_act", "gelu_pytorch_tanh" if layernorm else "silu"), gated=not layernorm),
        "mlp_hidden": values["intermediate_size"],
        "block_size": values["max_position_embeddings"],
        "n_layer": values["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": values.get("num_key_value_heads") or heads,
        "n_embd": width,
        "rope_base": float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        **_rope_fields(rope, kind, values),
        **_window_fields(values, home),
        "qk_norm": home == QWEN3,
        "dropout": values.get("attention_dropout", 0.0),
    }


def _window_fields(values: Mapping[str, Any], home: str) -> dict[str, Any]:
    """Raises UserError where the layers' kinds are not full and sliding attention, one for each layer."""
    if home != QWEN3:
        return {"window": None if home == LLAMA else values.get("sliding_window")}
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    layers, first = values["num_hidden_layers"], values.get("max_window_layers") or 0
    types = values.get("layer_types")
    if types is None:
        types = [LAYER_TYPES[window is not None and layer >= first] for layer in range(layers)]
    if len(types) != layers or not set(types) <= set(LAYER_TYPES.values()):
        kinds = ", ".join(sorted(set(types)))[:80]
        raise UserError(f"config.json has layer_types {kinds} for {len(types)} of {layers} layers: correct it")
    pattern = "".join("S" if kind == LAYER_TYPES[True] and window is not None else "L" for kind in types)
    if "S" not in pattern:
        return {"window": None}
    return {"window": window, "window_pattern": pattern if "L" in pattern else None}


def _rope_fields(rope: Mapping[str, Any], kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError where the scaling lacks a figure."""
    if kind == "default":
        return {}
    try:
        fields = {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
        if kind == "llama3":
            fields["rope_low_factor"] = float(rope["low_freq_factor"])
            fields["rope_high_factor"] = float(rope["high_freq_factor"])
            length = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
            fields["rope_original_length"] = values.get("original_max_position_embeddings", length)
    except KeyError as error:
        raise UserError(
            f"config.json's rotary scaling of kind {kind} lacks {error.args[0]}: add it, or download the model again"
        ) from None
    return fields


def _mlp(activation: str, *, gated: bool) -> str:
    mlp = MLPS.get(activation)
    if mlp is None or (mlp == "swiglu") != gated:
        raise UserError(f"the activation {activation} can't be imported: Longhaul has {', '.join(MLPS)}")
    return mlp
