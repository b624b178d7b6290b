"""Whose word counts in `state`."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.run_folder import RunFolder
from train.progress import Progress
from train.run.lock import RunLock
from train.run.state import UNCERTAIN, RunState


def test_a_failure_is_not_covered_by_a_rank_that_does_not_know_of_it_yet(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = RunLock(tmp_path, 60)
    lock.take()
    before, first, other = (RunState(folder, lock, 2, Progress()) for _ in range(3))
    before.write_failure("exception", "of the start before")
    first.write("running", "started", Progress())
    assert (folder.read_state() or {})["status"] == "running", "a new start is told"

    other.write_failure("exception", "an error on rank 1")
    first.write("running", "saved", Progress(5))
    first.write_failure("lost_rank", f"{UNCERTAIN}, seen from rank 0", certain=False)

    state = folder.read_state() or {}
    assert (state["status"], state["failure"], state["reason"]) == (
        "failed",
        "exception",
        "an error on rank 1",
    )
    lock.release()


def test_a_failure_outlasts_a_write_that_another_rank_had_begun(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = RunLock(tmp_path, 60)
    lock.take()
    first, other = (RunState(folder, lock, 2, Progress()) for _ in range(2))
    # the first word of its own: nothing stops it
    late = threading.Timer(0.3, lambda: first.write("running", "saved", Progress(5)))
    late.start()

    other.write_failure("exception", "an error on rank 1")

    late.join()
    assert (folder.read_state() or {})["reason"] == "an error on rank 1"
    lock.release()


@pytest.mark.parametrize(
    "late_word",
    [
        lambda state: state.write("running", "saved", Progress(5)),
        lambda state: state.write_failure("lost_rank", "rank 1 vanished"),
    ],
)
def test_a_failure_is_not_covered_by_a_word_that_waited_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_word: Callable[[RunState], bool | None]
) -> None:
    """A busy disk may take many seconds to sync what rank 0 had begun to write before rank 1 failed."""
    folder = RunFolder(tmp_path)
    lock = RunLock(tmp_path, 60)
    lock.take()
    first, other = (RunState(folder, lock, 2, Progress()) for _ in range(2))
    first.write("running", "started", Progress())
    waits, goes_on, answers = threading.Event(), threading.Event(), list[bool | None]()
    slow = threading.Thread(target=lambda: answers.append(late_word(first)))
    fsync = os.fsync

    def busy_disk(descriptor: int) -> None:
        if threading.current_thread() is slow:
            waits.set()
            assert goes_on.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", busy_disk)
    slow.start()
    assert waits.wait(60)
    assert other.write_failure("exception", "an error on rank 1")
    goes_on.set()
    slow.join()

    assert not answers[0]
    assert (folder.read_state() or {})["reason"] == "an error on rank 1"
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
