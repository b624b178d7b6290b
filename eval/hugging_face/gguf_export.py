"""A checkpoint as a GGUF file for llama.cpp, read back before it is published.

C width, H heads, K key/value heads, D head size.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.publish import TEMPORARY_SUFFIX, fsync_file, fsync_folder
from data_prep.tokenization.tokenizer import Tokenizer
from eval.hugging_face.clients import LLAMA_CPP, losses
from eval.hugging_face.export import load_plain, round_weights
from eval.hugging_face.hf_config import GPT2, LLAMA, MISTRAL, QWEN3, STARCODER2, home_of
from eval.hugging_face.tokenizer_files import write_tokenizer_files
from eval.shared.loading import Loaded
from model.config import ModelConfig
from model.number_formats import Dtype
from model.positions import rotary_frequencies

ARCHITECTURES = {GPT2: "gpt2", STARCODER2: "starcoder2", LLAMA: "llama", MISTRAL: "llama", QWEN3: "qwen3"}
KINDS: Mapping[Dtype, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # names of GGMLQuantizationType
FILE_TYPES: Mapping[Dtype, str] = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
LAYER = {  # our names in a block to theirs
    "ln_1": "attn_norm", "attn.c_proj": "attn_output", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_gate": "ffn_gate", "mlp.c_proj": "ffn_down",
}  # fmt: skip
TABLES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
NORMAL, CONTROL = 1, 3  # kinds of tokens


def export_gguf(run: Path, out: Path, dtype: Dtype) -> dict[str, Any]:
    """Publish a run's newest good checkpoint, or this one, as the file `out`; return the figures as JSON has them.

    Raises UserError where there is none, llama.cpp would compute something else, or what is read back differs.
    """
    loaded = load_plain(run)
    config = loaded.model.config
    home = home_of(config)
    if lost := losses(config, LLAMA_CPP):
        raise UserError(f"llama.cpp {', '.join(lost)}: this model can't be exported as GGUF")
    if loaded.tokenizer.spec["kind"] not in ("gpt2", "gpt2-8k"):
        raise UserError(
            f"llama.cpp has no name for this model's tokenizer ({loaded.tokenizer.spec['kind']}), only for GPT-2's: "
            "export it with eval/export_hf.py"
        )
    round_weights(loaded.model, dtype)
    temporary = out.with_name(f".{out.name}{TEMPORARY_SUFFIX}")
    try:
        tensors, tokens = to_gguf(loaded), vocabulary(loaded.tokenizer)
        write(temporary, loaded, tensors, tokens, dtype)
        read_back(temporary, loaded, tokens)
        fsync_file(temporary)
        os.replace(temporary, out)
        fsync_folder(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
    size = out.stat().st_size
    print(f"{out}: {ARCHITECTURES[home]} for llama.cpp, {size / 2**20:,.1f} MiB, weights and tokens read back equal")
    return {**loaded.facts, "architecture": ARCHITECTURES[home], "dtype": dtype, "bytes": size}


def to_gguf(loaded: Loaded) -> dict[str, Tensor]:
    """Tensors by llama.cpp's names, (out, in); biases that its classes demand are zeros."""
    config = loaded.model.config
    ours = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        if name in ("wte.weight", "lm_head.weight"):
            value = value[: config.vocab_size]
        theirs |= _named(config, name, value)
        plain = name.removesuffix(".weight")
        in_layers = plain != name and plain not in ("wte", "wpe", "lm_head")
        if in_layers and config.norm == "layernorm" and not config.bias:
            theirs |= _named(config, f"{plain}.bias", value.new_zeros(len(value)))
    if config.rope_scaling == "llama3":  # what each frequency is divided by: (D/2)
        plain_rope = {"rope_scaling": "none"}
        unscaled = rotary_frequencies(ModelConfig(**{**vars(config), **plain_rope}), torch.device("cpu"))
        theirs["rope_freqs.weight"] = unscaled / rotary_frequencies(config, torch.device("cpu"))
    return theirs


