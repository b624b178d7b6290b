"""A checkpoint as a folder that Hugging Face's `transformers` loads with no code of ours, verified with it."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.checkpoint_manifest import has_value_function
from common.errors import UserError
from common.measured import describe_validation
from common.metrics_file import read_metrics
from common.publish import (
    TEMPORARY_SUFFIX,
    fsync_file,
    publish_folder,
    write_json_whole,
    write_whole,
)
from common.run_folder import RunFolder
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import Message
from data_prep.tokenization.tokenizer import Tokenizer
from eval.hugging_face.clients import CLIENTS, losses
from eval.hugging_face.comparing import check_logits, logits_of, probe_tokens
from eval.hugging_face.hf_config import home_of, to_config
from eval.hugging_face.hf_tensors import plain_model, to_tensors
from eval.hugging_face.tokenizer_files import write_tokenizer_files
from eval.shared.loading import Loaded, load_checkpoint
from model.counts import parameter_count
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import TORCH_DTYPES
from model.weights import write_safetensors

CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
PROBE = "The quick brown fox, naïve café: 12,345 times\n\n\tdef f(x):  return x  # 日本 😀"


def export(run: Path, out: Path, dtype: Dtype = "fp32", weights: str = "trained") -> dict[str, Any]:
    """Publish a run's newest good checkpoint, or this one, as the folder `out`; return the figures as JSON has them.

    Args:
        dtype: of the exported weights. weights: which ones, as `load_checkpoint`.

    Raises UserError where there is none, no class there can hold it, or `transformers` reads it differently.
    """
    loaded = load_plain(run, weights=weights)
    home = home_of(loaded.model.config)
    round_weights(loaded.model, dtype)
    temporary = out.with_name(f".{out.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_files(loaded, temporary, dtype)
        difference = verify(loaded, temporary)
        write_whole(temporary / "README.md", model_card(loaded, home, dtype, difference))
        publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for warning in _readers_of(loaded).values():
        print(f"note: {warning}", file=sys.stderr)
    print(f"{out}: {home}, logits equal to {difference:.1e} relative, tokenizer equal")
    return {**loaded.facts, "class": home, "relative_difference": difference}


def load_plain(run: Path, weights: str = "trained") -> Loaded:
    """`load_checkpoint` with the model in the form that other programs have, without the value function of PPO.

    Raises UserError for a model that none of their classes can hold.
    """
    loaded = load_checkpoint(run, weights=weights)
    if loaded.model.config.scalar_head and has_value_function(loaded.manifest):
        del loaded.model.scalar_head
        loaded.model.config = replace(loaded.model.config, scalar_head=False)
    home_of(loaded.model.config)
    return replace(loaded, model=plain_model(loaded.model))


@torch.no_grad()
def round_weights(model: GPT, dtype: Dtype) -> None:
    """Round weights in place to what a dtype can hold, so that an export can be compared with them.

    Raises UserError where one is too large for it.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(TORCH_DTYPES[dtype]))
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{name} has weights that {dtype} can't hold: use --dtype bf16 or fp32")


def write_files(loaded: Loaded, folder: Path, dtype: Dtype = "fp32") -> None:
    """Weights, configuration, tokenizer, and how texts start and end."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    tensors = to_tensors(config, {name: parameter.detach() for name, parameter in loaded.model.named_parameters()})
    stored = TORCH_DTYPES[dtype]
    if config.tie_weights:  # as OpenAI's own files are named, by which mlx-lm goes
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    values = to_config(config, tokenizer.begin_of_text_id, tokenizer.end_ids, str(stored).removeprefix("torch."))
    write_json_whole(folder / "config.json", values)
    ends = {name: values[name] for name in ("bos_token_id", "eos_token_id")}
    write_json_whole(folder / "generation_config.json", ends | {"pad_token_id": tokenizer.end_of_text_id})
    write_tokenizer_files(loaded.tokenizer, folder, config.block_size)
    for path in folder.iterdir():
        fsync_file(path)


@torch.no_grad()
def verify(loaded: Loaded, folder: Path) -> float:
    """Load the folder with `transformers`; return the largest difference of logits relative to the largest logit.

    Raises UserError where logits or tokens differ.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokens = probe_tokens(loaded.model.config)
    reader = f"transformers {transformers.__version__}"
    difference = check_logits(logits_of(theirs, tokens), loaded.model, tokens, reader)
    _verify_tokenizer(loaded, transformers.AutoTokenizer.from_pretrained(folder))
    return difference


