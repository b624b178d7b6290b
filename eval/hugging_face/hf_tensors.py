"""The names of a Longhaul model's tensors in Hugging Face's `transformers`, both ways. V vocabulary, C width."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from eval.hugging_face.hf_config import GPT2, LLAMA, MISTRAL, QWEN3, STARCODER2, has_bias, home_of, plain_config
from model.config import ModelConfig
from model.counts import parameter_count
from model.gpt import GPT

HEAD = "lm_head.weight"  # our name and theirs
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Module:
    """A module with a weight and perhaps a bias; theirs, concatenated, are ours.

    `flip`: theirs is stored (in, out). `biased`: theirs has a bias.
    """

    ours: str
    theirs: tuple[str, ...]
    flip: bool = False
    biased: bool = False


def modules(config: ModelConfig, home: str) -> Iterable[Module]:
    """Every module but embeddings and head."""
    if home == GPT2:
        for i in range(config.n_layer):
            for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
                yield Module(f"h.{i}.{name}", (f"transformer.h.{i}.{name}",), flip=".c_" in name, biased=True)
        yield Module("ln_f", ("transformer.ln_f",), biased=True)
        return
    norms, linears = home == STARCODER2, config.bias and home not in (MISTRAL, QWEN3)
    mlp = {"c_fc": "up_proj", "c_gate": "gate_proj", "c_proj": "down_proj"}
    if home == STARCODER2:
        mlp = {"c_fc": "c_fc", "c_proj": "c_proj"}
    for i in range(config.n_layer):
        ours, theirs = f"h.{i}", f"model.layers.{i}"
        yield Module(f"{ours}.ln_1", (f"{theirs}.input_layernorm",), biased=norms)
        queries_keys_values = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
        yield Module(f"{ours}.attn.c_attn", queries_keys_values, biased=linears)
        yield Module(f"{ours}.attn.c_proj", (f"{theirs}.self_attn.o_proj",), biased=linears)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield Module(f"{ours}.attn.{name}", (f"{theirs}.self_attn.{name}",))
        yield Module(f"{ours}.ln_2", (f"{theirs}.post_attention_layernorm",), biased=norms)
        for name, its in mlp.items():
            yield Module(f"{ours}.mlp.{name}", (f"{theirs}.mlp.{its}",), biased=linears)
    yield Module("ln_f", ("model.norm",), biased=norms)


def embeddings(config: ModelConfig, home: str) -> dict[str, str]:
    """Our names of the tables to theirs."""
    tables = {"wte.weight": "transformer.wte.weight" if home == GPT2 else "model.embed_tokens.weight"}
    if home == GPT2:
        tables["wpe.weight"] = "transformer.wpe.weight"
    if not config.tie_weights:
        tables[HEAD] = HEAD
    return tables


@torch.no_grad()
def plain_model(model: GPT) -> GPT:
    """The same model as `plain_config` has it; itself where it is plain."""
    config = plain_config(model.config)
    if config == model.config:
        return model
    ours, plain = dict(model.named_parameters()), GPT(config).eval()
    for name, parameter in plain.named_parameters():
        if name in ours:
            parameter.copy_(ours[name])
        elif name == HEAD:
            parameter.copy_(ours["wte.weight"])
        else:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
    if model.config.embedding == "scaled":
        plain.wte.weight.mul_(config.n_embd**0.5)
    elif model.config.embedding == "normed":
        plain.wte.weight.copy_(model.embedding_norm(plain.wte.weight))
    return plain


def to_tensors(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under their names, the table (V, C) cropped to the tokenizer's ids; biases we lack are zeros."""
    home = home_of(config)
    theirs = {}
    for name, its in embeddings(config, home).items():
        theirs[its] = ours[name] if name == "wpe.weight" else ours[name][: config.vocab_size]
    for module in modules(config, home):
        weight = ours[f"{module.ours}.weight"]
        sizes = _split_sizes(config, module, len(weight))
        for its, part in zip(module.theirs, weight.split(sizes), strict=True):
            theirs[f"{its}.weight"] = part.T if module.flip else part
        if module.biased:
            bias = ours.get(f"{module.ours}.bias", weight.new_zeros(len(weight)))
            for its, part in zip(module.theirs, bias.split(sizes), strict=True):
                theirs[f"{its}.bias"] = part
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def with_head_of(config: ModelConfig, theirs: Mapping[str, Tensor]) -> ModelConfig:
    """Untied where the files hold a head that differs from the embedding table: `transformers` (since 5) keeps such a
    head, whatever config.json has."""
    head, table = theirs.get(HEAD), theirs.get(embeddings(config, home_of_fields(config))["wte.weight"])
    differs = head is not None and table is not None and not torch.equal(head.float(), table.float())
    return replace(config, tie_weights=False) if differs else config


