"""Ctrl-C is answered at once, whatever the trainer does; a second one drops work, and the same command resumes."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_as_rank
from train.progress import Progress
from train.stopping import ctrl_c
from train.stopping.ctrl_c import CtrlC

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux delivers them")


def train_until_validation_stands(arguments: list[str], standing: Path, errors: Path) -> None:
    """Rank 0 never gets through its validation at step 10, and its main thread never gets to handle a signal."""
    from train.evaluations.validation import Validation

    measure = Validation.measure

    def stand(self: Validation, progress: Progress, parts: tuple[int, ...]) -> None:
        if progress.step < 10 or os.environ["RANK"] != "0":
            return measure(self, progress, parts)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a long backward: other threads get it
        reader, _ = os.pipe()
        standing.touch()
        os.read(reader, 1)
        return None

    Validation.measure = stand  # type: ignore[method-assign]
    ctrl_c.SAME_SECONDS = 0.0  # the test is faster than a person
    if os.environ["RANK"] == "0":
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    train_as_rank(arguments)


def test_a_second_ctrl_c_drops_work_and_the_same_command_resumes(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=2_001, val_tokens=500)
    arguments, run = tiny_arguments(tmp_path, tmp_path / "data", "dropped"), run_of(tmp_path, "dropped")
    standing, errors = tmp_path / "standing", tmp_path / "errors"
    group = RankGroup(2, tmp_path / "store", train_until_validation_stands, arguments, standing, errors)
    first, other = group.processes
    while not standing.exists():
        assert first.is_alive()

    assert first.pid is not None
    os.kill(first.pid, signal.SIGINT)
    while "as soon as this is done: validating; Ctrl-C again within 10 s drops it" not in errors.read_text():
        assert first.is_alive() and other.is_alive()
    os.kill(first.pid, signal.SIGINT)

    assert group.join() == [130, 1]
    assert "resumes from step 5" in errors.read_text().splitlines()[-1]
    state = run.read_state()
    assert state is not None
    assert (state["status"], state["stop"], state["step"]) == ("preempted", "signal", 5)
    assert "SIGINT twice, without a save" in run.log.read_text()

    train(2, tmp_path, arguments)
    assert (run.read_state() or {})["status"] == "done"
    assert list(losses(run)) == list(range(1, 21))


def test_a_ctrl_c_after_ten_seconds_is_another_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    answers = CtrlC(speaks=True)

    assert [answers.ends(seconds) for seconds in (0.0, 0.2, 11.0, 20.0)] == [False, False, False, True]
    assert capsys.readouterr().err.count("Ctrl-C again within 10 s drops it") == 2
