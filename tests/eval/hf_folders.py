"""Folders with models as `transformers` and the hub have them, and what an import of them gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from data_prep.tokenization.loading import load_tokenizer
from eval import import_hf
from eval.hugging_face.tokenizer_files import write_tokenizer_files
from eval.shared.loading import load_checkpoint
from tests.helpers.hf_tokenizers import tokenizer_json
from tests.helpers.training import PROJECT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def call(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    assert script.main() == 0


def run_by_path(script: object, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / str(script)), *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(UserError) as error:
        import_hf.main()
    assert "\n" not in str(error.value)
    return str(error.value)


def gpt2_folder(folder: Path, *, layers: int = 1, heads: int = 2, rows: int = 50257) -> Any:
    """OpenAI's layout as the hub has it: no prefix, masks as buffers, vocab.json and merges.txt; the model in it."""
    config = transformers.GPT2Config(n_embd=2 * heads, n_layer=layers, n_head=heads, n_positions=12, vocab_size=rows)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    tensors = {name.removeprefix("transformer."): value.clone() for name, value in theirs.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(layers):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own = {name: getattr(config, name) for name in ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")}
    short = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 12, **own}
    short |= {"bos_token_id": 50256, "eos_token_id": 50256, "task_specific_params": {}}
    (folder / "config.json").write_text(json.dumps(short))
    scratch = folder.with_name(folder.name + "-tokenizer")
    scratch.mkdir()
    write_tokenizer_files(load_tokenizer("gpt2"), scratch, 12)
    for name in ("vocab.json", "merges.txt"):
        (scratch / name).rename(folder / name)
    return theirs


def check_equal(checkpoint: Path, theirs: Any, vocab_size: int = 50257) -> None:
    model = load_checkpoint(checkpoint).model
    tokens = torch.randint(0, vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = model(tokens)[..., :vocab_size], theirs(tokens).logits[..., :vocab_size]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def llama_folder(folder: Path, **ids: int) -> Any:
    """A Llama with a byte-level tokenizer of its own; the model."""
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|other|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(["the theory of the thing there"] * 9, trainer)
    count = built.get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=count + 3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=24, **{"bos_token_id": 0, "eos_token_id": 0, **ids},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    built.save(str(folder / "tokenizer.json"))
    return model, count


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


def two_id_folder(folder: Path, kind: str, *, template: bool = True, block_size: int = 60, **values: Any) -> Any:
    """A Llama whose texts begin with <s> and end with </s>, with a tokenizer of this kind; the model."""
    text = tokenizer_json(kind, begins_with=0 if template else None)
    built = tokenizers.Tokenizer.from_str(text)
    begin, end = built.token_to_id("<s>"), built.token_to_id("</s>")
    config = transformers.LlamaConfig(
        vocab_size=built.get_vocab_size(), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=block_size,
        **{"rope_parameters": LLAMA3_ROPE, "bos_token_id": begin, "eos_token_id": end} | values,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model
