"""Adapters as PEFT's folder, loaded by PEFT itself on the exported base."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from eval import export_hf
from eval.hugging_face.hf_config import GPT2, LLAMA, QWEN3, STARCODER2
from model.lora_config import TARGETS, LoraConfig
from model.weights import load_adapted_model
from tests.eval.checkpoints import write_adapters, write_checkpoint
from tests.eval.hf_folders import call

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed")

HOMES: dict[str, dict[str, Any]] = {
    GPT2: {"bias": False},
    STARCODER2: {"position": "rope", "n_kv_head": 2},
    LLAMA: {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": True, "n_kv_head": 2},
}
HOMES[QWEN3] = HOMES[LLAMA] | {"bias": False, "qk_norm": True, "norm_weights": False, "embedding": "scaled"}


@pytest.mark.parametrize(
    ("home", "targets"),
    [
        (GPT2, TARGETS),
        (GPT2, ("q", "v", "down")),
        (STARCODER2, ("k", "o", "up")),
        (LLAMA, TARGETS),
        (LLAMA, ("q", "k", "v", "gate")),
        (QWEN3, ("q", "v", "o", "down")),
    ],
    ids=str,
)
def test_peft_gives_our_logits_on_the_exported_base(home, targets, tmp_path, monkeypatch):
    lora = LoraConfig(rank=2, alpha=12.0, dropout=0.1, targets=targets)
    checkpoint = write_adapters(tmp_path / "run", lora, noise=0.3, **HOMES[home])
    base, out = tmp_path / "base", tmp_path / "adapter"
    call(export_hf, monkeypatch, tmp_path / "run" / "checkpoints" / "base", base)
    call(export_hf, monkeypatch, tmp_path / "run", out, "--adapter", base)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs.base_model.model).__name__ == home
    ours = load_adapted_model(checkpoint)
    tokens = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = ours(tokens)[..., :257]
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    assert not list(tmp_path.glob(".adapter*"))


def test_another_base_and_runs_without_adapters_are_refused(tmp_path, monkeypatch):
    run, plain = tmp_path / "run", write_checkpoint(tmp_path, noise=0.2, seed=3)
    write_adapters(run, LoraConfig(rank=2))

    def refusal(source: Path, base: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["export", str(source), str(tmp_path / "out"), "--adapter", str(base)])
        with pytest.raises(UserError) as error:
            export_hf.main()
        assert not list(tmp_path.glob("*out*"))
        return str(error.value)

    base = tmp_path / "base"
    assert f"export_hf.py {run / 'checkpoints' / 'base'} {base}" in refusal(run, base)
    assert "leave --adapter out" in refusal(plain, base)
    call(export_hf, monkeypatch, plain, base)
    assert "gives other logits" in refusal(run, base)
