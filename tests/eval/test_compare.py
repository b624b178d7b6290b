"""The table of published models: the figures as their sources give them, and of runs only what was measured."""

import json
import os
from pathlib import Path

import pytest

from eval.reporting.comparison import run_row
from eval.reporting.run_data import load_run
from model.config import PRESETS
from model.counts import parameter_count
from tests.eval.test_report import run_script
from tests.helpers.recorded_runs import recorded_run
from tests.helpers.training import PROJECT

# by name, tokens and validation data: HellaSwag and validation loss, as the sources print them
PUBLISHED = {
    ("GPT-2 124M", 100e9, "FineWeb"): (0.2945, 3.4250),
    ("GPT-2 124M", 100e9, "FineWeb-Edu"): (0.2945, 3.2924),
    ("GPT-2 1.56B", 100e9, "FineWeb"): (0.4889, 2.8313),
    ("GPT-3 125M", 300e9, None): (0.337, None),
    ("GPT-3 1.3B", 300e9, None): (0.547, None),
    ("Arcane 124M", 10e9, "its own"): (0.3083, 3.00),
    ("Arcane 1.3B", 20e9, None): (0.3881, None),
}


def test_the_published_models_with_the_committed_runs(tmp_path: Path) -> None:
    done = run_script("compare.py", "--json", "models.json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "models.json").read_text())["models"]
    found = {
        (row["model"], row["tokens"], row["val_data"]): (row["hellaswag_acc_norm"], row["val_loss"]) for row in rows
    }
    assert PUBLISHED.items() <= found.items()
    published = [row for row in rows if not row["ours"]]
    assert all(row["source"].startswith(("https://github.com/", "Brown et al. 2020")) for row in published)
    demo = next(row for row in rows if row["model"] == "2026-11-21-demo")
    summary = json.loads((PROJECT / "records" / "2026-11-21-demo" / "summary.json").read_text())
    assert demo["val_loss"] == pytest.approx(summary["val_loss"])
    assert demo["hellaswag_acc_norm"] is None
    gpt2 = next(row for row in rows if row["model"] == "GPT-2 124M")
    assert gpt2["parameters"] == parameter_count(PRESETS["gpt2-124m"])


def test_a_run_stands_beside_them_with_what_was_measured(tmp_path: Path) -> None:
    recorded_run(tmp_path, "measured", hellaswag=True)
    recorded_run(tmp_path, "unmeasured", lives=[(0, 5)])

    done = run_script("compare.py", "runs/measured", "runs/unmeasured", "--json", "models.json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    measured, unmeasured = [row for row in json.loads((tmp_path / "models.json").read_text())["models"] if row["ours"]]
    assert measured["val_loss"] == pytest.approx(2.6)
    assert measured["val_data"] == "tiny ab12ab12, 257 symbols", "on which data, in which units"
    assert measured["hellaswag_acc_norm"] == pytest.approx(0.29)
    assert measured["rope"] is True
    for key in ("val_loss", "val_data", "hellaswag_acc_norm"):
        assert unmeasured[key] is None
    lines = done.stdout.splitlines()
    assert "0.2900 (of 400)" in next(line for line in lines if line.startswith("measured"))
    assert len(next(line for line in lines if line.startswith("unmeasured")).split()) == 7
    assert len({line.index("FineWeb-Edu") for line in lines if line.startswith("Arcane 1")}) == 1, (
        "columns stand straight"
    )


def test_the_trained_models_score_on_all_examples_holds(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "tested", hellaswag=True)
    run.report.mkdir()
    (run.report / "hellaswag.json").write_text(json.dumps({"acc_norm": 0.3111, "acc": 0.29, "examples": 10_042}))

    done = run_script("compare.py", "runs/tested", cwd=tmp_path)

    assert next(line for line in done.stdout.splitlines() if line.startswith("tested")).endswith(" 0.3111")


@pytest.mark.parametrize(("step", "shown"), [(40, "0.3111"), (20, "0.2900 (of 400)")])
def test_a_score_of_before_the_run_went_on_gives_way_to_a_later_one(tmp_path: Path, step: int, shown: str) -> None:
    run = recorded_run(tmp_path, "extended", lives=[(0, 20), (20, 40)], hellaswag=True)
    run.report.mkdir()
    measured = {"acc_norm": 0.3111, "examples": 10_042, "step": step}
    (run.report / "hellaswag.json").write_text(json.dumps(measured))

    done = run_script("compare.py", "runs/extended", cwd=tmp_path)

    assert next(line for line in done.stdout.splitlines() if line.startswith("extended")).endswith(f"  {shown}")


def test_a_score_of_before_the_run_went_on_is_told_with_its_step(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "extended", lives=[(0, 20), (20, 40)])
    run.report.mkdir()
    measured = {"acc_norm": 0.3111, "examples": 10_042, "step": 20}
    (run.report / "hellaswag.json").write_text(json.dumps(measured))

    done = run_script("compare.py", "runs/extended", cwd=tmp_path)

    assert next(line for line in done.stdout.splitlines() if line.startswith("extended")).endswith(" 0.3111 (step 20)")
    run_script("report.py", "runs/extended", cwd=tmp_path)
    assert "0.3111 (step 20)</b><span>HellaSwag acc_norm" in (run.report / "report.html").read_text()


def test_a_score_on_other_contexts_stands_beside_nothing_published(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "text", hellaswag=True, official=False)
    assert run_row(load_run(run.path)).hellaswag_acc_norm is None

    run.report.mkdir()
    score = {"acc_norm": 0.3111, "examples": 10_042, "data": {"form": "text"}}
    (run.report / "hellaswag.json").write_text(json.dumps(score))

    done = run_script("compare.py", "runs/text", cwd=tmp_path)

    assert "0.3111" not in done.stdout


def test_as_markdown(tmp_path: Path) -> None:
    recorded_run(tmp_path, "a|b")

    done = run_script("compare.py", "runs/a|b", "--markdown", cwd=tmp_path)

    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {11}
    assert rows[-1].startswith("| **a\\|b** |")


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = run_script("compare.py", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["compare.py", "report.py"])
def test_a_run_that_can_not_be_read_costs_its_own_line(tmp_path: Path, script: str) -> None:
    """And a file of another run its own part."""
    good, other = recorded_run(tmp_path, "good"), recorded_run(tmp_path, "other")
    for name in ("piped", "odd"):
        recorded_run(tmp_path, name).metrics.unlink()
    os.mkfifo(tmp_path / "runs" / "piped" / "metrics.jsonl")
    odd = [{"step": 1, "loss": [], "tokens": None, "time": "x"}, {"step": 2, "loss": 1.0, "tokens": {}, "time": 1e300}]
    (tmp_path / "runs" / "odd" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in odd))
    other.provenance.write_text("null")
    other.samples.unlink()
    other.samples.symlink_to("/dev/zero")
    good.lock.symlink_to("/dev/zero")

    done = run_script(script, "runs/good", "runs/piped", "runs/odd", "runs/other", "--json", "it.json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == [
        "left out: runs/piped/metrics.jsonl can't be read",
        "left out: runs/other/provenance.json is damaged",
        "left out: runs/other/samples.jsonl can't be read",
    ]
    told = json.loads((tmp_path / "it.json").read_text())
    rows = told["runs"] if script == "report.py" else [row for row in told["models"] if row["ours"]]
    assert [(row.get("run") or row["model"], row["tokens"]) for row in rows] == [
        ("good", 40_000), ("odd", 0), ("other", 40_000),
    ]  # fmt: skip
    alone = run_script(script, "runs/piped", cwd=tmp_path)
    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)
    assert "metrics.jsonl can't be read (it is a pipe, not a file): move it away" in alone.stderr
