"""The columns hold what the record holds, in whatever pieces it is read, and count what a resume made void."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import growing_file
from common.metric_fields import fits
from common.metrics_file import MetricsFile, read_metrics
from common.metrics_table import MetricsTable, read_metrics_table


def attempt_records(first: int, last: int, attempt: int, now: float) -> list[dict[str, Any]]:
    """What one attempt appends: a start, steps of a second, every second step a validation (2 s) and a save."""
    records: list[dict[str, Any]] = [{"kind": "start", "step": first, "world_size": 1 + attempt, "time": now}]
    now += 5.0
    for step in range(first + 1, last + 1):
        now += 1.0
        loss = None if step == 3 else 10.0 * attempt + step
        records.append(
            {"step": step, "tokens": 100 * step, "loss": loss, "step_seconds": 1.0, "time": now, "attempt": attempt}
        )
        if step % 2 == 0:
            now += 2.0
            records.append({"step": step, "val_loss": 2.0 + attempt, "val_seconds": 2.0, "time": now})
            records.append({"kind": "save", "step": step, "save_seconds": 0.0, "time": now})
    return records


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.data())
def test_it_holds_what_read_metrics_holds_however_it_was_read(lasts: list[int], data: Any) -> None:
    """Attempts that were torn off in the middle of a line, read by any pieces of the file."""
    content, reached, now = b"", 0, 1000.0
    attempts: list[list[dict[str, Any]]] = []
    for attempt, more in enumerate(lasts):
        first = data.draw(st.integers(0, reached))
        reached = first + more
        attempts.append(attempt_records(first, reached, attempt, now))
        now += 1000.0
        content += "".join(json.dumps(record) + "\n" for record in attempts[-1]).encode()
        content += data.draw(
            st.sampled_from([b"", b'{"step": 9, "lo\n', b"\n", b"[1, 2]\n", b'{"tex": "a\n', b"\xff\n"])
        )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(b"")
        table = MetricsTable(path)
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            with open(path, "ab") as file:
                file.write(content[begin:end])
            assert table.update() in (True, False)
        expected = read_metrics(path)
        assert not table.update()
    train = [record for record in expected if "loss" in record]
    assert table.column("step").tolist() == [record["step"] for record in train]
    wanted = np.array([record["loss"] for record in train], dtype=float)
    np.testing.assert_array_equal(table.column("loss"), wanted)
    assert np.isnan(table.column("mfu")).all()
    others = [record for record in expected if "loss" not in record and record.get("kind") != "start"]
    assert table.events == others
    assert [life.step for life in table.lives] == [records[0]["step"] for records in attempts]
    assert [life.world_size for life in table.lives] == [records[0]["world_size"] for records in attempts]
    assert [life.end for life in table.lives] == [records[-1]["time"] for records in attempts]
    done = sum(1 for records in attempts for record in records if "loss" in record)
    validated = sum(1 for records in attempts for record in records if "val_loss" in record)
    lost_validations = validated - len(table.of_kind("val_loss"))
    assert table.lost.steps == done - len(train)
    assert table.lost.seconds == pytest.approx(table.lost.steps * 1.0 + lost_validations * 2.0)
    assert all(life.starting_seconds in (None, 5.0) for life in table.lives)


def test_blocks_smaller_than_lines_and_larger_than_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in attempt_records(0, 200, 0, 1.0)))
    whole = read_metrics_table(path)
    for size in (7, 1000):
        monkeypatch.setattr(growing_file, "BLOCK_BYTES", size)
        pieces = read_metrics_table(path)
        np.testing.assert_array_equal(pieces.column("time"), whole.column("time"))
        assert pieces.events == whole.events
    assert len(whole) == 200


def test_a_line_that_is_not_whole_yet_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    table = read_metrics_table(path)
    assert table.column("loss").tolist() == [3.0]
    with open(path, "ab") as file:
        file.write(b'ss": 2.5}\n')
    assert table.update()
    assert table.column("loss").tolist() == [3.0, 2.5]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in attempt_records(0, 9, 0, 1.0)))
    table = read_metrics_table(path)
    path.write_text('{"step": 1, "loss": 7.0}\n')
    assert table.update()
    assert table.column("loss").tolist() == [7.0]
    assert table.events == []


def test_what_is_no_number_is_nan_and_no_file_is_an_empty_table(tmp_path: Path) -> None:
    assert len(read_metrics_table(tmp_path / "none.jsonl")) == 0
    writer = MetricsFile(tmp_path / "metrics.jsonl")
    writer.append({"step": 1, "loss": math.inf, "lr": "high"})
    writer.append({"step": 2, "loss": 1.0, "lr": 0.5})
    writer.append({"step": "three", "loss": 1.0})
    writer.close()
    table = read_metrics_table(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(table.column("loss"), [np.nan, 1.0])
    np.testing.assert_array_equal(table.column("lr"), [np.nan, 0.5])


def test_a_save_that_ends_after_later_steps_takes_none_of_them_away(tmp_path: Path) -> None:
    """A save that goes on beside training is recorded when it is whole."""
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"kind": "save", "step": 2, "save_seconds": 4.0}]))
    table = read_metrics_table(path)
    assert len(table) == 3
    assert [event["step"] for event in table.of_kind("save_seconds")] == [2]


def test_a_training_record_voids_what_its_step_had_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "val_loss": 8.0},
        {"step": 2, "loss": 7.0},
        {"step": 3, "loss": 6.0},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = read_metrics_table(path)
    assert (table.column("loss").tolist(), table.events) == ([9.0, 7.0, 6.0], [])
    assert read_metrics(path) == [records[0], *records[2:]]


def test_steps_that_go_back_without_a_start_count_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = read_metrics_table(path)
    assert table.column("loss").tolist() == [9.0, 6.0]
    assert table.lost.steps == 2
    assert [record["loss"] for record in read_metrics(path)] == [9.0, 6.0]


STRANGE = [None, True, "5", "", [], {}, [1.0], -1, 0.5, 10**25, -(10**25), 10**400, 1e60, math.nan, math.inf, 3, 1.5]


@settings(deadline=None)
@given(st.data())
def test_values_of_another_type_are_null_in_both_readers(data: Any) -> None:
    """Wherever they stand; a record without a step, or of no kind, is none."""
    records = attempt_records(0, 6, 0, 1000.0) + attempt_records(4, 8, 1, 2000.0)
    for _ in range(data.draw(st.integers(1, 4))):
        record = data.draw(st.sampled_from(records))
        record[data.draw(st.sampled_from(sorted({*record} - {"kind", "attempt"})))] = data.draw(
            st.sampled_from(STRANGE)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        table, expected = read_metrics_table(path), read_metrics(path)
    for record in expected:
        assert all(value is None or fits(key, value) for key, value in record.items())
    train = [record for record in expected if "loss" in record]
    for key in ("step", "tokens", "loss", "step_seconds", "time"):
        values = np.array([record.get(key) for record in train], dtype=float)
        np.testing.assert_array_equal(table.column(key), values)
    assert table.events == [record for record in expected if "loss" not in record and record.get("kind") != "start"]
    assert all(math.isfinite(life.start) and math.isfinite(life.end) for life in table.lives[1:])
    assert math.isfinite(table.lost.seconds)
