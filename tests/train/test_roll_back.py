"""A roll-back: the run that was told to pass over the data; the same, whichever act of it a kill comes after."""

import json
import os
import pathlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest, write_checkpoint_manifest
from common.metrics_file import read_json_lines
from common.metrics_table import read_metrics_table
from common.run_folder import RunFolder
from tests.helpers.garbage import make_planted_set
from tests.helpers.ranks import RankGroup
from tests.helpers.training import curve, run_of, train, train_as_rank, weights_hashes
from train.checkpoints import roll_back
from train.checkpoints.retention import Checkpoint, expendable, set_aside_passed
from train.run.spikes import SUSTAINED
from train.settings.sections import CheckpointConfig

SEQUENCES, BLOCK, SEED = 24, 8, 3
BASE, BACK_TO, DECIDED, LAST = 136, 139, 142, 146
YAML = """
model: {block_size: 8, n_layer: 1, n_head: 1, n_embd: 16, mlp_hidden: 32}
optim: {lr: 2.0e-2}
schedule: {warmup: 3, kind: constant}
batch: {tokens_per_step: 192, micro_batch: 4}
checkpoint: {every_steps: 0, keep_best: false}
eval: {every_steps: 0, tokens: 512, prompts: []}
log: {sequences: true}
run: {seed: 3, dtype: fp32, device: cpu, on_spike: rollback, max_skips: 2}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of which steps 140 to 142 read garbage, and a run `base` of 136 steps."""
    folder = tmp_path_factory.mktemp("rolled")
    garbage = range(BACK_TO + 1, DECIDED + 1)
    make_planted_set(folder / "data", garbage, run_steps=160, sequences=SEQUENCES, block_size=BLOCK, seed=SEED)
    (folder / "options.yaml").write_text(YAML)
    train(1, folder, arguments(folder, "base", f"--run.max_steps={BASE}"))
    return folder


def arguments(root: Path, name: str, *more: str) -> list[str]:
    where = [f"--config={root / 'options.yaml'}", mix_of_one(root), f"--run.root={root / 'runs'}"]
    return [*where, f"--run.name={name}", f"--run.max_steps={LAST}", *more]


def mix_of_one(root: Path, **more: float) -> str:
    """An order of sources, too, is passed over by a roll-back."""
    return f"--data.mix={json.dumps([{'name': 'only', 'path': str(root / 'data'), **more}])}"


def from_base(root: Path, name: str) -> RunFolder:
    shutil.copytree(root / "runs" / "base", root / "runs" / name)
    return run_of(root, name)


EACH = "--checkpoint.every_steps=1"
LIMIT = 0.92  # epochs: the run plans 0.9125, a roll-back adds 0.0188


@pytest.fixture(scope="module")
def rolled(root: Path) -> RunFolder:
    """A run that was rolled back, undisturbed."""
    run = from_base(root, "rolled")
    train(1, root, arguments(root, "rolled", EACH, mix_of_one(root, max_epochs=LIMIT)))
    return run


def manifest_of(run: RunFolder, step: int) -> Any:
    return read_checkpoint_manifest(run.checkpoints / f"step-{step:08d}")