def _verify_tokenizer(loaded: Loaded, theirs: Any) -> None:
    text = PROBE
    chat = loaded.tokenizer if isinstance(loaded.tokenizer, ChatTokenizer) else None
    plain_spec = (chat.base if chat else loaded.tokenizer).spec
    if plain_spec["kind"] == "char":
        text = plain_spec["symbols"]
    expected = loaded.tokenizer.encode(text).tolist()
    if plain_spec["kind"] == "huggingface":
        text = loaded.tokenizer.decode(expected)  # not all of theirs round-trip
    plain, opened = theirs.encode(text, add_special_tokens=False), theirs.encode(text)
    if plain != expected or theirs.decode(expected) != text or opened != loaded.tokenizer.prompt(text):
        raise UserError("transformers reads the exported tokenizer differently: the folder was not published")
    if chat and theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False) != (
        chat.prompt_of([Message(turn["role"], turn["content"]) for turn in CONVERSATION])
    ):
        raise UserError("transformers renders the exported chat template differently: the folder was not published")


def model_card(loaded: Loaded, home: str, dtype: Dtype, difference: float) -> str:
    """README.md of the exported folder: what the model is, how it was trained, how to load it."""
    config, manifest = loaded.model.config, loaded.manifest
    shape = f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads ({config.kv_heads} key/value)"
    rows = {
        "parameters": f"{parameter_count(config):,}",
        "shape": f"{shape}, context {config.block_size}",
        "parts": f"{config.position} positions, {config.norm}, {config.mlp}"
        + (f", window {config.window}" if config.window else ""),
        "vocabulary": f"{config.vocab_size:,} ({_name_of(loaded.tokenizer)})",
        "trained": f"{manifest['step']:,} steps, {manifest['tokens']:,} tokens",
        "weights": loaded.facts["weights"],
        "data": f"token set {manifest.get('data_identity') or 'unknown'}",
        **_validation_of(loaded),
        **_readers_of(loaded),
        "dtype of the weights": dtype,
        "verified": f"logits equal to Longhaul's with these weights within {difference:.1e} relative, in float32",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# A language model trained with Longhaul\n\n| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("PATH")  # {home}\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n'
    )


def _name_of(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, ChatTokenizer):
        return f"{_name_of(tokenizer.base)}; conversations by the chat template"
    kind: str = tokenizer.spec["kind"]
    return kind


def _readers_of(loaded: Loaded) -> dict[str, str]:
    """How other programs that read the folder treat it."""
    config = loaded.model.config
    lost = {client.name: found for client in CLIENTS if (found := losses(config, client))}
    if not lost:
        return {}
    return {"other programs": "; ".join(f"{name} {', '.join(found)}" for name, found in lost.items())}


def _validation_of(loaded: Loaded) -> dict[str, str]:
    """The validation loss of these weights at the checkpoint's step, where the run's record is at hand."""
    if "average" in loaded.manifest:
        return {}
    try:
        records = read_metrics(RunFolder(loaded.checkpoint.resolve().parents[1]).metrics)
    except OSError:  # not ours to read, or no file: the model is exported all the same
        return {}
    for record in records:
        measured = record["step"] == loaded.manifest["step"] and record.get("val_loss") is not None
        if measured and record.get("weights", "trained") == loaded.weights:
            on = f" ({described})" if (described := describe_validation(record)) else ""
            return {"validation loss": f"{record['val_loss']:.4f} nats per token{on}"}
    return {}
