"""How many parameters and floating-point operations a configuration has, in closed form.

B batch, T sequence, C width, L layers, H heads, K key/value heads, D head size, F hidden width, V vocabulary.
"""

from typing import TYPE_CHECKING

from common.errors import UserError
from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig

if TYPE_CHECKING:
    from model.gpt import GPT

# Dense bf16 (fp16 on cards without bf16) tensor peak in FLOP/s, from the makers' data sheets, without sparsity. The
# first entry whose words all occur in the device's name counts, so special cards come before their family.
_PEAK_FLOPS: list[tuple[str, float]] = [
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756.5e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("RTX 6000 ADA", 364.2e12),
    ("A6000", 154.8e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("V100S", 130e12),
    ("V100 PCIE", 112e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("MI300X", 1307.4e12),  # AMD Instinct MI300X data sheet
    # One of the two dies, which torch sees as a device of its own: AMD's data sheets have 383.0 and 362.1 for both. A
    # driver may call either "MI250X/MI250"; the larger peak never overstates the MFU.
    ("MI250X", 191.5e12),
    ("MI250", 181.05e12),
]
# Words that make another device of a name above: laptop chips of a power their makers don't state, variants with other
# numbers of units, and slices of a card (multi-instance GPU).
_OTHERS = {"LAPTOP", "TI", "SUPER", "D", "MIG"}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, without vocabulary padding, a tied embedding counted once."""
    tables = config.vocab_size * config.n_embd * (1 if config.tie_weights else 2)
    if config.position == "learned":
        tables += config.block_size * config.n_embd
    others = [config.other_values(layer) for layer in range(config.n_layer)]
    mixing = sum(1 + count for count in others if count)
    values = _value_table_parameters(config)
    return tables + values + mixing + config.n_layer * _block_parameters(config) + _norm_parameters(config)


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


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, by the name `torch.cuda.get_device_name` gives; None if unknown."""
    words = device_name.upper().replace("-", " ").replace("/", " ").split()
    if _OTHERS.intersection(words):
        return None
    for name, flops in _PEAK_FLOPS:
        if all(word in words for word in name.upper().split()):
            return flops
    return None
