"""The configuration of a GPT: one frozen dataclass, and the sizes people train.

Every option names the paper it comes from. A combination that cannot work is refused here, in one line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from common.errors import UserError
from common.json_file import BadJson, as_shape
from model.attention_kinds import ATTENTION_KINDS

NormKind = Literal["layernorm", "rmsnorm"]
PositionKind = Literal["learned", "rope"]
MlpKind = Literal["gelu", "gelu_exact", "swiglu", "relu2"]
RopeScaling = Literal["none", "linear", "llama3"]
EmbeddingKind = Literal["plain", "scaled", "normed"]
if TYPE_CHECKING:
    AttentionName = str
else:
    AttentionName = Literal[tuple(ATTENTION_KINDS)]

SWIGLU_MULTIPLE = 64
MOST = 1 << 31  # of any size: beyond all that is trained, and below what a damaged file may hold


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the parts of a GPT. The defaults are GPT-2 124M.

    Attributes:
        vocab_size: ids the tokenizer produces.
        vocab_multiple: the embedding table is padded up to a multiple of this (tensor cores like multiples of 128);
            the padding never gets probability.
        block_size: longest sequence in tokens, T.
        n_layer: blocks, L.
        n_head: query heads, H.
        n_kv_head: key and value heads, K; null: as many as query heads. 1 is multi-query (Shazeer 2019,
            arXiv:1911.02150), between is grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).
        n_embd: width, C.
        norm: layernorm (Ba et al. 2016, arXiv:1607.06450) or rmsnorm (Zhang and Sennrich 2019, arXiv:1910.07467).
        norm_eps: added to the variance inside the norms.
        norm_weights: learned scales (with bias, LayerNorm's biases too) of all norms, QK-norm's included; false: norms
            only normalise (OLMo, Groeneveld et al. 2024, arXiv:2402.00838).
        embedding: what the blocks get of the token embedding: plain; scaled, times sqrt(C) (Vaswani et al. 2017,
            arXiv:1706.03762; Gemma, Gemma Team 2024, arXiv:2403.08295); or normed, by an RMSNorm without weights
            (Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt). Learned positions are added after it.
        position: learned (GPT-2) or rope (Su et al. 2021, arXiv:2104.09864).
        rope_base: RoPE's longest wavelength is about 2·pi times this.
        rope_scaling: how a model that was trained on short sequences was extended to longer ones: linear divides every
            frequency by rope_factor (Chen et al. 2023, arXiv:2306.15595); llama3 only the low ones (Llama 3.1,
            Grattafiori et al. 2024, arXiv:2407.21783). For imported models, which keep it in further training.
        rope_factor: by how much rope_scaling lengthens.
        rope_low_factor: llama3: wavelengths beyond rope_original_length over this are divided by rope_factor.
        rope_high_factor: llama3: wavelengths below rope_original_length over this stay; between, from one to the other.
        rope_original_length: llama3: the sequence length, in tokens, that the model was trained on first.
        mlp: gelu (tanh form, GPT-2), gelu_exact, swiglu (Shazeer 2020, arXiv:2002.05202) or relu2 (So et al. 2021,
            arXiv:2109.08668).
        mlp_hidden: width inside the MLP; null: 4C, for swiglu 8C/3 rounded up to a multiple of 64.
        bias: biases in linear layers and LayerNorm.
        dropout: on embeddings, attention weights and both residual branches.
        tie_weights: the head uses the token embedding (Press and Wolf 2017, arXiv:1608.05859).
        qk_norm: RMSNorm on every query and key head (Henry et al. 2020, arXiv:2010.04245; as in OLMo 2 and Qwen3).
        window: keys a query sees in a sliding-window layer, its own included (Mistral 7B, arXiv:2310.06825).
        window_pattern: S (sliding) and L (full) per layer, repeated over the depth, such as SSSL; null: all S.
        attention: softmax, or differential (Ye et al. 2024, arXiv:2410.05258).
        value_residual: every layer after the first mixes the first one's values into its own, with learned weights
            (learnable ResFormer, Zhou et al. 2024, arXiv:2410.17897).
        value_embeddings: how many tables give each token values of its own, which the first so many layers and the last
            so many mix into theirs, with learned weights; each table serves one of the first and one of the last
            (Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt, with 3); 0: none.
        logit_softcap: bound on the output layer's logits, which become cap·tanh(logit/cap), in training as in all
            evaluation (Gemma 2, Gemma Team 2024, arXiv:2408.00118, with 30); null: none.
        scalar_head: a second head that gives every token one number: the score of a reward model (Ouyang et al. 2022,
            arXiv:2203.02155, section 3.5), or a value function. It starts at 0.
    """

    vocab_size: int = 50257
    vocab_multiple: int = 128
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    norm: NormKind = "layernorm"
    norm_eps: float = 1e-5
    norm_weights: bool = True
    embedding: EmbeddingKind = "plain"
    position: PositionKind = "learned"
    rope_base: float = 10000.0
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 1.0
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    rope_original_length: int = 8192
    mlp: MlpKind = "gelu"
    mlp_hidden: int | None = None
    bias: bool = True
    dropout: float = 0.0
    tie_weights: bool = True
    qk_norm: bool = False
    window: int | None = None
    window_pattern: str | None = None
    attention: AttentionName = "softmax"
    value_residual: bool = False
    value_embeddings: int = 0
    logit_softcap: float | None = None
    scalar_head: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_attention()

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "vocab_multiple", "block_size", "n_layer", "n_head", "n_embd")
        for name in sizes:
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}: use 1 or more")
        for name in (*sizes, "n_kv_head", "mlp_hidden", "window", "rope_original_length"):
            size = getattr(self, name)
            _require(size is None or size < MOST, f"model.{name} is {size}: use less than {MOST:,}")
        _require(
            self.mlp_hidden is None or self.mlp_hidden >= 1, f"model.mlp_hidden is {self.mlp_hidden}: use 1 or more"
        )
        _require(0.0 <= self.dropout < 1.0, f"model.dropout is {self.dropout}: use at least 0 and less than 1")
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"model.{name} is {value}: use a finite number above 0")
        cap = self.logit_softcap
        _require(
            cap is None or 0 < cap < math.inf, f"model.logit_softcap is {cap}: use a finite number above 0, or null"
        )
        tables = self.value_embeddings
        _require(
            0 <= 2 * tables <= self.n_layer,
            f"model.value_embeddings is {tables}: use 0 to {self.n_layer // 2}, half of model.n_layer",
        )
        self._check_rope_scaling()
        _require_one_of("norm", self.norm, ("layernorm", "rmsnorm"))
        _require_one_of("embedding", self.embedding, ("plain", "scaled", "normed"))
        _require_one_of("position", self.position, ("learned", "rope"))
        _require_one_of("mlp", self.mlp, ("gelu", "gelu_exact", "swiglu", "relu2"))
        _require_one_of("attention", self.attention, tuple(ATTENTION_KINDS))

    def _check_rope_scaling(self) -> None:
        _require_one_of("rope_scaling", self.rope_scaling, ("none", "linear", "llama3"))
        if self.rope_scaling == "none":
            return
        _require(self.position == "rope", f"model.rope_scaling is {self.rope_scaling}: set model.position to rope, too")
        _require(1 <= self.rope_factor < math.inf, f"model.rope_factor is {self.rope_factor}: use 1 or more")
        if self.rope_scaling == "llama3":
            low, high = self.rope_low_factor, self.rope_high_factor
            _require(
                0 < low < high < math.inf,
                f"model.rope_low_factor is {low}: use more than 0 and less than model.rope_high_factor {high}",
            )
            length = self.rope_original_length
            _require(length >= 1, f"model.rope_original_length is {length}: use 1 or more")

    def _check_attention(self) -> None:
        _require(
            self.n_embd % self.n_head == 0,
            f"model.n_embd is {self.n_embd}, not a multiple of model.n_head {self.n_head}: "
            f"use {_nearest_divisor(self.n_embd, self.n_head)} heads",
        )
        _require(
            self.kv_heads >= 1 and self.n_head % self.kv_heads == 0,
            f"model.n_head is {self.n_head}, not a multiple of model.n_kv_head {self.kv_heads}: "
            f"use {_nearest_divisor(self.n_head, self.kv_heads)} key and value heads",
        )
        why_not = ATTENTION_KINDS[self.attention].why_not(self)
        _require(not why_not, why_not)
        if self.position == "rope":
            _require(
                self.score_size % 2 == 0,
                f"rope rotates pairs of features, but a head has {self.score_size} features to compare: "
                "choose n_embd and n_head so that it is even",
            )
        _require(self.window is None or self.window >= 1, f"model.window is {self.window}: use 1 or more")
        if self.window_pattern is not None:
            _require(self.window is not None, "model.window_pattern is set, but not model.window: set that, too")
            _require(
                len(self.window_pattern) >= 1 and set(self.window_pattern) <= {"S", "L"},
                f"model.window_pattern is {self.window_pattern!r}: use only S (sliding) and L (full)",
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_size(self) -> int:
        """D."""
        return self.n_embd // self.n_head

    @property
    def score_size(self) -> int:
        """Features in one query-key product: D, or D/2 where differential attention compares half heads."""
        return ATTENTION_KINDS[self.attention].score_size(self)

    @property
    def hidden_size(self) -> int:
        """Width inside the MLP."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        if self.mlp == "swiglu":
            return math.ceil(8 * self.n_embd / 3 / SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE
        return 4 * self.n_embd

    def layer_window(self, layer: int) -> int | None:
        """Keys a query of this layer sees, its own included; None: all before it."""
        if self.window is None:
            return None
        pattern = self.window_pattern or "S"
        return self.window if pattern[layer % len(pattern)] == "S" else None

    def value_table(self, layer: int) -> int | None:
        """Which table of value embeddings this layer mixes in; None: none."""
        last = layer - (self.n_layer - self.value_embeddings)
        return layer if layer < self.value_embeddings else last if last >= 0 else None

    def other_values(self, layer: int) -> int:
        """How many values this layer mixes into its own: the first layer's, a table's."""
        return int(self.value_residual and layer > 0) + int(self.value_table(layer) is not None)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`layer_window` of every layer."""
        return tuple(self.layer_window(layer) for layer in range(self.n_layer))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"model.{name} is {value!r}: use one of {', '.join(allowed)}")


