"""What validation losses are measured on stands beside them, and none is compared with one of another measure."""

import html
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest, write_checkpoint_manifest
from common.curves import VALIDATION
from common.metrics_file import read_metrics
from common.metrics_table import MetricsTable
from common.run_folder import RunFolder
from eval.reporting.key_figures import key_figures
from eval.reporting.live_view import LiveRun, frame
from eval.reporting.look import Look
from eval.reporting.run_data import load_run
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, tiny_arguments, train

NAMES = ("val_sha256", "val_tokens", "val_block_size", "val_document_mask")
OPTIONS = (
    "--checkpoint.every_steps=2",
    "--eval.every_steps=2",
    "--checkpoint.keep_last=1",
    "--schedule.kind=constant",
    "--optim.lr=1e-5",  # it learns next to nothing: the few tokens that are easy stay the easier ones
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(PROJECT / "eval" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def set_losses(run: RunFolder, loss: float) -> None:
    """Give a run's checkpoints and records a validation loss that no other measure reaches."""
    for step, path in list_checkpoints(run.checkpoints):
        facts = read_checkpoint_manifest(path)
        del facts["manifest_sha256"]
        write_checkpoint_manifest(path, {**facts, "val_loss": loss, "val_step": step})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    changed = [{**record, "val_loss": loss} if "val_loss" in record else record for record in lines]
    run.metrics.write_text("".join(f"{json.dumps(record)}\n" for record in changed))


@pytest.mark.parametrize("older", [False, True])
def test_more_tokens_than_before_begin_a_new_measure(tmp_path: Path, data: Path, older: bool) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "run", *OPTIONS, "--eval.tokens=32", "--run.max_steps=4"))
    run = run_of(tmp_path, "run")
    set_losses(run, 0.25)
    if older:
        for _, path in list_checkpoints(run.checkpoints):
            facts = dict(read_checkpoint_manifest(path))
            write_checkpoint_manifest(path, {key: facts[key] for key in facts.keys() - {"manifest_sha256", *NAMES}})
    arguments = tiny_arguments(tmp_path, data, "run", *OPTIONS, "--eval.tokens=8192", "--run.max_steps=8")
    train(1, tmp_path, arguments)

    validations = [record for record in read_metrics(run.metrics) if "val_loss" in record]
    assert [(record["step"], record["val_tokens"]) for record in validations] == [
        (0, 32), (2, 32), (4, 32), (6, 496), (8, 496)
    ]  # fmt: skip
    known = {name for names in VALIDATION.measured_on for name in names}
    manifests = {step: dict(read_checkpoint_manifest(path)) for step, path in list_checkpoints(run.checkpoints)}
    assert set(manifests) <= {4, 6, 8} and (4 in manifests) == (4 == min(manifests))
    for record in validations[3:]:
        assert {name: record[name] for name in NAMES} == {name: manifests[8][name] for name in NAMES}
        assert set(NAMES) <= known
    was = "up to 32 tokens" if older else "32 tokens, SHA-256"
    assert f"validation losses up to the checkpoint were measured on {was}" in run.log.read_text()

    lowest = min(validations[3:], key=lambda record: record["val_loss"])
    kept = {8, lowest["step"], 4}  # 4 was resumed from: it stays while that start runs
    assert set(manifests) == kept
    train(1, tmp_path, [*arguments, "--run.max_steps=10"])  # and goes then, for all its 0.25
    assert 4 not in dict(list_checkpoints(run.checkpoints))
    assert run.log.read_text().count("were measured on") == 1

    figures = key_figures(load_run(run.path))
    assert figures.best_val_loss == min(r["val_loss"] for r in read_metrics(run.metrics) if r.get("val_tokens") == 496)
    assert (figures.val_tokens, figures.validations_left_out) == (496, 3)
    script("report.py", run.path)
    page = html.unescape((run.report / "report.html").read_text())
    assert "0.2500" not in page
    last = [record for record in read_metrics(run.metrics) if "val_loss" in record][-1]
    bits = last["val_bits_per_byte"]
    assert last["val_bytes"] < 496  # of the byte tokenizer each id is a byte, but the end of a text
    assert f"{bits:.4f}</b><span>bits per byte of text" in page
    assert f"{bits:.4f} bits per byte (" in run.log.read_text()
    assert "left out what was measured on something else (32 tokens, SHA-256" in page
    assert "step 0 to 4" in page
    assert "3 earlier validations of another measure left out" in script("plot_loss.py", run.path)
    watched = script("watch.py", run.path, "--once")
    assert "3 of another measure left out" in watched
    assert "0.2500" not in watched
    live = LiveRun(run, MetricsTable(run.metrics))
    live.refresh()
    assert f"  {bits:.4f} bits per byte" in "\n".join(
        frame(live, 200, 24, Look(unicode=True, color=False), time.time())
    )
    summary = script("summary.py", run.path)
    assert "the first 496 tokens of sha256" in summary
    assert f", {bits:.3f} bits per byte of text" in summary
    assert ", 496 tokens, 257 symbols" in script("compare.py", run.path)


def test_runs_on_different_numbers_of_tokens_are_not_compared(tmp_path: Path, data: Path) -> None:
    """The report showed two figures under one hash."""
    for name, tokens in (("few", 32), ("many", 8192)):
        train(1, tmp_path, tiny_arguments(tmp_path, data, name, f"--eval.tokens={tokens}", "--run.max_steps=1"))
    few, many = run_of(tmp_path, "few"), run_of(tmp_path, "many")
    for runs, same in (((few, many), False), ((few, few), True)):
        script("report.py", *(run.path for run in runs), "--out", tmp_path / "report")
        page = html.unescape((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
        assert ("these validation losses can't be compared" in page) != same
        assert ("few: 32 tokens, SHA-256" in page) != same
