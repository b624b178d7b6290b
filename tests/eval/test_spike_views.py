"""Skips and roll-backs in the report, the live view and the status of runs, from one recorded run."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.metrics_file import MetricsFile, read_metrics
from common.metrics_table import read_metrics_table
from common.run_folder import RunFolder
from eval.reporting.drawing import LOSS_AXES
from eval.reporting.key_figures import key_figures
from eval.reporting.live_view import LiveRun, frame
from eval.reporting.look import Look
from eval.reporting.page import page
from eval.reporting.run_data import load_run
from eval.reporting.spike_marks import mark_spikes, skipped_steps
from slurm.status import read_status, table
from tests.helpers.recorded_runs import BEGIN, recorded_run, train_record


def spiked_run(root: Path) -> RunFolder:
    """40 steps, 3 of them skipped and 5 rolled back (one of these too, twice recorded), then 5 more."""
    folder = recorded_run(root, "spiked", lives=((0, 30),))
    metrics, now = MetricsFile(folder.metrics), BEGIN + 1_000
    skips = 0

    def step(number: int, loss: float, *, skipped: bool = False) -> None:
        nonlocal now, skips
        now += 1.0
        metrics.append(train_record(number, now, loss, **({"skipped": True} if skipped else {})))
        if skipped:
            skips += 1
            metrics.append({"kind": "spike", "step": number, "skipped": True, "skips": skips, "spike": "loss"})

    for number in range(31, 36):
        step(number, 3.0, skipped=number == 33)
    for attempt in range(2):  # the first was killed before its end
        for number in range(36, 41):
            step(number, 9.0, skipped=number == 38)
        skips = 2
        metrics.append({"kind": "rollback", "step": 35, "rollback": 1, "from_step": 40, "time": now})
        if attempt == 0:
            metrics.append({"kind": "start", "step": 35, "world_size": 2, "time": now})
    for number in range(36, 41):
        step(number, 2.9, skipped=number == 40)
    metrics.close()
    return folder


def test_skips_and_roll_backs_are_shown(tmp_path: Path) -> None:
    folder = spiked_run(tmp_path)
    metrics = read_metrics_table(folder.metrics)
    (lost,) = metrics.rollbacks
    assert (lost.steps.tolist(), set(lost.losses)) == ([36, 37, 38, 39, 40], {9.0})
    assert metrics.skips == 3 and metrics.lost.steps == 10
    assert metrics.column("step").tolist() == list(range(1, 41)) and metrics.column("loss")[35:].max() == 2.9
    held = read_metrics(folder.metrics)
    assert [record["step"] for record in held if record.get("kind") == "spike"] == [33, 40]

    run = load_run(folder.path)
    assert skipped_steps(run) == [33, 40]
    for axis in LOSS_AXES:
        axes = Figure().subplots()
        mark_spikes(axes, [run], axis)
        lines = {str(line.get_label()): np.asarray(line.get_xdata()) for line in axes.get_lines()}
        assert lines.keys() == {"rolled back (1)", "skipped (2)"}
        if axis.key == "steps":
            assert lines["skipped (2)"].tolist() == [33, 40]
            assert (lines["rolled back (1)"].min(), lines["rolled back (1)"].max()) == (36, 40)
    assert (key_figures(run).steps_skipped, key_figures(run).rollbacks) == (3, 1)
    assert "steps skipped as spikes" in page([run], {}, BEGIN)

    live = LiveRun(folder, metrics)
    live.refresh()
    assert any("3 skipped  1 roll-back" in line for line in frame(live, 160, 30, Look(True, False), BEGIN + 2_000))
    status = read_status(folder, BEGIN + 2_000)
    assert (status.skips, status.rollbacks) == (3, 1) and "3, 1 roll-back" in table([status])
