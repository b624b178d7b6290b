"""A run's folder that goes away under it, and calls that fail at the very end: one line, and the right status."""

import errno
import os
from pathlib import Path

import pytest

from common.checkpoint_files import list_checkpoints
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train_as_rank


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


def train_and_tell(arguments: list[str], told: Path) -> None:
    """A trainer each of whose ranks has a file for its stderr."""
    os.environ["SLURM_LOCALID"] = os.environ["LOCAL_RANK"]  # a launcher's: of a machine's ranks one tells
    os.dup2(os.open(f"{told}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    train_as_rank(arguments)


def train_with_closes_that_fail(arguments: list[str], told: Path) -> None:
    """As NFS reports a quota: the descriptor is closed, and an error given for what was written long before."""
    close = os.close

    def failing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if "/runs/" in path:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    setattr(os, "close", failing)  # noqa: B010
    train_and_tell(arguments, told)


def test_a_close_that_fails_makes_no_finished_run_a_failed_one(tmp_path: Path, data: Path) -> None:
    arguments, told = tiny_arguments(tmp_path, data, "closed", "--checkpoint.every_steps=0"), tmp_path / "stderr"
    assert RankGroup(2, tmp_path / "store", train_with_closes_that_fail, arguments, told).join() == [0, 0]
    run = run_of(tmp_path, "closed")
    assert (run.read_state() or {})["status"] == "done"
    assert "Traceback" not in "".join(Path(f"{told}-{rank}").read_text() for rank in (0, 1))
    assert not run.lock.exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_is_gone_ends_the_run_in_one_line_a_rank(tmp_path: Path, data: Path, world_size: int) -> None:
    """Every path in it gives an error from then on, as of a server that has forgotten it."""
    arguments, told = tiny_arguments(tmp_path, data, "gone", "--run.max_steps=100000"), tmp_path / "stderr"
    run, aside = run_of(tmp_path, "gone"), tmp_path / "aside"
    group = RankGroup(world_size, tmp_path / "store", train_and_tell, arguments, told)
    while not list_checkpoints(run.checkpoints):
        assert group.processes[0].is_alive()
    run.path.rename(aside)
    run.path.write_text("no folder any more")
    assert group.join() == [2] * world_size
    for rank in range(world_size):
        text = Path(f"{told}-{rank}").read_text()
        assert "Traceback" not in text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == (1 if rank == 0 else 0), text
    assert list_checkpoints(aside / "checkpoints")
