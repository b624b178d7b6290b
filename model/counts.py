"""How many parameters and floating-point operations a configuration has, and all parameters' shapes, in closed form;
without torch.

B batch, T sequence, C width, L layers, H heads, K key/value heads, D head size, F hidden width, V vocabulary.
"""

from typing import TYPE_CHECKING

from common.errors import UserError
from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig
from model.device_table import peak_flops
from model.lora_config import LoraConfig, part_rows

if TYPE_CHECKING:
    from model.gpt import GPT

__all__ = [
    "Shape",
    "check_parameters",
    "flops_per_token",
    "matrix_rows",
    "parameter_count",
    "parameter_shapes",
    "peak_flops",
    "trained_shapes",
]

Shape = tuple[int, ...]


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, without vocabulary padding, a tied embedding counted once."""
    tables = config.vocab_size * config.n_embd * (1 if config.tie_weights else 2)
    if config.position == "learned":
        tables += config.block_size * config.n_embd
    values = _value_table_parameters(config) + _mixing_parameters(config)
    scalar = config.n_embd if config.scalar_head else 0
    return tables + values + config.n_layer * _block_parameters(config) + _norm_parameters(config) + scalar


def check_parameters(model: "GPT", *, adapters: int | None = None) -> None:
    """Compare a model that has been built with the closed forms, on which its FLOPs, MFU and memory estimate rest.

    Args:
        adapters: how many parameters of adapters to expect; None where there are none.

    Raises UserError where they differ.
    """
    config = model.config
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * (1 if config.tie_weights else 2)
    adapted = sum(size for name, size in sizes.items() if ".lora_" in name)
    own = sum(sizes.values()) - adapted - padding
    for what, built, counted in (("", own, parameter_count(config)), (" of adapters", adapted, adapters or 0)):
        if built != counted:
            raise UserError(
                f"the model has {built:,} parameters{what}, but its closed form counts {counted:,}, so that FLOPs, "
                "MFU and the memory estimate would be wrong: bring model/counts.py (of attention: "
                "model/attention_kinds.py; of adapters: model/lora_config.py) up to date with the model"
            )


def _block_parameters(config: ModelConfig) -> int:
    attention = ATTENTION_KINDS[config.attention].parameters(config)
    return 2 * _norm_parameters(config) + attention + _mlp_parameters(config)


def _value_table_parameters(config: ModelConfig) -> int:
    return config.value_embeddings * config.vocab_size * config.kv_heads * config.head_size


def _mixing_parameters(config: ModelConfig) -> int:
    """Weights of the values that layers mix: one for each that a layer takes from elsewhere, and one for its own."""
    with_table = 2 * config.value_embeddings
    if not config.value_residual:
        return with_table * 2
    layers = config.n_layer - 1  # all but the first mix the first one's values
    return layers + with_table + layers + (1 if with_table else 0)


def _norm_parameters(config: ModelConfig) -> int:
    if not config.norm_weights:
        return 0
    return config.n_embd * (2 if config.norm == "layernorm" and config.bias else 1)


def _mlp_parameters(config: ModelConfig) -> int:
    ways_in = 2 if config.mlp == "swiglu" else 1
    into = _linear_parameters(config, config.n_embd, config.hidden_size)
    return ways_in * into + _linear_parameters(config, config.hidden_size, config.n_embd)


def _linear_parameters(config: ModelConfig, inputs: int, outputs: int) -> int:
    return inputs * outputs + (outputs if config.bias else 0)


def flops_per_token(config: ModelConfig, length: int | None = None, *, adapters: int | None = None) -> int:
    """FLOPs of forward and backward per token by PaLM's convention (Chowdhery et al. 2022, appendix B).

    6N + 12·H·D·S per layer. N holds what takes part in a matrix product once per token: a tied embedding once, the
    head but not the table where they are apart, no learned positions, no value embeddings. S is the keys a query may
    see: the full T (causality is not credited), or the window where it is shorter. Recomputed activations are not
    counted.

    Args:
        config: the model.
        length: T; None: the model's block size.
        adapters: parameters of adapters beside a frozen model, whose N weights then count 4N: no gradients are computed
            for them. None: all weights are trained.
    """
    length = config.block_size if length is None else length
    active = parameter_count(config) - _value_table_parameters(config)
    if config.position == "learned":
        active -= config.block_size * config.n_embd
    if not config.tie_weights:
        active -= config.vocab_size * config.n_embd
    keys = sum(length if window is None else min(length, window) for window in config.windows)
    products = 3 * ATTENTION_KINDS[config.attention].products_per_key(config)  # the backward costs twice the forward
    weights = 6 * active if adapters is None else 4 * active + 6 * adapters
    return weights + products * keys


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of a model by its name, a tied table once."""
    table, norm = (config.padded_vocab_size, config.n_embd), _norm_shapes(config)
    block = {f"{name}.{part}": shape for name in ("ln_1", "ln_2") for part, shape in norm.items()}
    block |= {f"attn.{name}": shape for name, shape in ATTENTION_KINDS[config.attention].shapes(config).items()}
    block |= {f"mlp.{name}": shape for name, shape in _mlp_shapes(config).items()}
    shapes: dict[str, Shape] = {"wte.weight": table}
    if config.position == "learned":
        shapes["wpe.weight"] = (config.block_size, config.n_embd)
    values = (config.vocab_size, config.kv_heads * config.head_size)
    shapes |= {f"wve.{table}.weight": values for table in range(config.value_embeddings)}
    for layer in range(config.n_layer):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
        if others := config.other_values(layer):
            shapes[f"h.{layer}.attn.value_mix"] = (1 + others,)
    shapes |= {f"ln_f.{name}": shape for name, shape in norm.items()}
    if not config.tie_weights:
        shapes["lm_head.weight"] = table
    return shapes | ({"scalar_head.weight": (1, config.n_embd)} if config.scalar_head else {})


