"""The plot and the summary, run as a user runs them, on a run's folder written by the real writers."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from common.metrics_file import MetricsFile
from common.run_folder import RunFolder
from eval.reporting.curves import smooth
from eval.reporting.validated import unigram_entropy
from eval.summary import summarise
from tests.helpers.token_sets import make_token_set

PROJECT = Path(__file__).resolve().parents[2]
STEPS, TOKENS_PER_STEP, TOKENS_PER_SECOND = 40, 1_000, 500.0


def run_script(name: str, *arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(PROJECT / "eval" / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


def train_record(step: int, loss: float) -> dict[str, object]:
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "lr": 1e-3 * step / STEPS,
        "grad_norm": 1.0,
        "tokens_per_second": TOKENS_PER_SECOND,
        "mfu": None,
        "step_seconds": TOKENS_PER_STEP / TOKENS_PER_SECOND,
        "time": 1.7e9 + step,
    }


def write_metrics(folder: RunFolder, val_loss: float, *, first: int = 0, steps: int = STEPS) -> None:
    metrics = MetricsFile(folder.metrics)
    metrics.append({"kind": "start", "step": first, "world_size": 1, "time": 1.7e9})
    for step in range(first + 1, steps + 1):
        metrics.append(train_record(step, math.nan if step == 7 else 6.0 - step / STEPS))
        if step % 10 == 0:
            metrics.append({"step": step, "tokens": step * TOKENS_PER_STEP, "val_loss": val_loss + (steps - step) / 10})
    metrics.close()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run on a small token set, its configuration naming the set by a relative path."""
    make_token_set(tmp_path / "tokens")
    folder = RunFolder(tmp_path / "runs" / "tiny")
    folder.path.mkdir(parents=True)
    folder.config.write_text(
        yaml.safe_dump({"data": {"path": "tokens"}, "run": {"max_steps": STEPS}, "model": {"n_embd": 32}})
    )
    write_metrics(folder, 3.5)
    samples = MetricsFile(folder.samples)
    for step in (20, 40):
        samples.append({"step": step, "prompt": "Once", "text": f" upon step {step}\nthere was"})
    samples.close()
    folder.write_state("done", reason="all steps done", step=STEPS, tokens=STEPS * TOKENS_PER_STEP)
    return folder


