"""The record: torn lines, and what a resume supersedes."""

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.metrics_file import MetricsFile, metrics_of_step, read_json_lines, read_metrics


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def steps(first: int, last: int, attempt: int, validate_every: int = 2) -> list[dict[str, Any]]:
    """What an attempt appends: its start, training records, validations after every second step."""
    records: list[dict[str, Any]] = [{"kind": "start", "step": first, "attempt": attempt}]
    for step in range(first + 1, last + 1):
        records.append({"step": step, "loss": 1.0, "attempt": attempt})
        if step % validate_every == 0:
            records.append({"step": step, "val_loss": 2.0, "attempt": attempt})
    return records


def test_a_torn_last_line_is_closed_by_the_next_writer_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    file = MetricsFile(path)
    file.append({"step": 2, "loss": 2.5})
    file.close()
    assert [record["loss"] for record in read_metrics(path)] == [3.0, 2.5]
    assert path.read_bytes().startswith(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo\n')  # nothing is ever taken away


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6), st.data())
def test_after_any_resumes_every_step_appears_once_and_from_its_last_attempt(lasts: list[int], data: Any) -> None:
    import tempfile

    records: list[dict[str, Any]] = []
    holds: dict[int, int] = {}
    reached = 0
    for attempt, more in enumerate(lasts):
        first = data.draw(st.integers(0, reached))  # the newest whole checkpoint
        reached = first + more
        records += steps(first, reached, attempt)
        holds = {step: at for step, at in holds.items() if step <= first}
        holds |= dict.fromkeys(range(first + 1, reached + 1), attempt)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write(path, records)
        found = read_metrics(path)
        for step in range(reached + 2):
            of_step = [record for record in found if record["step"] == step]
            assert metrics_of_step(path, step, block_bytes=data.draw(st.integers(1, 200))) == of_step
    assert {record["step"]: record["attempt"] for record in found if "loss" in record} == holds
    training = [record["step"] for record in found if "loss" in record]
    assert training == sorted(set(training))
    validations = {record["step"]: record["attempt"] for record in found if "val_loss" in record}
    assert validations == {step: attempt for step, attempt in holds.items() if step % 2 == 0}


def test_a_validation_before_the_first_step_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "start", "step": 0}, {"step": 0, "val_loss": 9.0}, {"step": 1, "loss": 9.0}])
    assert [record.get("val_loss") for record in read_metrics(path)] == [None, 9.0, None]


def test_a_save_recorded_late_voids_nothing_and_stands_at_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    save = {"kind": "save", "step": 2}
    write(path, [*steps(0, 3, attempt=1), save, {"step": 4, "loss": 1.0}])
    found = read_metrics(path)
    assert [record["step"] for record in found] == [0, 1, 2, 2, 2, 3, 4]
    assert found[4] == save
    # an attempt that goes on from step 2 keeps that save, one that goes on from step 1 does not
    write(path, [*steps(0, 3, attempt=1), save, *steps(2, 3, attempt=2)])
    assert save in read_metrics(path)
    write(path, [*steps(0, 3, attempt=1), save, *steps(1, 3, attempt=2)])
    assert save not in read_metrics(path)


def test_what_json_does_not_know_becomes_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    file.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None}]


def test_a_missing_record_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "nothing.jsonl") == []
