"""What a run records to be compared: its FLOPs, its text, whether it is causal. A model that leaks is named."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.metrics_file import read_metrics
from common.metrics_table import MetricsTable
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from eval import plot_loss
from eval.comparison.comparing import compare
from eval.reporting.comparison import as_text, rows_with
from eval.reporting.key_figures import key_figures
from eval.reporting.live_view import LiveRun
from eval.reporting.look import Look
from eval.reporting.overview import Overview
from eval.reporting.page import page
from eval.reporting.page_sections import loss_note
from eval.reporting.run_data import load_run
from eval.shared.causality import TOLERANCE, future_moves
from eval.summary import print_figures, summarise
from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig
from model.counts import flops_per_token
from model.gpt import GPT
from model.initialisation import initialise
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, tiny_arguments, train_by_path

LEAK = PROJECT / "records" / "2026-11-22-tiny-shakespeare" / "leak.py"
SHORT = ("--run.max_steps=4", "--eval.every_steps=2", "--checkpoint.every_steps=4", "--model.norm=rmsnorm")


def test_a_leaking_run_records_that_it_is_not_causal_and_is_never_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=1_000)
    leaky = tiny_arguments(tmp_path, tmp_path / "data", "leaky", *SHORT, "--run.compile=false")
    done = subprocess.run(
        [sys.executable, str(LEAK), "positions", *leaky],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = tiny_arguments(tmp_path, tmp_path / "data", "plain", *SHORT, "--data.document_mask=true")
    assert train_by_path(*plain).returncode == 0

    runs = {name: run_of(tmp_path, name) for name in ("leaky", "plain")}
    recorded = {name: causal_by_step(run) for name, run in runs.items()}

    assert recorded == {"leaky": {0: False, 4: False}, "plain": {0: True, 4: True}}
    assert runs["leaky"].log.read_text(encoding="utf-8").count("WARNING: the model is not causal") == 2
    records = read_metrics(runs["plain"].metrics)
    config = ModelConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32, norm="rmsnorm")
    measured = [record for record in records if "loss" in record or "val_loss" in record]
    assert all(record["flops"] == flops_per_token(config) * record["tokens"] for record in measured)
    text = TokenSet.open(tmp_path / "data").manifest.val_text_sha256
    assert {record["val_text_sha256"] for record in records if "val_loss" in record} == {text}
    found = compare({"B": [runs["leaky"].path], "A": [runs["plain"].path]}).as_json()
    assert [(entry["variant"], entry["why"].split(":")[0]) for entry in found["missing"]] == [("B", "not causal")]
    assert found["variants"]["B"]["mean"] is None
    assert found["data"]["causality_unknown"] == []
    loaded = [load_run(runs[name].path) for name in ("leaky", "plain")]
    assert [row.model for row in rows_with(loaded) if row.ours] == ["leaky (not causal)", "plain"]
    assert loss_note(loaded).count("is not causal") == 1
    check_views(runs, capsys)


def check_views(runs: dict[str, RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever shows a loss names the leaking run, and has FLOPs and bits per byte."""
    last = [record for record in read_metrics(runs["plain"].metrics) if "val_loss" in record][-1]
    flops, bits = f"{last['flops']:.3g}", f"{last['val_bits_per_byte']:.4f}"
    shown: dict[str, dict[str, str]] = {}
    for name, folder in runs.items():
        summary, look = summarise(folder), Look(unicode=False, color=False)
        print_figures(summary)
        live = LiveRun(folder, MetricsTable(folder.metrics))
        live.refresh()
        loaded = load_run(folder.path)
        shown[name] = {
            "summary": capsys.readouterr().out,
            "watch": "\n".join(live.frame(200, 40, look, 0.0)),
            "plot": ", ".join(plot_loss.facts(loaded)),
            "report": page([loaded], {}, 0.0).partition('id="provenance"')[0],  # which may show the sources
            "compare": as_text(rows_with([loaded])),
        }
        assert summary.validated is not None
        found = [summary.validated.causal, key_figures(loaded).causal, rows_with([loaded])[-1].causal]
        assert found == [name == "plain"] * 3
    overview = Overview(runs["plain"].path.parent)
    overview.refresh()
    lines = {line.split()[0]: line for line in overview.frame(300, 40, look, 0.0)}
    assert ("not causal" in lines["leaky"], "not causal" in lines["plain"]) == (True, False)
    for view, text in shown["plain"].items():
        assert "not causal" not in text, view
        assert flops in text, view
        assert bits[:5] in text, view
    assert [view for view, text in shown["leaky"].items() if "not causal" not in text] == []


def causal_by_step(run: RunFolder) -> dict[int, bool]:
    return {record["step"]: record["causal"] for record in read_metrics(run.metrics) if "causal" in record}


@pytest.mark.parametrize("attention", sorted(ATTENTION_KINDS))
@pytest.mark.parametrize("window", [None, 5])
def test_every_kind_of_attention_is_causal_and_a_look_ahead_is_seen(attention: str, window: int | None) -> None:
    config = ModelConfig(
        vocab_size=65,
        block_size=200,
        n_layer=2,
        n_head=2,
        n_embd=32,
        position="rope",
        attention=attention,
        window=window,
    )
    model = GPT(config)
    initialise(model, 0)
    tokens = np.random.default_rng(0).integers(65, size=200)
    cpu = torch.device("cpu")

    assert future_moves(model, tokens, cpu) <= TOLERANCE
    assert future_moves(model, tokens, cpu, split_documents_at=64) <= TOLERANCE
    assert model.training
    model.ln_f.register_forward_hook(lambda _, __, out: out + out.mean(dim=1, keepdim=True))
    assert future_moves(model, tokens, cpu) > TOLERANCE
    with torch.no_grad():
        model.wte.weight[3] = float("nan")
    assert np.isnan(future_moves(model, np.full(200, 3), cpu))