def matrix_rows(config: ModelConfig) -> dict[str, Shape]:
    """The matrices inside the blocks by name: the heights of those that are stacked in each, () for a single one."""
    names = [name for name in _mlp_shapes(config) if name.endswith(".weight")]
    block: dict[str, Shape] = {f"mlp.{name}": () for name in names}
    block |= {f"attn.{name}": rows for name, rows in ATTENTION_KINDS[config.attention].matrices(config).items()}
    return {f"h.{layer}.{name}": rows for layer in range(config.n_layer) for name, rows in block.items()}


def trained_shapes(config: ModelConfig, adapters: LoraConfig | None = None) -> dict[str, Shape]:
    """The parameters that are trained by name: all of them, or adapters beside a frozen model."""
    shapes = parameter_shapes(config)
    if adapters is None:
        return shapes
    rows = {part: count for part, (_, count) in part_rows(config).items()}
    trained: dict[str, Shape] = {}
    if adapters.new_rows:
        tables = ("wte",) if config.tie_weights else ("wte", "lm_head")
        trained = {f"{table}.lora_rows": (adapters.new_rows, config.n_embd) for table in tables}
    if config.scalar_head:
        trained["scalar_head.lora_rows"] = (1, config.n_embd)
    for name, shape in shapes.items():
        layer, _, last = name.rpartition(".")
        if last == "weight":
            for part in adapters.parts().get(".".join(layer.split(".")[-2:]), ()):
                end = f"_{part}" if part else ""
                trained[f"{layer}.lora_a{end}"] = (adapters.rank, shape[1])
                trained[f"{layer}.lora_b{end}"] = (rows.get(part, shape[0]), adapters.rank)
    return trained


def _norm_shapes(config: ModelConfig) -> dict[str, Shape]:
    parts = ("weight", "bias") if config.norm == "layernorm" and config.bias else ("weight",)
    return dict.fromkeys(parts if config.norm_weights else (), (config.n_embd,))


def _mlp_shapes(config: ModelConfig) -> dict[str, Shape]:
    width, hidden = config.n_embd, config.hidden_size
    sides = {"c_fc": (hidden, width), "c_proj": (width, hidden)}
    if config.mlp == "swiglu":
        sides["c_gate"] = (hidden, width)
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in sides.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in sides.items() if config.bias}