def check_tensors(config: ModelConfig, values: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> None:
    """Refuse what `transformers` would fill with random numbers or ignore.

    Args:
        config: with the vocabulary of config.json, not yet the tokenizer's.
        values: config.json with its defaults.

    Raises UserError where the sizes are another model's, and naming a tensor that isn't the configuration's or holds
    numbers that are not finite.
    """
    _check_sizes(config, theirs)
    home = home_of_fields(config)
    for name, its in embeddings(config, home).items():
        rows = len(theirs[its]) if its in theirs and theirs[its].dim() else config.vocab_size
        if name != "wpe.weight" and rows != config.vocab_size:
            raise UserError(
                f"{its} has {rows} rows, but config.json's vocab_size is {config.vocab_size}: correct the wrong one"
            )
    for module in modules(config, home):
        for its in module.theirs:
            expected, found = has_bias(values, its), f"{its}.bias" in theirs
            if expected != found:
                which = "config.json has a" if expected else "the folder has a tensor"
                lacks = "and the folder lacks it" if expected else "that config.json doesn't have"
                raise UserError(f"{which} {its}.bias, {lacks}: one of the files is another model's")
    for its, shape in _their_shapes(config, home).items():
        if its in theirs and tuple(theirs[its].shape) != shape:
            has = tuple(theirs[its].shape)
            raise UserError(f"the folder's tensor {its} has shape {has}, config.json's model {shape}: one is wrong")
    for its, tensor in theirs.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"the folder's tensor {its} holds NaN or inf: the model is damaged, download it again")


def _check_sizes(config: ModelConfig, theirs: Mapping[str, Tensor]) -> None:
    """Compare sizes before anything is made by them: even the layers' objects could be more than memory holds."""
    stored, wanted = sum(tensor.numel() for tensor in theirs.values()), parameter_count(config)
    if wanted > 2 * stored or config.n_layer > len(theirs):
        raise UserError(
            f"config.json's model has {wanted:,} parameters in {config.n_layer:,} layers, the folder's weights "
            f"{stored:,} in {len(theirs):,} tensors: one is another model's, or files are missing"
        )


def _their_shapes(config: ModelConfig, home: str) -> dict[str, tuple[int, ...]]:
    """The shapes that their tensors must have; of biases, those that may be there."""
    with torch.device("meta"):  # takes no memory
        ours = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, its in embeddings(config, home).items():
        rows, width = ours[name]
        shapes[its] = (rows if name == "wpe.weight" else config.vocab_size, width)
    for module in modules(config, home):
        rows, *others = ours[f"{module.ours}.weight"]
        for its, size in zip(module.theirs, _split_sizes(config, module, rows), strict=True):
            shape = (size, *others)
            shapes[f"{its}.weight"] = shape[::-1] if module.flip else shape
            shapes[f"{its}.bias"] = (size,)
    return shapes


def from_tensors(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names; the vocabulary's padding is zeros, as are biases that only ours have.

    Raises UserError naming a tensor that is missing or that has no place here.
    """
    home, used = home_of_fields(config), set()
    if config.tie_weights and HEAD in theirs:  # which is the table (`with_head_of`), and may replace it
        theirs = {embeddings(config, home)["wte.weight"]: theirs[HEAD]} | dict(theirs)

    def take(name: str) -> Tensor:
        used.add(name)
        if name not in theirs:
            raise UserError(f"the folder has no tensor {name}: download the missing file")
        return theirs[name].float()

    ours = {}
    for name, its in embeddings(config, home).items():
        table = take(its)
        if name != "wpe.weight":
            table = table[: config.vocab_size]  # theirs may be padded as well
            table = torch.cat((table, table.new_zeros(config.padded_vocab_size - len(table), table.shape[1])))
        ours[name] = table
    for module in modules(config, home):
        parts = [take(f"{its}.weight") for its in module.theirs]
        weight = torch.cat([part.T if module.flip else part for part in parts]).contiguous()
        ours[f"{module.ours}.weight"] = weight
        names = [f"{its}.bias" for its in module.theirs]
        used.update(names)
        norm = module.ours.rsplit(".", 1)[-1].startswith(("ln_", "q_norm", "k_norm"))
        if config.bias and not (norm and config.norm == "rmsnorm"):
            sizes = _split_sizes(config, module, len(weight))
            zeros = [weight.new_zeros(size) for size in sizes]
            biases = [take(name) if name in theirs else zero for name, zero in zip(names, zeros, strict=True)]
            ours[f"{module.ours}.bias"] = torch.cat(biases)
    spare = sorted(theirs.keys() - used - {HEAD})
    if spare:
        raise UserError(
            f"the folder's tensor {spare[0]} has no place in Longhaul's model: this model can't be imported"
        )
    return ours


def home_of_fields(config: ModelConfig) -> str:
    """The class whose tensor names an imported configuration's tensors have (Mistral's and Qwen3's are Llama's)."""
    if config.position == "learned":
        return GPT2
    return STARCODER2 if config.norm == "layernorm" else LLAMA


def _split_sizes(config: ModelConfig, module: Module, rows: int) -> list[int]:
    if len(module.theirs) == 1:
        return [rows]
    return [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
