"""Where a run's time went: its launches, and hangs, which are nobody's work."""

from pathlib import Path
from typing import Any

import pytest

from common.metrics_file import MetricsFile, read_metrics
from common.metrics_table import read_metrics_table
from common.time_spent import TimeSpent, time_spent
from tests.helpers.recorded_runs import BEGIN, WAIT_SECONDS, train_record


def spent(folder: Path, records: list[dict[str, Any]]) -> TimeSpent:
    metrics = MetricsFile(folder / "metrics.jsonl")
    for record in records:
        metrics.append(record)
    metrics.close()
    found = time_spent(read_metrics_table(folder / "metrics.jsonl"))
    assert sum(found.parts.values()) == pytest.approx(found.total)
    return found


def start(step: int, launched: float, at: float) -> dict[str, Any]:
    return {"kind": "start", "step": step, "world_size": 2, "launched": BEGIN + launched, "time": BEGIN + at}


def steps(first: int, last: int, at: float) -> list[dict[str, Any]]:
    """A second each; the first one starts at `at`."""
    return [train_record(step, BEGIN + at + step - first + 1, 3.0) for step in range(first, last + 1)]


def hang(step: int, seconds: float, at: float, phase: str = "", **more: Any) -> dict[str, Any]:
    found = {"kind": "hang", "step": step, "phase": phase, "hang_seconds": seconds, "continued": bool(phase)}
    return {**found, "time": BEGIN + at, **more}


def test_the_time_before_the_first_record_is_a_start_s(tmp_path: Path) -> None:
    """20 s until the first start's record, 5 more until its first step; 8 and 2 the second time."""
    found = spent(tmp_path, [start(0, -20.0, 0.0), *steps(1, 10, 5.0), start(10, 100.0, 108.0), *steps(11, 15, 110.0)])
    assert found.starting == pytest.approx(20 + 5 + 8 + 2)
    assert found.stopped == pytest.approx(100 - 15)
    assert found.compute == pytest.approx(15 * (1 - WAIT_SECONDS))
    assert found.total == pytest.approx(20 + 115)
    assert found.goodput == pytest.approx(found.compute / (135 - 85))


def test_a_hang_that_ended_the_run_is_no_stop(tmp_path: Path) -> None:
    """Two ranks have recorded it: it is one hang."""
    before = [start(0, 0.0, 1.0), *steps(1, 10, 2.0)]
    ended = [hang(11, 70.0, 82.0), hang(11, 71.0, 83.0)]
    found = spent(tmp_path, [*before, *ended, start(8, 100.0, 101.0), *steps(9, 12, 102.0)])
    assert (found.hung, found.stopped, found.done_again) == pytest.approx((71.0, 17.0, 2.0))
    assert found.compute == pytest.approx(12 * (1 - WAIT_SECONDS))


def test_a_hang_that_passed_is_not_the_step_s_time(tmp_path: Path) -> None:
    hung = [hang(3, 45.0, 50.0, "training"), train_record(3, BEGIN + 50.0, 3.0, step_seconds=46.0)]
    found = spent(tmp_path, [start(0, 0.0, 1.0), *steps(1, 2, 2.0), *hung, *steps(4, 5, 50.0)])
    assert (found.hung, found.compute) == pytest.approx((45.0, 5 * (1 - WAIT_SECONDS)))


def test_a_hang_in_work_that_was_lost_is_counted_once(tmp_path: Path) -> None:
    hung = [train_record(3, BEGIN + 50.0, 3.0, step_seconds=46.0), hang(3, 45.0, 50.0, "training")]
    lost = [start(0, 0.0, 1.0), *steps(1, 2, 2.0), *hung]
    found = spent(tmp_path, [*lost, start(2, 60.0, 61.0), *steps(3, 5, 62.0)])
    assert (found.hung, found.done_again) == pytest.approx((45.0, 1.0))
    assert found.compute == pytest.approx(5 * (1 - WAIT_SECONDS))


def test_a_hang_in_a_validation_or_before_the_first_step(tmp_path: Path) -> None:
    early = [start(0, 0.0, 1.0), hang(1, 40.0, 44.0, "warming up"), *steps(1, 2, 45.0)]
    validation = {"step": 2, "val_loss": 3.0, "val_seconds": 33.0, "time": BEGIN + 80.0}
    found = spent(tmp_path, [*early, validation, hang(2, 31.0, 80.0, "validating"), *steps(3, 4, 80.0)])
    assert found.hung == pytest.approx(71.0)
    assert found.starting == pytest.approx(4.0)
    assert found.evaluations["validation"] == pytest.approx(2.0)


def test_a_hang_voids_no_step(tmp_path: Path) -> None:
    """The launcher, which records a single rank's, knows the step of its last heartbeat."""
    spent(tmp_path, [start(0, 0.0, 1.0), *steps(1, 10, 2.0), hang(7, 40.0, 52.0)])
    assert len([record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]) == 10