def test_a_roll_back_is_the_run_that_was_told_to_pass_over_the_data(root: Path, rolled: RunFolder) -> None:
    (fact,) = manifest_of(rolled, LAST)["spikes"]["rollbacks"]
    assert (fact["first_step"], fact["from_step"], fact["to_step"]) == (BACK_TO + 1, DECIDED, BACK_TO)
    assert (fact["sequences_from"], fact["sequences_to"]) == (BACK_TO * SEQUENCES, DECIDED * SEQUENCES)
    told = from_base(root, "told")
    train(1, root, arguments(root, "told", f"--run.max_steps={BACK_TO}"))
    manifest = manifest_of(told, BACK_TO)
    write_checkpoint_manifest(told.checkpoints / f"step-{BACK_TO:08d}", {**manifest, "sequences": DECIDED * SEQUENCES})
    train(1, root, arguments(root, "told"))
    assert after(rolled) == after(told) and len(after(rolled)) == LAST - BACK_TO + 1
    assert weights_hashes(list_checkpoints(rolled.checkpoints)[0][1]) == weights_hashes(
        list_checkpoints(told.checkpoints)[0][1]
    )
    one, other = (manifest_of(run, LAST) for run in (rolled, told))
    assert one["sequences"] == other["sequences"] == (LAST - BACK_TO + DECIDED) * SEQUENCES
    assert one["spikes"]["trend"] == other["spikes"]["trend"]
    assert (one["spikes"]["skips"], other["spikes"]["skips"]) == (3, 0)
    beyond = (DECIDED - BACK_TO) * SEQUENCES * BLOCK
    assert f"read beyond what was planned at the start: only {beyond}\n" in rolled.log.read_text()
    # two ranks decide alike
    both = from_base(root, "both")
    train(2, root, arguments(root, "both", EACH))
    assert manifest_of(both, LAST)["spikes"]["rollbacks"] == [fact]
    assert [record[5] for record in after(both)] == [record[5] for record in after(rolled)], "sequences"
    # what was moved aside is deleted once the run has passed it
    assert list(rolled.checkpoints.glob("*rolled-back*")) == []
    # the record keeps what was rolled back
    table = read_metrics_table(rolled.metrics)
    (lost,) = table.rollbacks
    assert lost.steps.tolist() == [140, 141, 142] and lost.losses.min() > 3
    assert table.column("step").tolist() == list(range(1, LAST + 1)) and table.skips == 3


def test_two_ranks_with_a_sharded_muon_are_rolled_back_to_the_bit(root: Path) -> None:
    options = ["--optim.kind=muon", "--optim.shard=true", "--optim.ema_half_life_tokens=2000", "--eval.weights=ema"]
    train(2, root, arguments(root, "muon", *options, f"--run.max_steps={BACK_TO}", EACH))
    told = RunFolder(shutil.copytree(root / "runs" / "muon", root / "runs" / "muon-told"))
    train(2, root, arguments(root, "muon", *options, EACH))
    (fact,) = manifest_of(run_of(root, "muon"), LAST)["spikes"]["rollbacks"]
    assert (fact["to_step"], fact["sequences_to"]) == (BACK_TO, DECIDED * SEQUENCES)
    manifest = manifest_of(told, BACK_TO)
    write_checkpoint_manifest(told.checkpoints / f"step-{BACK_TO:08d}", {**manifest, "sequences": DECIDED * SEQUENCES})
    train(2, root, arguments(root, "muon-told", *options))
    assert after(run_of(root, "muon")) == after(told)
    ends = [weights_hashes(list_checkpoints(run.checkpoints)[0][1]) for run in (run_of(root, "muon"), told)]
    assert ends[0] == ends[1] and {name.split(":")[0] for name in ends[0]} == {"weights", "optimizer", "ema"}


def test_a_skipped_step_leaves_the_averaged_weights_to_the_bit(root: Path) -> None:
    run = from_base(root, "averaged")
    options = ["--optim.ema_half_life_tokens=2000", "--run.on_spike=skip", "--run.max_skips=8"]
    train(1, root, arguments(root, "averaged", *options, EACH, "--checkpoint.keep_last=20"))
    found = {step: weights_hashes(path) for step, path in list_checkpoints(run.checkpoints)}
    found = {step: {k: v for k, v in all_.items() if k.startswith("ema:")} for step, all_ in found.items()}
    assert found[BASE] == {} and manifest_of(run, LAST)["ema"]["start_tokens"] == BASE * SEQUENCES * BLOCK
    assert manifest_of(run, LAST)["spikes"]["skipped"] == [140, 141, 142]
    changed = [step for step in range(BASE + 2, LAST + 1) if found[step] != found[step - 1]]
    assert changed == [138, 139, 143, 144, 145, 146]