def validation_entropy(tokens: Path) -> float:
    """The textbook sum over Python counts of the raw file's tokens."""
    counts: Counter[int] = Counter()
    for shard in sorted(tokens.glob("val-*.bin")):
        counts.update(np.fromfile(shard, dtype="<u2").tolist())
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def test_summary_reports_the_figures(run: RunFolder, tmp_path: Path) -> None:
    result = run_script("summary.py", "runs/tiny", "--json", "figures.json", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    entropy = validation_entropy(tmp_path / "tokens")
    assert figures["unigram_entropy"] == pytest.approx(entropy, abs=1e-9)
    assert figures["val_loss"] == 3.5
    assert figures["margin"] == pytest.approx(entropy - 3.5)
    assert figures["perplexity"] == pytest.approx(math.exp(3.5))
    assert figures["training_seconds"] == pytest.approx(STEPS * TOKENS_PER_STEP / TOKENS_PER_SECOND)
    assert (figures["status"], figures["step"], figures["tokens"]) == ("done", 40, 40_000)
    assert "3.500" in result.stdout
    assert f"{entropy:.3f}" in result.stdout
    assert " upon step 40\\nthere was" in result.stdout
    assert "step 20" not in result.stdout, "only the last samples are shown"


def test_summary_of_a_branch_counts_its_own_steps(run: RunFolder, tmp_path: Path) -> None:
    """Its record begins where it left the other run: the time and the tokens of those steps are not its own."""
    run.metrics.unlink()
    write_metrics(run, 3.5, first=25)

    result = run_script("summary.py", "runs/tiny", "--json", "figures.json", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["tokens"], figures["run_tokens"]) == (40_000, 15_000)
    assert figures["training_seconds"] == pytest.approx(15_000 / TOKENS_PER_SECOND)
    assert "15.0K tokens in 30.0 s" in result.stdout


def test_the_commands_that_summary_proposes_can_be_typed_where_a_path_has_spaces(
    run: RunFolder, tmp_path: Path
) -> None:
    moved = run.path.rename(tmp_path / "runs" / "my run")
    said = run_script("summary.py", moved, cwd=tmp_path).stdout
    commands = [shlex.split(line, comments=True) for line in said.splitlines() if ".venv/bin/python" in line]
    assert len(commands) == 4
    for command in commands:
        assert str(moved) in command or str(moved / "config.yaml") in command


def test_summary_of_no_run_is_one_line(tmp_path: Path) -> None:
    result = run_script("summary.py", "runs/none", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        "error: runs/none is not a run's folder: it has no metrics.jsonl\n",
    )


@pytest.mark.parametrize(("short_of_entropy", "status"), [(0.99, 1), (1.01, 0)])
def test_summary_requires_the_margin(run: RunFolder, tmp_path: Path, short_of_entropy: float, status: int) -> None:
    write_metrics(run, validation_entropy(tmp_path / "tokens") - short_of_entropy)

    result = run_script("summary.py", "runs/tiny", "--require-margin", "1.0", cwd=tmp_path)

    assert result.returncode == status, result.stdout + result.stderr
    assert ("under the required 1.0" in result.stdout) == (status == 1)


def test_a_run_that_was_stopped_need_not_have_the_margin(run: RunFolder, tmp_path: Path) -> None:
    write_metrics(run, validation_entropy(tmp_path / "tokens"))
    run.write_state("preempted", reason="SIGINT", step=30, tokens=0)

    result = run_script("summary.py", "runs/tiny", "--require-margin", "1.0", cwd=tmp_path)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "The margin is not asked for: the run was stopped before its last step" in result.stdout


def test_summary_of_a_run_that_went_astray(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of thousands of nats, whose exponential no float holds."""
    monkeypatch.chdir(tmp_path)
    write_metrics(run, 4000.0)
    assert (last := summarise(run).validated) is not None and last.perplexity == pytest.approx(math.exp(700))


def test_unigram_entropy_of_known_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_token_set(tmp_path / "tokens", val_tokens=5_000).split("val")
    whole = unigram_entropy([(stream, None, 1.0)])
    monkeypatch.setattr("eval.reporting.validated.CHUNK_TOKENS", 700)  # later chunks bring tokens the first has not

    assert whole == pytest.approx(validation_entropy(tmp_path / "tokens"), abs=1e-9)
    assert unigram_entropy([(stream, None, 1.0)]) == pytest.approx(whole, abs=1e-12)


def test_plot_of_a_run_still_going(run: RunFolder, tmp_path: Path) -> None:
    """A torn last line, a loss that was not finite, a resume: the picture is there and shows the curves."""
    run.state.unlink()
    with open(run.metrics, "ab") as file:
        file.write(json.dumps({"kind": "start", "step": 30, "time": 1.0}).encode() + b'\n{"step": 31, "lo')

    result = run_script("plot_loss.py", run.path, cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert "up to step 30" in result.stdout, "the steps after the resume's are void"
    with Image.open(run.report / "loss.png") as picture:
        picture.load()
        assert min(picture.size) >= 600
        pixels = np.asarray(picture.convert("RGB"), dtype=int)  # (height, width, 3)
    blueish = (pixels[..., 2] - pixels[..., 0]) > 60
    reddish = (pixels[..., 0] - pixels[..., 2]) > 60
    # training and validation lie across the width, not in one spot
    assert np.ptp(np.nonzero(blueish)[1]) > 0.7 * pixels.shape[1]
    assert np.ptp(np.nonzero(reddish)[1]) > 0.5 * pixels.shape[1]


def test_plot_of_one_step_without_validation(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    metrics = MetricsFile(folder.metrics)
    metrics.append(train_record(1, 5.0))
    metrics.close()

    result = run_script("plot_loss.py", tmp_path, "--out", tmp_path / "elsewhere" / "one.png", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "elsewhere" / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_can_not_be_written_is_one_line(run: RunFolder, tmp_path: Path) -> None:
    run.report.write_text("a file where the folder should be")
    result = run_script("plot_loss.py", run.path, cwd=tmp_path)
    assert result.returncode == 2
    assert "loss.png can't be written" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["plot_loss.py", "summary.py"])
def test_a_folder_that_is_no_run_is_one_line(script: str, tmp_path: Path) -> None:
    result = run_script(script, "nowhere", cwd=tmp_path)

    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_summary_before_the_first_validation_is_one_line(run: RunFolder, tmp_path: Path) -> None:
    run.metrics.unlink()
    write_metrics(run, 3.5, steps=9)

    result = run_script("summary.py", "runs/tiny", cwd=tmp_path)

    assert result.returncode == 2
    assert "validation" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_summary_without_a_configuration_is_one_line(run: RunFolder, tmp_path: Path) -> None:
    run.config.write_text("model: [1,")
    result = run_script("summary.py", "runs/tiny", cwd=tmp_path)
    assert result.returncode == 2
    assert "not a run's configuration" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_smooth_is_a_mean_that_does_not_lag() -> None:
    line = np.arange(20.0)
    line[5] = np.nan

    smoothed = smooth(line, 3)

    assert smoothed[0] == 0.0, "the first value stands alone"
    assert smoothed[10] == pytest.approx(np.mean(line[7:14]))
    assert smoothed[4] == pytest.approx(np.nanmean(line[1:8]))
    assert smoothed[19] == pytest.approx(np.mean(line[16:20]))
    assert np.isnan(smooth(np.array([np.nan]), 2)[0])
