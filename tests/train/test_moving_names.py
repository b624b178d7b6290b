"""Names that lead elsewhere a moment later: a run that is still training, a path that depends on the working directory.

What they meant at a run's first start is recorded, and stays.
"""

import json
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from common.run_folder import RunFolder
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, losses, run_of, start_ranks_training, tiny_arguments, train, train_by_path
from tests.train.test_finetune import arguments, finetune, refusal, start
from train.checkpoints.resume import choose_checkpoint
from train.startup.from_checkpoint import find_base

CONSTANT = "--schedule.kind=constant"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A run that is still training, as far as its files tell: it has saved step 5."""
    write_checkpoint(tmp_path / "live" / "checkpoints", block_size=16, step=5)
    return tmp_path / "live"


def save_another(live: Path, *, keep: bool = False) -> Path:
    """The live run saves, and its retention deletes (or keeps) the checkpoint before."""
    new = write_checkpoint(live / "checkpoints", block_size=16, step=9, seed=9)
    if not keep:
        shutil.rmtree(live / "checkpoints" / "step-00000005")
    return new


def kill_after_some_steps(group: RankGroup, run: RunFolder) -> None:
    while len(losses(run)) < 2:
        assert group.processes[0].is_alive()
    group.kill()


@pytest.mark.parametrize("rank", [2, 0], ids=["adapters", "all weights"])
def test_a_fine_tuning_keeps_its_base_while_that_run_goes_on(
    tmp_path: Path, data: Path, live: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (CONSTANT, f"--lora.rank={rank}")
    finetune(1, tmp_path, arguments(live, tmp_path, data, "calm", *more, "--run.max_steps=8"))
    first = arguments(live, tmp_path, data, "tuned", *more, "--run.max_steps=5")
    finetune(1, tmp_path, first)
    moved_to = save_another(live)
    run = run_of(tmp_path, "tuned")
    finetune(2, tmp_path, [*first, "--run.max_steps=6"])
    assert f"{live} has moved on to {moved_to.name}: this run keeps the base it started from" in run.log.read_text()
    record = json.loads(run.provenance.read_text())
    for each in record["starts"]:
        del each["base"]  # as versions before recorded it
    run.provenance.write_text(json.dumps(record))
    finetune(1, tmp_path, [*first, "--run.max_steps=8"])
    assert losses(run) == pytest.approx(losses(run_of(tmp_path, "calm")), abs=1e-5)

    write_checkpoint(tmp_path / "other" / "checkpoints", block_size=16, seed=3)
    assert "started from another base" in refusal(monkeypatch, [str(tmp_path / "other"), *first[1:]])
    assert "started from another base" in refusal(monkeypatch, [str(moved_to), *first[1:]])


def test_before_the_first_save_a_base_is_found_again_as_long_as_it_is_there(
    tmp_path: Path, data: Path, live: Path
) -> None:
    more = ("--lora.rank=0", "--checkpoint.every_steps=0", "--run.max_steps=100000")
    command = arguments(live, tmp_path, data, "tuned", *more)
    run = run_of(tmp_path, "tuned")
    kill_after_some_steps(start(1, tmp_path, command), run)
    before = curve(run)[:2]
    save_another(live, keep=True)
    finetune(1, tmp_path, [*command, "--run.max_steps=2", "--schedule.warmup=3"])
    assert curve(run)[:2] == before
    assert f"starting from the weights of {live / 'checkpoints' / 'step-00000005'}" in run.log.read_text()

    shutil.rmtree(run.checkpoints)
    shutil.rmtree(live / "checkpoints" / "step-00000005")
    base = find_base(str(live), run)
    assert base.source.name == "step-00000009"
    assert "step-00000005, the base of an earlier start, is gone" in base.note


def test_a_base_is_looked_for_again_once_the_lock_is_held(tmp_path: Path, live: Path) -> None:
    """Staging and another trainer's lock take time, in which a live run saves and deletes."""
    run = RunFolder(tmp_path / "tuned")
    found = find_base(str(live), run)
    assert found.settled(run) is found
    assert save_another(live) == found.settled(run).source


def test_a_branch_that_has_saved_nothing_begins_where_it_first_began(tmp_path: Path, data: Path) -> None:
    trunk, branch = run_of(tmp_path, "trunk"), run_of(tmp_path, "branch")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "trunk", CONSTANT, "--run.max_steps=5"))
    more = (CONSTANT, f"--resume={trunk.path}", "--checkpoint.every_steps=0")
    kill_after_some_steps(
        start_ranks_training(1, tmp_path, tiny_arguments(tmp_path, data, "branch", *more, "--run.max_steps=100000")),
        branch,
    )
    train(1, tmp_path, tiny_arguments(tmp_path, data, "trunk", CONSTANT, "--run.max_steps=10"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "branch", *more, "--run.max_steps=11"))
    assert min(losses(branch)) == 6
    assert branch.log.read_text().count("resuming after step 5 from ") == 2
    shutil.rmtree(branch.checkpoints)
    shutil.rmtree(trunk.checkpoints / "step-00000005")
    chosen, passed_over = choose_checkpoint(str(trunk.path), branch)
    assert chosen == trunk.checkpoints / "step-00000010"
    assert "step-00000005, from which an earlier launch started, is gone" in passed_over[0]


def test_a_relative_resume_may_be_given_absolute_later_and_elsewhere(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "trunk", CONSTANT, "--run.max_steps=2"))
    branch = run_of(tmp_path, "branch")
    relative = tiny_arguments(tmp_path, data, "branch", CONSTANT, "--run.max_steps=3", "--resume=../runs/trunk")
    (tmp_path / "cwd").mkdir()
    assert train_by_path(*relative, cwd=tmp_path / "cwd").returncode == 0
    given = str(run_of(tmp_path, "trunk").path)
    assert choose_checkpoint(given, branch)[0] == branch.checkpoints / "step-00000003"
    record = json.loads(branch.provenance.read_text())
    assert record["starts"][0]["resumed_from"] == f"{given}/checkpoints/step-00000002"
    record["starts"][0]["resumed_from"] = "../runs/trunk/checkpoints/step-00000002"  # as versions before recorded it
    branch.provenance.write_text(json.dumps(record))
    assert choose_checkpoint(given, branch)[0] == branch.checkpoints / "step-00000003"
    with pytest.raises(UserError, match="did not start from"):
        choose_checkpoint(str(tmp_path / "runs" / "other"), branch)
