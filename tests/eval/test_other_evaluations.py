"""Evaluations that only a run's starts describe: several runs together, a growing run, hostile descriptions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.metrics_file import MetricsFile
from common.metrics_table import MetricsTable, read_metrics_table
from common.run_folder import RunFolder
from common.time_spent import labels_of, time_spent
from eval.reporting.key_figures import key_figures
from eval.reporting.live_view import LiveRun, frame
from eval.reporting.look import Look
from eval.reporting.page import page
from eval.reporting.run_data import load_run
from tests.eval.test_report import run_script
from tests.helpers.html_tables import plain_cells
from tests.helpers.recorded_runs import OWN, recorded_run, train_record
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT

HUGE = 10**40
HOSTILE: list[Any] = [
    "curves",
    [OWN.as_json() | {"figure": "loss"}],
    [OWN.as_json() | {"figure": "val_loss", "label": "mine"}],
    [OWN.as_json() | {"label": "To\x1b[2Jy"}, None, [], 5, {"figure": ["toy"]}, {"kind": "toy"}],
    [{"kind": "x" * 10**6, "figure": "../../../etc/toy", "label": "x" * 10**6}],
    [OWN.as_json() | {"kind": "id", "seconds": "step_seconds", "measured_on": [["a" * 70]] * 10**4}],
    [{"kind": f"k{n}", "figure": f"f{n}", "label": f"{n}", "seconds": f"s{n}_seconds"} for n in range(10_000)],
    [OWN.as_json() | {"label": "_$x$ <script>|*", "error": "toy_share", "measured_on": [["toy_share"], ["step"]]}],
]
VALUES: list[Any] = ["0.5", True, [0.5], {"a": [{}]}, -HUGE, 1e308, None, 0.25]


def test_runs_beside_each_other(tmp_path: Path) -> None:
    """One has it, one was resumed with other questions, one knows nothing of it."""
    recorded_run(tmp_path, "one", lives=[(0, 25), (20, 40)], own=True)
    other, plain = recorded_run(tmp_path, "other", own=True), recorded_run(tmp_path, "plain")
    metrics = MetricsFile(other.metrics)
    for step, share in ((41, 0.3), (42, 0.2)):
        metrics.append({"kind": "toy", "step": step, "tokens": 41_000, "toy_share": share, "toy_questions": 9})
    metrics.close()

    done = run_script("report.py", *(f"runs/{name}" for name in ("one", "other", "plain")), "--out=all", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    text = (tmp_path / "all" / "report.html").read_text()
    ends = {name: key_figures(load_run(tmp_path / "runs" / name)) for name in ("one", "other", "plain")}
    assert str(ends["one"].evaluations["toy_share"]) == "0.5500 ± 0.0100"
    assert (ends["one"].evaluations["toy_share"].best, ends["one"].evaluations["toy_share"].best_step) == (0.75, 20)
    assert (ends["other"].evaluations["toy_share"].best_step, ends["plain"].evaluations) == (41, {})
    label = "Toy &lt;b&gt;share&lt;/b&gt;"
    cells = "".join(f"<td>{cell}</td>" for cell in ("0.7500 (step 20)", "0.3000 (step 41)", "–"))
    assert f"<td>{label}, highest</td>{cells}" in plain_cells(text)
    assert "other: left out what was measured on something else (toy_questions 8), step 10 to 40." in text
    assert (tmp_path / "all" / "evaluation-toy-share.png").exists()
    assert not plain.report.exists()

    said = run_script("compare.py", "runs/one", "runs/plain", "--markdown", cwd=tmp_path).stdout
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {12}
    assert rows[0].endswith("| HellaSwag | Toy <b>share</b> |")
    assert (rows[-2][-20:], rows[-1][-5:]) == (" | 0.5500 ± 0.0100 |", " |  |")


def test_where_its_time_went(tmp_path: Path) -> None:
    """The arithmetic of tests/helpers/recorded_runs.py: one of its 4 seconds was lost, as the run went back over it."""
    spent = time_spent(
        read_metrics_table(recorded_run(tmp_path, "one", lives=[(0, 25), (20, 32), (29, 40)], own=True).metrics)
    )
    assert spent.evaluations == {"validation": pytest.approx(4 * 2.0), "hellaswag": 0.0, "toy": pytest.approx(4 * 1.0)}
    assert spent.done_again == pytest.approx(5 + 3 + 2.0 + 0.5 + 1.0)
    assert spent.other == pytest.approx(0.0, abs=1e-3)
    assert list(labels_of([spent]))[2:5] == ["validation", "hellaswag", "toy"]


def test_a_run_that_is_followed_tells_of_it_when_it_resumes(tmp_path: Path) -> None:
    """The older version that started it did not have the evaluation."""
    folder = recorded_run(tmp_path, "grown")
    run = LiveRun(folder, MetricsTable(folder.metrics))
    run.refresh()
    assert "toy" not in "".join(frame(run, 200, 30, Look(True, False), 0.0)).lower()
    metrics = MetricsFile(folder.metrics)
    metrics.append({"kind": "start", "step": 40, "curves": [OWN.as_json()]})
    metrics.append(train_record(41, 1.8e9, 2.0))
    metrics.append({"kind": "toy", "step": 41, "toy_share": 0.75})
    metrics.close()
    run.refresh()
    assert "Toy <b>share</b> 0.7500" in "".join(frame(run, 200, 30, Look(True, False), 0.0))


def test_a_label_takes_no_other_figures_place(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "run", lives=[(0, 25), (20, 40)], own=True)
    metrics = MetricsFile(run.metrics)
    metrics.append({"kind": "start", "step": 40, "curves": [OWN.as_json() | {"label": "restarts"}]})
    metrics.close()
    for runs in ([load_run(run.path)], [load_run(run.path)] * 2):
        text = page(runs, {}, 0.0)
        assert "restarts (toy_share)" in text
        assert ("<b>2</b><span>restarts</span>" in text) == (len(runs) == 1)
        assert ('<td class="any">restarts</td><td class="any">2</td>' in text) == (len(runs) == 2)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose starts describe what they like, with records of all of it."""
    root = tmp_path_factory.mktemp("hostile")
    make_token_set(root / "tokens")
    run = recorded_run(root, "hostile", hellaswag=True, own=True)
    config = yaml.safe_load(run.config.read_text()) | {"data": {"path": str(root / "tokens")}}
    run.config.write_text(yaml.safe_dump(config))
    metrics = MetricsFile(run.metrics)
    keys = ("toy_share", "toy_share_stderr", "toy_seconds", "toy_questions", "f1", "s1_seconds", "hellaswag_acc_norm",
            "hellaswag_examples", "hellaswag_official", "hellaswag_sha256")  # fmt: skip
    for number, described in enumerate(HOSTILE):
        step = 41 + number
        metrics.append({"kind": "start", "step": step - 1, "curves": described})
        metrics.append(train_record(step, 1.8e9 + step, 2.0))
        for kind in ("toy", "k1", "hellaswag", "id", "train"):
            metrics.append({"kind": kind, "step": step, **dict.fromkeys(keys, VALUES[number])})
        metrics.append({"step": step, "val_loss": 2.0})
    metrics.close()
    return run


READERS = {
    "eval/report.py": ("--json", "it.json"),
    "eval/watch.py": ("--once",),
    "eval/summary.py": ("--json", "it.json"),
    "eval/compare.py": (),
    "eval/plot_loss.py": (),
    "train/sync_wandb.py": ("--again",),
}


@pytest.mark.parametrize("command", READERS)
def test_hostile_descriptions_are_harmless_and_reported(tmp_path: Path, hostile: RunFolder, command: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / command), str(hostile.path), *READERS[command]],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "300"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert (done.returncode, "Traceback" in said) == (0, False), said
    assert "describes a figure that can't be shown (curves: it is not a list)" in said.replace("\n", " ")
    assert "\x1b" not in said
    if command == "eval/report.py":
        names = {path.name for path in hostile.report.glob("*.png")}
        assert {"evaluation-toy-share.png", "evaluation-f1.png"} <= names and len(names) < 20
        json.loads((tmp_path / "it.json").read_text())


def test_a_hostile_label_is_text(hostile: RunFolder) -> None:
    run = load_run(hostile.path)
    assert run.table.curves.get("toy_share").label == "_$x$ <script>|*"
    text = page([run], {}, 0.0)
    assert "<script" not in text and "_$x$ &lt;script&gt;|*" in text
