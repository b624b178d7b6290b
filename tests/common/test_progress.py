"""Progress off a terminal: lines that end, with the size at once and an ETA later."""

import sys
import time

import pytest

from common import progress
from common.progress import LineBar, ProgressLines, WaitingLines, progress_bar


def test_in_a_log_file_progress_is_lines_that_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not sys.stderr.isatty()
    with progress_bar(12, "shard", "verifying") as bar:
        bar.update()
        monkeypatch.setattr(bar, "_next", 0.0)  # as if five seconds had gone by
        bar.update(2)
        bar.update(9)

    written = capsys.readouterr().err
    first, later, last = written.splitlines()
    assert first == "verifying: 12 shards"
    assert later.startswith("verifying: 3 of 12 shards, ") and later.endswith(" left")
    assert last.startswith("verifying: 12 of 12 shards in ")
    assert "\r" not in written


@pytest.mark.parametrize(
    ("unit", "total", "scale", "line"),
    [
        ("sequence", 1000, False, "work: 250 of 1,000 sequences, 25/s, 30.0 s left"),
        ("tok", 1_000_000_000, True, "work: 250.0M of 1.0B tok, 25.0M/s, 30.0 s left"),
        ("B", 1 << 30, False, "work: 256.0 MiB of 1.0 GiB, 25.6 MiB/s, 30.0 s left"),
        ("file", None, False, "work: 250 files, 25/s"),
    ],
)
def test_a_line_has_the_rate_and_the_time_left(unit: str, total: int | None, scale: bool, line: str) -> None:
    lines = ProgressLines(total, unit, "work", print, scale=scale)
    lines.n = total // 4 if total else 250

    assert lines.line(lines._started + 10.0) == line


@pytest.mark.parametrize(
    ("last", "line"),
    [
        (None, "work: 10.0 s so far, 3 done"),
        (70.0, "work: 10.0 s so far, 3 done, 1 min 00 s left (1 min 10 s the last time)"),
        (9.0, "work: 10.0 s so far, 3 done, longer than 9.0 s the last time"),
    ],
)
def test_work_without_a_count_is_foreseen_by_the_last_time(last: float | None, line: str) -> None:
    lines = WaitingLines("work", lambda: "3 done", print, last)

    assert lines.line(lines._started + 10.0) == line


def test_work_of_seconds_needs_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    lines = ProgressLines(3, "file", "work", shown.append)
    lines.update()
    assert not shown and not lines.shown
    monkeypatch.setattr(time, "monotonic", lambda: lines._started + progress.FIRST_SECONDS)
    lines.update()
    lines.update()
    assert len(shown) == 1 and lines.shown


def test_what_is_done_already_does_not_count_for_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LineBar(100, "file", "work", scale=False, initial=50)
    bar.update(10)
    assert bar.line(bar._started + 10.0) == "work: 60 of 100 files, 1/s, 40.0 s left"
    assert capsys.readouterr().err == "work: 100 files\n"
