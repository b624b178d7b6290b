"""The types of a Hugging Face folder's JSON files, for the keys that the import reads; others are kept as they are.

Types only: what the values mean, and which of them Longhaul supports, `hf_config` and `tokenizer_import` know.
"""

from typing import Any, NotRequired

from typing_extensions import TypedDict

from common.checkpoint_manifest import Name
from common.json_file import Count, Finite, Positive, keep_others


@keep_others
class OwnFacts(TypedDict):
    """What an export of Longhaul adds to its config.json."""

    bias: NotRequired[bool]
    dropout: NotRequired[Finite]
    vocab_multiple: NotRequired[Positive]


@keep_others
class HubConfig(TypedDict):
    """Any model's config.json."""

    architectures: NotRequired[list[str] | None]
    model_type: NotRequired[str | None]
    _name_or_path: NotRequired[str | None]
    longhaul: NotRequired[OwnFacts | None]


@keep_others
class Gpt2Config(TypedDict):
    """GPT-2's config.json, with the defaults of what it leaves out."""

    vocab_size: Positive
    n_embd: Positive
    n_layer: Positive
    n_head: Positive
    n_positions: NotRequired[Positive]
    n_ctx: NotRequired[Positive | None]
    n_inner: NotRequired[Count | None]
    activation_function: NotRequired[str]
    layer_norm_epsilon: NotRequired[Finite]
    resid_pdrop: NotRequired[Finite]
    tie_word_embeddings: bool


@keep_others
class Rope(TypedDict):
    rope_type: NotRequired[str | None]
    type: NotRequired[str | None]
    rope_theta: NotRequired[Finite]
    factor: NotRequired[Finite]
    low_freq_factor: NotRequired[Finite]
    high_freq_factor: NotRequired[Finite]
    original_max_position_embeddings: NotRequired[Positive]
    partial_rotary_factor: NotRequired[Finite]


@keep_others
class RotaryConfig(TypedDict):
    """The config.json of Starcoder2, Llama, Mistral and Qwen3, with the defaults of what it leaves out."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: NotRequired[Count | None]
    head_dim: NotRequired[Count | None]
    max_position_embeddings: Positive
    original_max_position_embeddings: NotRequired[Positive]
    sliding_window: NotRequired[Count | None]
    use_sliding_window: NotRequired[bool | None]
    max_window_layers: NotRequired[Count | None]
    layer_types: NotRequired[list[str] | None]
    rope_theta: NotRequired[Finite]
    rope_scaling: NotRequired[Rope | None]
    rope_parameters: NotRequired[Rope | None]
    partial_rotary_factor: NotRequired[Finite]
    norm_epsilon: NotRequired[Finite]
    rms_norm_eps: NotRequired[Finite]
    hidden_act: NotRequired[str]
    attention_dropout: NotRequired[Finite]
    attention_bias: NotRequired[bool | None]
    mlp_bias: NotRequired[bool | None]
    use_bias: NotRequired[bool | None]
    tie_word_embeddings: bool


@keep_others
class WeightIndex(TypedDict):
    """model.safetensors.index.json, pytorch_model.bin.index.json: the file of every tensor."""

    weight_map: dict[str, Name]


@keep_others
class AddedToken(TypedDict):
    content: str
    id: Count


@keep_others
class Bpe(TypedDict):
    """Models of other kinds have vocabularies of other shapes, `tokenizer_import` distinguishes them."""

    type: NotRequired[str | None]
    vocab: NotRequired[Any]
    merges: NotRequired[Any]
    dropout: NotRequired[Finite | None]


@keep_others
class SpecialToken(TypedDict):
    ids: list[Count]


@keep_others
class Step(TypedDict):
    """A step that changes a text before or after tokenization, or its tokens; or a sequence of such steps."""

    type: NotRequired[str]
    add_prefix_space: NotRequired[bool]
    normalizers: NotRequired[list["Step"]]
    pretokenizers: NotRequired[list["Step"]]
    decoders: NotRequired[list["Step"]]
    processors: NotRequired[list["Step"]]
    single: NotRequired[list[dict[str, dict[str, Any]]]]
    special_tokens: NotRequired[dict[str, SpecialToken]]


@keep_others
class TokenizerDescription(TypedDict):
    """tokenizer.json."""

    model: NotRequired[Bpe | None]
    added_tokens: NotRequired[list[AddedToken] | None]
    normalizer: NotRequired[Step | None]
    pre_tokenizer: NotRequired[Step | None]
    post_processor: NotRequired[Step | None]
    decoder: NotRequired[Step | None]


@keep_others
class NamedToken(TypedDict):
    content: str


@keep_others
class TokenizerSettings(TypedDict):
    """tokenizer_config.json."""

    tokenizer_class: NotRequired[str | None]
    bos_token: NotRequired[str | NamedToken | None]
    eos_token: NotRequired[str | NamedToken | None]
    add_prefix_space: NotRequired[bool | None]
    added_tokens_decoder: NotRequired[dict[str, NamedToken] | None]
