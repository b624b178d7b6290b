"""The memory estimate against the peak of real training processes. records/2026-11-28-planning has larger ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import make_conversation_set, short_tokenizer
from tests.helpers.process_memory import RETURNED, peak_bytes
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT
from train.estimates.run_memory import MMAP_THRESHOLD

COMMON = ["--run.device=cpu", "--run.max_steps=2", "--eval.tokens=1024", "--eval.prompts=[]", "--recompute.mode=none"]
# Activations are most of what the first takes, weights and their copies most of what the second does
CASES = {
    "activations": (
        1,
        ["--model.preset=llama-124m", "--model.n_embd=64", "--model.n_head=1", "--model.vocab_multiple=1024",
         "--model.block_size=128", "--batch.micro_batch=40", "--batch.tokens_per_step=5120", "--run.dtype=fp32"],
    ),
    "weights": (
        2,
        ["--model.n_layer=2", "--model.n_embd=256", "--model.n_head=4", "--model.vocab_multiple=65536",
         "--model.block_size=16", "--batch.micro_batch=2", "--batch.tokens_per_step=64", "--run.dtype=bf16",
         "--optim.kind=muon", "--optim.shard=true", "--optim.ema_half_life_tokens=100"],
    ),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux" or torch.version.cuda is not None, reason="measured with a CPU build")
@pytest.mark.parametrize("name", CASES)
def test_real_processes_take_what_is_estimated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MMAP_THRESHOLD, RETURNED[MMAP_THRESHOLD])
    ranks, options = CASES[name]
    make_token_set(tmp_path / "data", train_tokens=20_000, val_tokens=2_000)
    options = [*options, *COMMON, f"--data.path={tmp_path / 'data'}", f"--run.root={tmp_path}", f"--run.name={name}"]
    file = tmp_path / "plan.json"
    command = [sys.executable, str(PROJECT / "train" / "plan.py"), *options, "--model.vocab_size=257"]
    subprocess.run([*command, f"--gpus-per-node={ranks}", "--json", str(file)], check=True, stdout=subprocess.DEVNULL)
    planned = json.loads(file.read_text(encoding="utf-8"))
    peak = peak_bytes(ranks, options, tmp_path / "log")
    assert 0.97 * peak <= planned["memory_gib"]["total"] * 2**30 <= 1.1 * peak, (peak / 2**30, planned)
    assert planned["largest_phase"] == {"activations": "backward", "weights": "saving"}[name]


@pytest.mark.skipif(sys.platform != "linux" or torch.version.cuda is not None, reason="measured with a CPU build")
def test_a_fine_tuning_with_rows_of_new_ids_takes_what_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MMAP_THRESHOLD, RETURNED[MMAP_THRESHOLD])
    data = make_conversation_set(tmp_path / "data", count=60, val_count=10).folder
    tokenizer, shape = short_tokenizer().base.spec, {"n_embd": 512, "n_layer": 2, "n_head": 2}
    base = write_checkpoint(tmp_path / "base", tokenizer=tokenizer, block_size=64, vocab_multiple=1 << 16, **shape)
    options = [str(base), "--objective=sft", *COMMON, f"--data.path={data}", f"--run.root={tmp_path}", "--run.name=it"]
    options += ["--batch.micro_batch=2", "--batch.tokens_per_step=128", "--run.dtype=fp32"]
    file = tmp_path / "plan.json"
    command = [sys.executable, str(PROJECT / "train" / "plan.py"), *options, "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    planned = json.loads(file.read_text(encoding="utf-8"))["memory_gib"]["total"] * 2**30
    peak = peak_bytes(1, options, tmp_path / "log", entry="finetune.py")
    assert "the rows of 3 ids whole" in (tmp_path / "log").read_text()
    assert 0.97 * peak <= planned <= 1.1 * peak, (peak / 2**20, planned / 2**20)
