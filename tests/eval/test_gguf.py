"""GGUF files, read back by the package `gguf` and, where its Python wheel is installed, run by llama.cpp itself."""

import re
import sys
from typing import Any

import pytest
import torch

from common.errors import UserError
from eval import export_gguf
from eval.hugging_face import gguf_export
from eval.hugging_face.clients import CLIENTS, CTRANSLATE2, LLAMA_CPP, MLX, ONNX, OPTIMUM, OPTIONS, losses, table
from eval.hugging_face.hf_config import MODEL_TYPES
from eval.shared.loading import load_checkpoint
from model.number_formats import Dtype
from model.precision import TORCH_DTYPES
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hf_folders import call
from tests.helpers.training import PROJECT
from tests.model.small import small_config

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"bias": False},
    "starcoder2": {"position": "rope", "n_kv_head": 2, "tie_weights": False},
    "llama": LLAMA | {"bias": True, "n_kv_head": 2},
    "llama3": LLAMA | {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 32},
    "linear": LLAMA | {"rope_scaling": "linear", "rope_factor": 4.0},
    "qwen3": LLAMA | {"n_kv_head": 2, "qk_norm": True},
    "plain": LLAMA | {"norm_weights": False, "embedding": "scaled"},
}
SIZE: dict[str, Any] = {"tokenizer": "gpt2-8k", "block_size": 64, "n_embd": 64, "noise": 0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_and_run_by_llama_cpp(kind, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint, out = write_checkpoint(tmp_path, **SIZE, **KINDS[kind]), tmp_path / "out.gguf"
    dtype: Dtype = {"gpt2": "bf16", "llama": "fp16"}.get(kind, "fp32")  # type: ignore[assignment]
    call(export_gguf, monkeypatch, checkpoint, out, "--dtype", dtype)
    table = (4 if dtype == "fp32" else 2) * 64 * 8193 * (2 if kind in ("starcoder2", "plain") else 1)
    assert table < out.stat().st_size < table + 2_000_000
    assert not list(tmp_path.glob("*.tmp"))

    llama = pytest.importorskip("xllamacpp", reason="llama.cpp's Python wheel is not installed")
    loaded, prompt = load_checkpoint(checkpoint), "The quick brown fox, naïve café: 12,345\n  x"
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(TORCH_DTYPES[dtype]).float()
    parameters = llama.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup, parameters.verbosity = str(out), 64, False, -1
    asked = {"prompt": prompt, "max_tokens": 1, "logprobs": 50, "temperature": 0.0}
    answer = llama.Server(parameters).handle_completions(asked)
    ids = loaded.tokenizer.prompt(prompt)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    with torch.no_grad():
        ours = loaded.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    theirs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert max(abs(its["logprob"] - float(ours[its["id"]])) for its in theirs) < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (LLAMA | {"window": 8}, "ignores windows"),
        (LLAMA | {"qk_norm": True, "window": 8, "window_pattern": "SL"}, "ignores windows"),
        ({"mlp": "gelu_exact"}, "tanh form of GELU"),
        ({"qk_norm": True}, "QK-norm"),
        ({"tokenizer": "byte"}, "tokenizer (byte)"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_lose_is_refused_by_name(options, words, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint = write_checkpoint(tmp_path, **SIZE | options)
    monkeypatch.setattr(sys, "argv", ["export", str(checkpoint), str(tmp_path / "out.gguf")])
    with pytest.raises(UserError, match=re.escape(words)):
        export_gguf.main()
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_file_that_reads_back_differently_is_not_published(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint, out = write_checkpoint(tmp_path, **SIZE, **LLAMA), tmp_path / "out.gguf"
    honest = gguf_export.to_gguf
    monkeypatch.setattr(gguf_export, "_interleaved", lambda rows, heads: rows)  # as for another kind of rotation
    monkeypatch.setattr(sys, "argv", ["export", str(checkpoint), str(out)])
    with pytest.raises(UserError, match=r"attn\.c_attn\.weight reads back differently"):
        export_gguf.main()
    assert gguf_export.to_gguf is honest and not list(tmp_path.glob("*.gguf*"))


def test_the_pages_table_is_the_codes_and_covers_every_class() -> None:
    assert table() in (PROJECT / "docs" / "generation.md").read_text(encoding="utf-8")
    assert set(OPTIONS) == set(MODEL_TYPES)
    assert all(any(character.isdigit() for character in client.version) for client in CLIENTS)


def test_losses_are_those_of_a_model_and_no_others() -> None:
    window = small_config(**LLAMA, window=8, n_kv_head=2)
    assert all(losses(window, client) == ["ignores windows"] for client in (LLAMA_CPP, MLX, CTRANSLATE2))
    wide = small_config(**LLAMA, window=160, block_size=160)
    assert not any(losses(wide, client) for client in CLIENTS)  # it never cuts anything off
    starcoder2 = small_config(position="rope")
    assert losses(starcoder2, CTRANSLATE2) == losses(starcoder2, OPTIMUM) == ["doesn't have this class"]
    assert not losses(starcoder2, ONNX)
    assert losses(small_config(tie_weights=False), MLX) == ["can't load a GPT-2 with a head of its own"]
