"""Lines that a file system does not take wait, in order, and are there once it does."""

import errno
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.metrics_file import MetricsFile, read_json_lines
from common.patient_file import PatientFile


def numbers(path: Path) -> list[int]:
    return [record["number"] for record in read_json_lines(path)]


def append_all(file: PatientFile, found: Iterable[int]) -> None:
    for number in found:
        file.append({"number": number})


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A limit that a write beyond it meets in the middle of a line."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_wait_for_room_in_order(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "lines", retry_seconds=0)
    file.append({"number": 0})
    file.sync()
    with no_file_larger_than(20):  # in the middle of the second line
        for number in range(1, 5):
            file.append({"number": number})
        assert file.trouble is not None and file.trouble.errno == errno.EFBIG
        with pytest.raises(OSError, match="File too large") as refused:
            file.sync()
        assert refused.value.filename == str(tmp_path / "lines")
    file.append({"number": 5})
    assert numbers(tmp_path / "lines") == list(range(6)), "at once, without a sync"
    file.append({"number": 6})
    file.close()
    assert numbers(tmp_path / "lines") == list(range(7))
    assert len((tmp_path / "lines").read_bytes().splitlines()) == 7, "nothing torn, nothing twice"


def test_what_a_failed_sync_may_have_dropped_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a system drops it: the pages are clean after the error, and lost; the next fsync succeeds."""
    path = tmp_path / "lines"
    file = PatientFile(path)
    file.append({"number": 0})
    file.sync()
    on_disk = path.stat().st_size
    file.append({"number": 1})
    file.append({"number": 2})
    fsync = os.fsync

    def losing(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        os.truncate(path, on_disk)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", losing)
    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    file.append({"number": 3})  # waits: the file is left alone for a while
    assert numbers(path) == [0]
    file.close()
    assert numbers(path) == [0, 1, 2, 3]


def test_lines_of_another_process_are_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = PatientFile(path, retry_seconds=0)
    with no_file_larger_than(5):
        file.append({"number": 0})
    other = MetricsFile(path)  # closes the torn line
    for number in (10, 11):
        other.append({"number": number})
    other.close()
    file.append({"number": 1})
    file.close()
    assert numbers(path) == [10, 11, 0, 1]


def test_more_than_memory_may_hold_is_an_error_and_nothing_is_where_all_is_written(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "lines", most_bytes=100, retry_seconds=0)
    for number in range(50):
        file.append({"number": number})  # never synced: only the newest are kept
    assert file.trouble is None
    with no_file_larger_than(5), pytest.raises(OSError, match="File too large"):
        append_all(file, range(50, 100))
    file.close()
    found = numbers(tmp_path / "lines")
    assert found == list(range(len(found))) and len(found) > 50
