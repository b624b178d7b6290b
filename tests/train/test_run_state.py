"""Whose word counts in `state`."""

import threading
from pathlib import Path

from common.run_folder import RunFolder
from train.checkpoint import Progress
from train.run_lock import RunLock
from train.run_state import UNCERTAIN, RunState


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
