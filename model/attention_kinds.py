"""The kinds of attention, in one place: for each name the class, and what it means in closed form; without torch.

A new kind is a class of its own (see `model.differential`) and an entry here. A start compares these counts with the
model that is built (`model.counts.check_parameters`); tests/model/test_attention_kinds.py adds one from outside.

C width, H heads, K key/value heads, D head size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol


class Sizes(Protocol):
    """What of a `model.config.ModelConfig`, which asks here itself, the closed forms read."""

    @property
    def n_embd(self) -> int: ...  # C

    @property
    def n_head(self) -> int: ...  # H

    @property
    def kv_heads(self) -> int: ...  # K

    @property
    def head_size(self) -> int: ...  # D

    @property
    def bias(self) -> bool: ...

    @property
    def qk_norm(self) -> bool: ...

    @property
    def norm_weights(self) -> bool: ...

    @property
    def position(self) -> str: ...


@dataclass(frozen=True)
class AttentionKind:
    """A class and its closed forms, which are softmax attention's unless another kind overrides them.

    Attributes:
        module, name: where the class is and what it is called; it is imported for the first model of its kind.
        deviations: by a parameter's last name the standard deviation of its first values, where the common rules
            (`model.initialisation`) are not meant for it.
    """

    module: str
    name: str
    deviations: Mapping[str, float] = field(default_factory=dict)

    def implementation(self) -> Any:
        """The class: made from (configuration, layer), it has the methods of `model.attention.Attention`."""
        return getattr(import_module(self.module), self.name)

    def why_not(self, config: Sizes) -> str:
        """What this kind can't work with in a configuration, in words; "" where it can."""
        return ""

    def score_size(self, config: Sizes) -> int:
        """Features in one query-key product."""
        return config.head_size

    def maps(self, config: Sizes) -> int:
        """Attention maps of a layer, each of which is multiplied with values: H."""
        return config.n_head

    def shapes(self, config: Sizes) -> dict[str, tuple[int, ...]]:
        """The parameters of one layer's attention by name, those of matrices as (out, in)."""
        width, stacked = config.n_embd, sum(self.matrices(config)["c_attn.weight"])
        shapes: dict[str, tuple[int, ...]] = {"c_attn.weight": (stacked, width), "c_proj.weight": (width, width)}
        if config.bias:
            shapes |= {"c_attn.bias": (stacked,), "c_proj.bias": (width,)}
        if config.qk_norm and config.norm_weights:
            shapes |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), (self.score_size(config),))
        return shapes

    def matrices(self, config: Sizes) -> dict[str, tuple[int, ...]]:
        """Those of `shapes` whose role is matrix (`model.roles`), with the heights of what is stacked in each."""
        keys_or_values = config.kv_heads * config.head_size
        return {
            "c_attn.weight": (config.n_head * config.head_size, keys_or_values, keys_or_values),
            "c_proj.weight": (),
        }

    def parameters(self, config: Sizes) -> int:
        """Number of parameters of one layer's attention."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())

    def products_per_key(self, config: Sizes) -> int:
        """Multiplications and additions of a query with one key it may see, and with that key's value: 2 H (D + D)."""
        return 2 * (config.n_head + self.maps(config)) * config.head_size

    def kept_per_token(self, config: Sizes, *, in_blocks: bool) -> int:
        """Elements that a layer keeps per token for its backward, in the dtype of matrix products.

        Args:
            in_blocks: a window is attended block by block.
        """
        width, values = config.n_embd, config.kv_heads * config.head_size
        kept = width + 2 * values + width  # q, k, v and what c_proj takes
        if config.position == "rope" or config.qk_norm:
            kept += width + values  # queries and keys as the product takes them, beside the projected ones
        return kept + (width + 2 * values if in_blocks else 0)  # block by block each key and value is held twice


class DifferentialKind(AttentionKind):
    """Heads are compared by halves and have two maps each."""

    def why_not(self, config: Sizes) -> str:
        if config.head_size % 2 == 0:
            return ""
        return f"the head size n_embd/n_head is {config.head_size}, and differential attention halves it: make it even"

    def score_size(self, config: Sizes) -> int:
        return config.head_size // 2

    def maps(self, config: Sizes) -> int:
        return 2 * config.n_head

    def shapes(self, config: Sizes) -> dict[str, tuple[int, ...]]:
        vectors = (2, self.score_size(config))
        own: dict[str, tuple[int, ...]] = {"lambda_q": vectors, "lambda_k": vectors}
        if config.norm_weights:
            own["head_norm.weight"] = (config.head_size,)
        return super().shapes(config) | own

    def kept_per_token(self, config: Sizes, *, in_blocks: bool) -> int:
        own = 5 * config.n_embd  # queries twice, both results, and their difference
        return super().kept_per_token(config, in_blocks=in_blocks) + own


ATTENTION_KINDS: dict[str, AttentionKind] = {
    "softmax": AttentionKind("model.attention", "Attention"),
    "differential": DifferentialKind(
        "model.differential",
        "DifferentialAttention",
        {"lambda_q": 0.1, "lambda_k": 0.1},  # Ye et al. 2024
    ),
}
