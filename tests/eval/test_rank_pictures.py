"""A report draws how long each rank computes, whatever else stands in the records."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.run_folder import RunFolder
from eval.reporting.rank_pictures import rank_pictures, rank_times
from eval.reporting.run_data import load_run
from tests.eval.test_report import run_script
from tests.helpers.recorded_runs import BEGIN, recorded_run


def write_times(run: RunFolder, times: list[Any], first_step: int = 10) -> None:
    """Records of these ranks' seconds, behind all others; the newest step's come last."""
    with open(run.metrics, "a", encoding="utf-8") as file:
        for number, seconds in enumerate(times):
            record = {"kind": "ranks", "step": first_step + number, "compute_seconds": seconds, "time": BEGIN + 200}
            file.write(json.dumps(record) + "\n")


def test_the_report_draws_the_ranks(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "seen")
    write_times(run, [[0.1, 0.1], [0.1, 0.2]], first_step=40)

    done = run_script("report.py", run.path, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "How long each rank computes" in (run.report / "report.html").read_text(encoding="utf-8")
    assert Image.open(io.BytesIO((run.report / "ranks.png").read_bytes())).width > 400


def test_a_run_of_one_rank_has_no_such_picture(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "single")
    assert rank_pictures([load_run(run.path)]) == {}
    write_times(run, [[0.1]], first_step=40)
    assert rank_pictures([load_run(run.path)]) == {}


def test_many_ranks_are_a_map_and_several_runs_have_one_each(tmp_path: Path) -> None:
    runs = [recorded_run(tmp_path, name) for name in ("one", "two")]
    write_times(runs[0], [[0.1] * 63 + [0.2]] * 3, first_step=40)
    write_times(runs[1], [[0.1, 0.2]], first_step=40)
    pictures = rank_pictures([load_run(run.path) for run in runs])
    assert list(pictures) == ["ranks-0.png", "ranks-1.png"]


def test_times_are_over_the_lower_median(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "seen")
    write_times(run, [[0.1, 0.3], [0.4, 0.1, 0.2]], first_step=40)
    steps, times = rank_times(load_run(run.path))
    assert steps.tolist() == [40, 41]
    np.testing.assert_allclose(times, [[1.0, 3.0, np.nan], [2.0, 0.5, 1.0]])


@pytest.mark.parametrize("seconds", ["x", None, {}, [], [True, 1], ["a", 1.0], [-1.0, 1.0], [None, 1.0], [1e400, 1.0]])
def test_what_is_no_list_of_times_is_left_out(tmp_path: Path, seconds: Any) -> None:
    run = recorded_run(tmp_path, "damaged")
    write_times(run, [[0.1, 0.2], seconds, [0.0, 0.0]], first_step=40)
    steps, times = rank_times(load_run(run.path))
    assert steps.tolist() == [40, 42]
    assert times.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert len(rank_pictures([load_run(run.path)])) == 1