def test_a_loss_that_stays_above_its_trend_rolls_a_run_back(root: Path, tmp_path: Path) -> None:
    """Some garbage in each of many steps: none is bad enough to be skipped."""
    steps = range(BACK_TO + 1, BACK_TO + 1 + SUSTAINED + 2)
    make_planted_set(
        tmp_path / "data", steps, run_steps=180, sequences=SEQUENCES, block_size=BLOCK, seed=SEED, spoilt=5
    )
    (tmp_path / "options.yaml").write_text(YAML)
    train(1, tmp_path, arguments(tmp_path, "raised", f"--run.max_steps={steps.stop + 4}", EACH))
    spikes = manifest_of(run_of(tmp_path, "raised"), steps.stop + 4)["spikes"]
    (fact,) = spikes["rollbacks"]
    assert (fact["first_step"], fact["from_step"], fact["to_step"]) == (BACK_TO + 1, BACK_TO + SUSTAINED, BACK_TO)
    assert spikes["skips"] == 0


def after(run: RunFolder) -> list[tuple[str, ...]]:
    """The curve after the step that the run was rolled back to, its last validation included."""
    return [record for record in curve(run) if int(record[0]) > BACK_TO]


def killing(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """This process ends before or after the function."""

    def deadly(*arguments: Any, **keywords: Any) -> None:
        if after:
            function(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    return deadly


def rename_and_die(path: Path, target: Path) -> Path:
    os.rename(path, target)
    if "rolled-back" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return target


def train_until_killed(arguments: list[str], act: str) -> None:
    patch = pytest.MonkeyPatch()
    if act == "first move":
        patch.setattr(pathlib.Path, "rename", rename_and_die)
    else:
        name, moment = act.split()
        patch.setattr(roll_back, name, killing(getattr(roll_back, name), after=moment == "after"))
    train_as_rank(arguments)


ACTS = ["first move", "load_on_all_ranks after", "write_checkpoint_manifest before",
        "write_checkpoint_manifest after"]  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_killed_between_two_acts_it_is_the_same_run(root: Path, rolled: RunFolder, act: str) -> None:
    name = act.replace(" ", "-")
    run, options = from_base(root, name), arguments(root, name, EACH, mix_of_one(root, max_epochs=LIMIT))
    assert RankGroup(1, root / "store", train_until_killed, options, act).join() == [-signal.SIGKILL]
    train(1, root, options)
    assert after(run) == after(rolled)
    ends = [list_checkpoints(each.checkpoints)[0][1] for each in (run, rolled)]
    assert weights_hashes(ends[0]) == weights_hashes(ends[1])
    assert manifest_of(run, LAST)["spikes"] == manifest_of(rolled, LAST)["spikes"]
    assert len(read_metrics_table(run.metrics).rollbacks) == 1


def test_a_run_that_can_not_be_rolled_back_stops_with_a_sentence(root: Path) -> None:
    base = run_of(root, "base").checkpoints / f"step-{BASE:08d}"
    again = from_base(root, "again")
    for name, options, sentence in (
        ("again", (EACH, "--run.max_rollbacks=0"), "permits: lower optim.lr"),
        ("unsaved", (f"--resume={base}",), "no whole checkpoint is from before step 140: lower optim.lr"),
    ):
        assert RankGroup(1, root / "store", train_as_rank, arguments(root, name, *options)).join() == [1]
        state = json.loads(run_of(root, name).state.read_text())
        assert (state["status"], state["failure"]) == ("failed", "exception")
        assert (
            state["reason"].startswith("step 142: 3 of the last 128 steps were skipped") and sentence in state["reason"]
        )
    assert list_checkpoints(again.checkpoints)[0][0] == DECIDED - 1
    assert not any(record.get("kind") == "rollback" for record in read_json_lines(again.metrics))


def test_what_a_run_may_be_rolled_back_to_is_kept() -> None:
    saved = [Checkpoint(step) for step in (5, 10, 15, 20, 25)]
    config = CheckpointConfig(keep_last=1, keep_best=False)
    assert expendable(saved, config, None) == {5, 10, 15, 20}
    assert expendable(saved, config, None, suspected=[15, 21]) == {5, 15}
    assert expendable(saved, config, None, suspected=[3]) == {5, 10, 15, 20}


def test_what_was_moved_aside_and_is_not_whole_is_kept(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.rolled-back-1-0123abcd").mkdir()
    assert set_aside_passed(tmp_path, 7) == []
    assert (tmp_path / "step-00000007.rolled-back-1-0123abcd").exists()