def _nearest_divisor(n: int, value: int) -> int:
    """The divisor of n nearest to `value`; the smaller of two that are equally near."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return min({*small, *(n // d for d in small)}, key=lambda divisor: (abs(divisor - value), divisor))


_SIZES = {  # layers, heads, width, block size: GPT-2's (Radford et al. 2019), and GPT-3 XL's width for 1.3B
    "124m": (12, 12, 768, 1024),
    "355m": (24, 16, 1024, 1024),
    "774m": (36, 20, 1280, 1024),
    "1p3b": (24, 16, 2048, 2048),
}
_KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False},
}
PRESETS: dict[str, ModelConfig] = {
    f"{kind}-{size}": ModelConfig(n_layer=layers, n_head=heads, n_embd=width, block_size=block, **options)
    for kind, options in _KINDS.items()
    for size, (layers, heads, width, block) in _SIZES.items()
}


def preset_config(name: str) -> ModelConfig:
    """The configuration of a preset such as `gpt2-124m`.

    Raises ValueError for another name, listing the presets.
    """
    _require(name in PRESETS, f"model.preset is {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def config_from_dict(values: Mapping[str, Any], source: object = "the checkpoint") -> ModelConfig:
    """A ModelConfig as a checkpoint keeps it; a field the checkpoint is too old to know has its default.

    Raises UserError naming `source` for a field this version does not know, or an impossible value or combination.
    """
    unknown = sorted(set(values) - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise UserError(f"{source}: its model has options that this version of Longhaul does not know: {unknown[:3]}")
    try:
        return as_shape(dict(values), ModelConfig)
    except BadJson as error:
        raise UserError(f"{source}: its model is impossible: {error}") from None
