"""What stays and what goes, for any course of a run; and what is nobody's to delete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.checkpoint_files import find_checkpoint, list_checkpoints, verify_checkpoint
from common.errors import UserError
from common.run_folder import RunFolder
from model.weights import load_model
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.manifests import WHOLE
from train.checkpoints.resume import choose_checkpoint
from train.checkpoints.retention import (
    Checkpoint,
    delete,
    expendable,
    keep_weights,
    set_aside_expendable,
    sweep_leftovers,
)
from train.settings.command_line import as_dict
from train.settings.sections import CheckpointConfig, Config


@given(
    checkpoints=st.dictionaries(st.integers(1, 60), st.none() | st.floats(0, 10), min_size=1, max_size=12),
    keep_last=st.integers(1, 4),
    keep_every=st.integers(0, 12),
    keep_best=st.booleans(),
    data=st.data(),
)
def test_the_newest_the_multiples_the_best_and_the_one_resumed_from_stay(
    checkpoints, keep_last, keep_every, keep_best, data
) -> None:
    never = data.draw(st.none() | st.sampled_from(sorted(checkpoints)))
    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every, keep_best=keep_best)
    gone = expendable([Checkpoint(*item) for item in checkpoints.items()], config, never)
    assert gone <= checkpoints.keys()
    measured = {step: loss for step, loss in checkpoints.items() if loss is not None}
    for step, loss in checkpoints.items():
        newer = sum(other > step for other in checkpoints)
        best = loss is not None and all((loss, step) <= (other, at) for at, other in measured.items())
        kept = newer < keep_last or (keep_every and step % keep_every == 0) or (keep_best and best) or step == never
        assert (step not in gone) == bool(kept)


def make_checkpoint(folder: Path, step: int, **facts: object) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "checkpoint.json").write_text(json.dumps({**WHOLE, "step": step, **facts}))
    return path


def test_what_cant_be_parsed_or_is_newer_is_neither_deleted_nor_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 4, format_version=99)
    torn = make_checkpoint(tmp_path, 5)
    (torn / "checkpoint.json").write_text('{"format_ver')
    (tmp_path / "step-00000006").mkdir()  # without a manifest
    (tmp_path / "step-00000007").touch()  # no folder at all
    (tmp_path / "step-0000008x").mkdir()
    everything = {path.name for path in tmp_path.iterdir()}
    (tmp_path / ".space-0a1b2c3d.tmp").write_bytes(bytes(10))  # a start that was cut short while it asked for room
    config = CheckpointConfig(keep_last=2)
    aside = set_aside_expendable(tmp_path, config, last=8, resumed_from=None)
    assert [path.name[:14] for path in aside] == [".step-00000001"]
    assert set_aside_expendable(tmp_path, config, last=8, resumed_from=None) == []
    sweep_leftovers(tmp_path)  # a deletion that was cut short is finished
    assert {path.name for path in tmp_path.iterdir()} == everything - {"step-00000001"}


def test_a_beginning_in_another_run_that_is_gone_keeps_nothing_from_going(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    aside = set_aside_expendable(tmp_path, CheckpointConfig(keep_last=2), last=3, resumed_from=tmp_path / "a" / "step")
    assert [path.name[:14] for path in aside] == [".step-00000001"]
    own = tmp_path / "step-00000002"
    assert set_aside_expendable(tmp_path, CheckpointConfig(keep_last=1), last=3, resumed_from=own) == []


@pytest.mark.parametrize(
    ("facts", "stays"),
    [
        ({"val_loss": 1.0, "val_step": 1}, True),
        ({"val_loss": 1.0, "val_step": 0}, False),  # measured with other weights
        ({"val_loss": 1.0}, False),
        ({"val_loss": None, "val_step": 1}, False),
        ({"val_loss": float("nan"), "val_step": 1}, False),
    ],
)
def test_the_best_is_the_lowest_loss_of_its_own_step(tmp_path: Path, facts: dict[str, object], stays: bool) -> None:
    make_checkpoint(tmp_path, 1, **facts)
    make_checkpoint(tmp_path, 2, val_loss=2.0, val_step=2)
    make_checkpoint(tmp_path, 3, val_loss=3.0, val_step=3)
    delete(set_aside_expendable(tmp_path, CheckpointConfig(keep_last=1), last=3, resumed_from=None))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 1 if stays else 2]


def config_of(length: int, tokens: int, mask: bool = False) -> dict[str, Any]:
    asked = {"model": {"block_size": length}, "eval": {"tokens": tokens}, "data": {"document_mask": mask}}
    return {**as_dict(Config()), **asked}


def measured(step: int, loss: float, tokens: int, **facts: object) -> dict[str, object]:
    """What a manifest says of a validation, as today or, with `older`, without what it was measured on."""
    older = facts.pop("older", False)
    config = config_of(16, tokens)
    on = {"val_sha256": "ab" * 32, "val_tokens": min(tokens, 640), "val_block_size": 16, "val_document_mask": False}
    facts = {"data_identity": "cd" * 32, "config": config, **({} if older else on), **facts}
    return {"val_loss": loss, "val_step": step, **facts}


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("changed", [
    {"config": config_of(32, 32), "val_block_size": 32},
    {"config": config_of(16, 32, mask=True), "val_document_mask": True},
    {"val_sha256": "ba" * 32, "data_identity": "dc" * 32},
    {"config": config_of(16, 512), "val_tokens": 512},
])  # fmt: skip
def test_losses_that_were_measured_on_something_else_are_no_rivals_of_the_best(
    tmp_path: Path, older: bool, changed: dict[str, object]
) -> None:
    """The loss over 32 tokens was the best for ever."""
    make_checkpoint(tmp_path, 1, **measured(1, 0.5, 32, older=older))
    for step, loss in ((2, 3.0), (3, 2.0), (4, 2.5)):
        make_checkpoint(tmp_path, step, **measured(step, loss, 32, **changed))
    make_checkpoint(tmp_path, 5, **measured(4, 2.5, 32, **changed))  # not measured at its own step
    delete(set_aside_expendable(tmp_path, CheckpointConfig(keep_last=1), last=5, resumed_from=None))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5, 3]


@pytest.mark.parametrize("tokens", [32, 10_000])
def test_the_best_of_an_older_version_is_still_the_best(tmp_path: Path, tokens: int) -> None:
    """Their manifests tell how many tokens were wanted, today's how many there were: 640 at most."""
    make_checkpoint(tmp_path, 1, **measured(1, 1.5, tokens, older=True))
    make_checkpoint(tmp_path, 2, **measured(2, 2.0, tokens))
    make_checkpoint(tmp_path, 3, **measured(3, 2.5, tokens))
    delete(set_aside_expendable(tmp_path, CheckpointConfig(keep_last=1), last=3, resumed_from=None))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 1]