def _named(config: ModelConfig, name: str, value: Tensor) -> dict[str, Tensor]:
    """One of our tensors under their names; queries, keys and values apart where they have them so."""
    path, _, kind = name.rpartition(".")
    if not path.startswith("h."):
        return {f"{TABLES[path]}.{kind}": value}
    _, layer, part = path.split(".", 2)
    if part != "attn.c_attn":
        return {f"blk.{layer}.{LAYER[part]}.{kind}": value}
    if home_of(config) == GPT2:
        return {f"blk.{layer}.attn_qkv.{kind}": value}
    heads = (config.n_head, config.kv_heads, config.kv_heads)
    q, k, v = value.split([count * config.head_size for count in heads])
    if ARCHITECTURES[home_of(config)] == "llama":
        q, k = _interleaved(q, config.n_head), _interleaved(k, config.kv_heads)
    return {f"blk.{layer}.attn_{part}.{kind}": its for part, its in zip("qkv", (q, k, v), strict=True)}


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (H·D, …) as llama.cpp's rotary positions of Llama pair them: i and i + 1, not i + D/2."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `_interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens by id, and the merges."""
    with tempfile.TemporaryDirectory(prefix="longhaul-gguf-") as folder:
        write_tokenizer_files(tokenizer, Path(folder), 1)
        ids: dict[str, int] = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
        merges = (Path(folder) / "merges.txt").read_text(encoding="utf-8").split("\n")
    return sorted(ids, key=ids.__getitem__), [line for line in merges if line and not line.startswith("#version")]


def write(
    path: Path, loaded: Loaded, tensors: Mapping[str, Tensor], tokens: tuple[list[str], list[str]], dtype: Dtype
) -> None:
    """The file: matrices in `dtype`, vectors in float32, as llama.cpp's own converter writes them."""
    import gguf

    config = loaded.model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[home_of(config)])
    writer.add_name("Longhaul")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.position == "rope":
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(config.rope_base)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    _write_tokenizer(writer, loaded.tokenizer, tokens)
    kinds = gguf.GGMLQuantizationType
    for name, tensor in tensors.items():
        kind = kinds[KINDS[dtype]] if tensor.dim() > 1 else kinds.F32
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, tokens: tuple[list[str], list[str]]) -> None:
    names, merges = tokens
    end = tokenizer.end_of_text_id
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([CONTROL if number == end else NORMAL for number in range(len(names))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.begin_of_text_id)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)  # as our prompts start


@torch.no_grad()
def read_back(path: Path, loaded: Loaded, tokens: tuple[list[str], list[str]]) -> None:
    """Raises UserError where the file doesn't hold the model's weights, its sizes and its tokens."""
    import gguf

    reader, config = gguf.GGUFReader(path), loaded.model.config
    found = {its.name: torch.from_numpy(_values(gguf, its)) for its in reader.tensors}
    for name, parameter in loaded.model.named_parameters():
        wanted = parameter[: config.vocab_size] if name in ("wte.weight", "lm_head.weight") else parameter
        if not torch.equal(_ours(config, name, found), wanted):
            raise UserError(f"{name} reads back differently from the GGUF file: it was not published")
    arch = ARCHITECTURES[home_of(config)]
    stated = {
        "general.architecture": arch,
        f"{arch}.context_length": config.block_size,
        f"{arch}.block_count": config.n_layer,
        f"{arch}.attention.head_count": config.n_head,
        f"{arch}.attention.head_count_kv": config.kv_heads,
        "tokenizer.ggml.tokens": tokens[0],
        "tokenizer.ggml.merges": tokens[1],
        "tokenizer.ggml.bos_token_id": loaded.tokenizer.begin_of_text_id,
        "tokenizer.ggml.add_bos_token": True,
    }
    for key, value in stated.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            raise UserError(f"{key} reads back differently from the GGUF file: it was not published")


def _values(gguf: Any, tensor: Any) -> "np.ndarray[Any, Any]":
    """The numbers of a tensor as float32, in its shape (out, in)."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return np.ascontiguousarray(values.reshape([int(size) for size in reversed(tensor.shape)]))


def _ours(config: ModelConfig, name: str, found: Mapping[str, Tensor]) -> Tensor:
    """Our tensor of this name out of theirs."""
    path, _, kind = name.rpartition(".")
    if not path.endswith("attn.c_attn") or home_of(config) == GPT2:
        (theirs,) = _named(config, name, torch.empty(0))
        return found[theirs]
    layer = path.split(".")[1]
    q, k, v = (found[f"blk.{layer}.attn_{part}.{kind}"] for part in "qkv")
    if ARCHITECTURES[home_of(config)] == "llama":
        q, k = _halved(q, config.n_head), _halved(k, config.kv_heads)
    return torch.cat((q, k, v))
