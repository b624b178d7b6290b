"""The report as a user makes it, read back from its file."""

import html
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from PIL import Image

from common.metrics_file import MetricsFile
from common.plain_text import printable
from common.run_folder import RunFolder
from common.time_spent import time_spent
from eval import plot_loss
from eval.reporting import drawing, figures
from eval.reporting.evaluation_pictures import evaluation_pictures
from eval.reporting.key_figures import key_figures
from eval.reporting.run_data import RunData, load_run, load_runs
from eval.reporting.svg_chart import loss_chart
from tests.helpers.recorded_runs import recorded_run, train_record, write_run
from tests.helpers.training import PROJECT


def run_script(name: str, *arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(PROJECT / "eval" / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


class Links(HTMLParser):
    """What a page refers to, and the elements it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that was interrupted twice, and its report's text."""
    root = tmp_path_factory.mktemp("report")
    run = recorded_run(root, "twice", lives=[(0, 25), (20, 32), (30, 40)], hellaswag=True)
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 41, "lo')
    done = run_script("report.py", "runs/twice", "--json", "figures.json", cwd=root)
    assert done.returncode == 0, done.stderr
    return root, (run.report / "report.html").read_text()


def test_the_page_needs_nothing_else(reported: tuple[Path, str]) -> None:
    """Nothing is fetched: everything it refers to is inside it, and there is nothing that could fetch."""
    links = Links()
    links.feed(reported[1])
    assert len(links.references) > 10
    assert all(reference.startswith(("data:", "#")) for reference in links.references)
    assert not links.tags & {"script", "iframe", "object", "embed", "base"}
    style = re.findall(r"<style>(.*?)</style>", reported[1], flags=re.DOTALL)
    assert len(style) == 2 and not any(word in rules for rules in style for word in ("url(", "@import"))


def test_the_page_tells_what_happened(reported: tuple[Path, str]) -> None:
    text = reported[1]
    for expected in (
        "40 of 100",
        "3 starts",
        "7 steps were lost and done again",
        "node7",
        '<td class="any">Longhaul</td><td class="any">0.1.0, then 0.2.0</td>',
        "git checkout 0123abcd",
        "torchrun --standalone --nproc_per_node=2 train/pretrain.py --config runs/twice/config.yaml",
        "upon step 20 &lt;script&gt;",
        "ab12" * 16,
        "Arcane 124M",
        "0.2900 (of 400)",
    ):
        assert expected in text, expected


def test_again_begins_where_a_branch_began_and_on_as_many_nodes(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "branch", lives=[(20, 40)])
    told = json.loads(run.provenance.read_text())
    told["starts"][0] |= {"resumed_from": "runs/a b/step-00000020", "ranks": [{"host": "node1"}, {"host": "node2"}]}
    run.provenance.write_text(json.dumps(told))

    done = run_script("report.py", "runs/branch", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    again = html.unescape((run.report / "report.html").read_text()).split("<h3>Again</h3>")[1].split("</pre>")[0]
    assert "on each of 2 nodes" in again
    assert again.splitlines()[-1] == (
        "torchrun --nnodes=2 --nproc_per_node=1 --node_rank=K --master_addr=HOST train/pretrain.py "
        "--config runs/branch/config.yaml --resume 'runs/a b/step-00000020' --run.name branch-again"
    )


def test_pictures_lie_beside_the_page(reported: tuple[Path, str]) -> None:
    folder = reported[0] / "runs" / "twice" / "report"
    names = {path.name for path in folder.glob("*.png")}
    wanted = {f"loss-{axis}.png" for axis in ("steps", "tokens", "flops", "hours")}
    wanted |= {"step-lr.png", "step-grad-norm.png", "step-tokens-per-second.png", "step-memory-gib.png"}
    assert names == wanted | {"hellaswag.png", "time.png"}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300


def test_figures_as_json(reported: tuple[Path, str]) -> None:
    (figures_of_run,) = json.loads((reported[0] / "figures.json").read_text())["runs"]
    assert figures_of_run["val_loss"] == pytest.approx(2.6)
    assert (figures_of_run["starts"], figures_of_run["steps_done_again"]) == (3, 7)
    assert figures_of_run["seconds"]["stopped"] == pytest.approx(120.0)


def test_where_the_time_went(tmp_path: Path) -> None:
    """The arithmetic of tests/helpers/recorded_runs.py: 40 steps count, 5 + 3 were lost, a validation among them."""
    run = recorded_run(tmp_path, "twice", lives=[(0, 25), (20, 32), (29, 40)])
    spent = time_spent(load_run(run.path).table)
    assert spent.compute == pytest.approx(40 * 0.75)
    assert spent.data == pytest.approx(40 * 0.25)
    assert spent.evaluations["validation"] == pytest.approx(4 * 2.0)
    assert spent.save == pytest.approx(4 * 0.5)
    assert spent.starting == pytest.approx(3 * 5.0)
    assert spent.done_again == pytest.approx(5 + 3 + 2.0 + 0.5)
    assert spent.stopped == pytest.approx(2 * 60.0)
    assert spent.other == pytest.approx(0.0, abs=1e-3)
    assert spent.total == pytest.approx(sum(spent.parts.values()))


def test_a_save_beside_training_costs_what_it_blocked(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "async", lives=[(0, 9)])
    metrics = MetricsFile(run.metrics)
    metrics.append({"kind": "save", "step": 9, "save_seconds": 50.0, "save_blocked_seconds": 0.5, "time": 1.7e9 + 90})
    metrics.close()
    assert time_spent(load_run(run.path).table).save == 0.5


def test_hours_leave_out_the_stops(tmp_path: Path) -> None:
    run = load_run(recorded_run(tmp_path, "once", lives=[(0, 9), (5, 9)]).path)
    hours = run.hours(run.table.column("time")) * 3600
    # 5 s to start, 5 steps; the first life's other 4 steps, and 5 s to start again, are time too
    assert hours.tolist() == pytest.approx([6, 7, 8, 9, 10, 20, 21, 22, 23])


def test_runs_are_laid_over_each_other_with_what_differs(tmp_path: Path) -> None:
    recorded_run(tmp_path, "slow", lives=[(0, 30)])
    recorded_run(tmp_path, "fast", lives=[(0, 40)], learning_rate=4e-3, end_loss=1.5)

    done = run_script("report.py", "runs/slow", "runs/fast", "--out", "both", "--json", "both.json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "both.json").read_text())
    assert found["differences"] == {"optim.lr": [1e-3, 4e-3], "run.name": ["slow", "fast"]}
    text = (tmp_path / "both" / "report.html").read_text()
    assert "What differs" in text and "optim.lr" in text
    with Image.open(tmp_path / "both" / "loss-steps.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    for color in drawing.COLORS[:2]:
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(axis=-1) < 30).sum() > 200, "each run has its own colour"


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for root in ("a", "b"):
        recorded_run(tmp_path / root, "seed", lives=[(0, 3)])
    runs = load_runs([tmp_path / root / "runs" / "seed" for root in ("a", "b")])
    assert [run.name for run in runs] == ["a/runs/seed", "b/runs/seed"]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """One step, a loss that is no number, no state, no configuration, no validation."""
    folder = RunFolder(tmp_path / "young")
    folder.path.mkdir()
    metrics = MetricsFile(folder.metrics)
    metrics.append({"kind": "start", "step": 0, "time": 1.0})
    metrics.append(train_record(1, 3.0, float("nan")))
    metrics.close()

    done = run_script("report.py", "young", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert not (folder.report / "loss-flops.png").exists()
    assert "holds no state" in (folder.report / "report.html").read_text()
    assert key_figures(load_run(folder.path)).train_loss is None


@pytest.mark.parametrize("name", ["nowhere", "empty", "begun"])
def test_a_folder_that_is_no_run_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "time": 1.0}\n')

    done = run_script("report.py", name, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / name / "report").exists()


def test_a_report_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    recorded_run(tmp_path, "run", lives=[(0, 3)])
    (tmp_path / "taken").write_text("a file")
    done = run_script("report.py", "runs/run", "--out", "taken/report", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "taken/report can't be written (Not a directory): a file is where a folder should be" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def long_run(folder: Path, steps: int) -> RunData:
    """A run of many steps, its file written at once, with 3,000 validations."""
    write_run(RunFolder(folder), lives=[(0, 2)])
    lines = [json.dumps(train_record(step, 1e9 + step, 3.0 + step % 7)) for step in range(1, steps + 1)]
    every = steps // 3000
    lines[every - 1 :: every] = [
        f'{line}\n{{"step": {step}, "tokens": {step * 1000}, "val_loss": 3.1, "time": {1e9 + step}}}'
        for step, line in zip(range(every, steps + 1, every), lines[every - 1 :: every], strict=True)
    ]
    RunFolder(folder).metrics.write_text("\n".join(lines) + "\n")
    return load_run(folder)


@pytest.mark.parametrize("axis", drawing.LOSS_AXES, ids=lambda axis: axis.key)
def test_the_points_of_a_picture_are_bounded(tmp_path: Path, axis: drawing.AxisKind) -> None:
    run = long_run(tmp_path / "long", 30_000)
    axes: Axes = Figure().add_subplot()

    figures.loss_panel(axes, [run], axis)

    drawn = [len(np.asarray(line.get_xdata())) for line in axes.get_lines()]
    assert len(drawn) == 3
    assert all(500 < points <= 2 * drawing.BUCKETS for points in drawn), drawn


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["_hidden", "$x$", "_$\\no$", r"a\$b\_$", "50% ^_{}#&~", "\x1b[2J\n\udcff\ud800"])
def test_a_name_is_drawn_as_it_is(tmp_path: Path, name: str) -> None:
    """To matplotlib dollars make a formula of a text, which may be none, and an underscore hides a legend's entry."""
    folder = recorded_run(tmp_path, "run", hellaswag=True).path
    runs = [load_run(folder, name), load_run(folder, "other")]
    axes: Axes = Figure().add_subplot()
    figures.loss_panel(axes, runs, drawing.STEPS)
    label, other = axes.get_legend_handles_labels()[1]
    assert other == "other"
    assert not is_math_text(label)
    assert label.removeprefix(drawing.HAIR_SPACE).replace(r"\$", "$") == printable(name)
    pictures = [*figures.loss_pictures(runs).values(), figures.time_picture(runs), *evaluation_pictures(runs).values()]
    assert all(picture is not None and Image.open(io.BytesIO(picture.png)).size[0] > 500 for picture in pictures)
    assert plot_loss.draw(runs[0])


def test_the_loss_is_one_figure_with_a_switch_values_and_a_legend(tmp_path: Path) -> None:
    recorded_run(tmp_path, "slow", lives=[(0, 30)])
    recorded_run(tmp_path, "<fast>", lives=[(0, 40)])
    chart = loss_chart([load_run(tmp_path / "runs" / name) for name in ("slow", "<fast>")])
    assert chart.count("<svg") == chart.count('type="radio"') == 4
    assert chart.count('type="checkbox"') == 2
    assert "slow: validation loss 2.6" in chart and "&lt;fast&gt;: training loss" in chart and "<fast>" not in chart