def test_the_one_resumed_from_stays_by_whatever_path_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / "run", step)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    resumed_from = Path("elsewhere/step-00000001")
    delete(set_aside_expendable(tmp_path / "run", CheckpointConfig(keep_last=1), last=3, resumed_from=resumed_from))
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [3, 1]


@pytest.mark.parametrize("links", [True, False])
def test_weights_alone_outlive_their_checkpoint_and_are_evaluated_but_not_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = write_checkpoint(checkpoints, step=7)
    if not links:  # as some network file systems answer

        def no_link(source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", no_link)
    synced, fsync = set(), os.fsync

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr("os.fsync", noting_fsync)
    weights = keep_weights(whole, 7)
    names = [path.name for path in whole.glob("weights-*")]
    assert links or all((weights / name).stat().st_ino in synced for name in names)
    assert all((weights / name).samefile(whole / name) == links for name in names)
    before = {name: tensor.clone() for name, tensor in load_model(whole).state_dict().items()}
    shutil.rmtree(whole)
    assert find_checkpoint(weights) == weights
    assert sorted(path.name for path in weights.iterdir()) == ["checkpoint.json", *sorted(names)]
    assert verify_checkpoint(weights)["step"] == 7
    assert all(tensor.equal(before[name]) for name, tensor in load_model(weights).state_dict().items())
    assert choose_checkpoint("auto", RunFolder(tmp_path / "run")) == (None, [])
    with pytest.raises(UserError, match=r"holds only weights.*--run\.name NAME for another run, .* a new optimizer"):
        choose_checkpoint(str(weights), RunFolder(tmp_path / "run"))
    assert choose_checkpoint(str(weights), RunFolder(tmp_path / "another")) == (weights, [])


def test_a_run_that_went_back_replaces_its_weights_copy(tmp_path: Path) -> None:
    keep_weights(write_checkpoint(tmp_path, step=7), 7)
    second = write_checkpoint(tmp_path, step=7, seed=1)
    kept = keep_weights(second, 7)
    assert verify_checkpoint(kept)["files"].items() <= verify_checkpoint(second)["files"].items()
    assert sorted(path.name for path in tmp_path.iterdir()) == [second.name, kept.name]
    for name in (second.name, kept.name, "step-00000008"):  # killed while it was being replaced
        (tmp_path / f"{name}.replaced-0a1b2c3d").mkdir()
    sweep_leftovers(tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [second.name, "step-00000008.replaced-0a1b2c3d", kept.name]


def test_weights_for_good_that_a_kill_prevented_are_kept_before_their_checkpoint_goes(tmp_path: Path) -> None:
    for step in (4, 6, 8, 10):
        write_checkpoint(tmp_path, step=step)
    keep_weights(tmp_path / "step-00000006", 6)
    before = (tmp_path / "weights-00000006").stat().st_ino
    next((tmp_path / "step-00000008").glob("weights-*")).unlink()  # of which nothing can be kept
    config = CheckpointConfig(every_steps=2, keep_last=1, keep_best=False, weights_every_steps=2)
    delete(set_aside_expendable(tmp_path, config, last=10, resumed_from=None))
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["step-00000010", "weights-00000004", "weights-00000006"]
    assert (tmp_path / "weights-00000006").stat().st_ino == before
    assert verify_checkpoint(tmp_path / "weights-00000004")["step"] == 4
