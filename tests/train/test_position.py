"""A loader's position counts in one order of sequences: in other data, or cut otherwise, a run begins at the first."""

from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest, write_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train
from train.batches.shuffle import windows_at
from train.checkpoints.resume import check_same_run
from train.progress import Progress
from train.settings.sections import Config, DataConfig, ModelSection, RunConfig
from train.startup.position import Reading, begin_progress

STEP_SEQUENCES = 4
# sequences of 8 tokens, 4 of them a step; a constant rate, so that runs of any length have the same one
SMALL = (
    "--model.block_size=8",
    "--model.position=rope",
    "--batch.tokens_per_step=32",
    "--batch.micro_batch=2",
    "--schedule.kind=constant",
    "--checkpoint.every_steps=2",
    "--checkpoint.keep_last=99",
    "--eval.every_steps=0",
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """40 sequences of 8 tokens, and 24."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, (name, sequences) in enumerate({"a": 40, "b": 24}.items()):
        make_token_set(folder / name, train_tokens=8 * sequences + 1, val_tokens=100, seed=seed)
    return folder / "a", folder / "b"


def read_by(run: RunFolder) -> list[int]:
    """The windows that a run has read, in steps of four."""
    return [window for record in read_metrics(run.metrics) for window in record.get("sequences", [])]


def newest(run: RunFolder) -> Path:
    return list_checkpoints(run.checkpoints)[0][1]


def forget_what_positions_count(run: RunFolder) -> None:
    """Make a run's checkpoints such as were written before positions had a place of their own."""
    for _, path in list_checkpoints(run.checkpoints):
        facts = read_checkpoint_manifest(path)
        del facts["position_in"], facts["manifest_sha256"]
        write_checkpoint_manifest(path, facts)


@pytest.mark.parametrize("older", [False, True])
def test_a_branch_on_other_data_reads_each_of_their_sequences_once(
    tmp_path: Path, sets: tuple[Path, Path], older: bool
) -> None:
    a, b = sets
    train(1, tmp_path, tiny_arguments(tmp_path, a, "trunk", *SMALL, "--run.max_steps=4"))
    trunk = run_of(tmp_path, "trunk")
    if older:
        forget_what_positions_count(trunk)
    other = (*SMALL, f"--resume={newest(trunk)}", "--allow-change=data.path")
    arguments = tiny_arguments(tmp_path, b, "branch", *other, "--run.max_steps=10")
    train(2, tmp_path, arguments)
    branch = run_of(tmp_path, "branch")
    assert sorted(read_by(branch)) == list(range(24))
    log = branch.log.read_text()
    assert "the run reads 192, 1.00 epochs" in log
    assert "the 16 sequences that were read up to the checkpoint were of another order (other token set)" in log
    manifest = read_checkpoint_manifest(newest(branch))
    assert (manifest["step"], manifest["tokens"], manifest["sequences"]) == (10, 320, 24)

    # killed and resumed, it is the same run; and its own branch on the same data reads on
    stopped = tiny_arguments(tmp_path, b, "stopped", *other)
    train(2, tmp_path, [*stopped, "--run.max_steps=6"])
    train(2, tmp_path, [*stopped, "--run.max_steps=10"])
    assert losses(run_of(tmp_path, "stopped")) == losses(branch)
    assert read_by(run_of(tmp_path, "stopped")) == read_by(branch)
    assert run_of(tmp_path, "stopped").log.read_text().count("of another order") == 1
    assert "the run reads 192, 1.00 epochs" in run_of(tmp_path, "stopped").log.read_text()
    six = run_of(tmp_path, "stopped").checkpoints / "step-00000006"
    train(1, tmp_path, tiny_arguments(tmp_path, b, "second", *SMALL, f"--resume={six}", "--run.max_steps=10"))
    assert read_by(run_of(tmp_path, "second")) == read_by(branch)[2 * STEP_SEQUENCES :]
    # back on the first set its beginning comes again, as the log says
    back = (*SMALL, f"--resume={newest(branch)}", "--allow-change=data.path", "--run.max_steps=12")
    train(1, tmp_path, tiny_arguments(tmp_path, a, "back", *back))
    assert read_by(run_of(tmp_path, "back")) == read_by(trunk)[: 2 * STEP_SEQUENCES]
    assert "text may be read again" in run_of(tmp_path, "back").log.read_text()


def test_sequences_of_twice_the_length_are_counted_from_the_first(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    """32 sequences of 8 tokens were taken for 32 of 16, of which there are 20."""
    train(1, tmp_path, tiny_arguments(tmp_path, sets[0], "short", *SMALL, "--run.max_steps=8"))
    longer = (*SMALL, "--model.block_size=16", "--batch.tokens_per_step=64", "--run.max_steps=13")
    changes = ("--allow-change=model.block_size", "--allow-change=batch.tokens_per_step")
    resume = f"--resume={newest(run_of(tmp_path, 'short'))}"
    train(1, tmp_path, tiny_arguments(tmp_path, sets[0], "long", *longer, *changes, resume))
    long = run_of(tmp_path, "long")
    assert sorted(read_by(long)) == list(range(20))
    assert "the run reads 320, 1.00 epochs" in long.log.read_text()
    assert "(other model.block_size, data.stride)" in long.log.read_text()


def reading(**changed: Any) -> Reading:
    return Reading(**{"data_identity": "a", "block_size": 8, "stride": 8, "seed": 1, **changed})


@pytest.mark.parametrize("changed", [{"data_identity": "b"}, {"block_size": 16}, {"stride": 4}, {"seed": 2}])
def test_whatever_gives_another_order_begins_it(changed: dict[str, Any]) -> None:
    manifest = {"step": 3, "tokens": 96, "sequences": 12, **reading().facts()}
    assert begin_progress(manifest, reading()) == (Progress(3, 96, 12), [])
    progress, lines = begin_progress(manifest, reading(**changed))
    assert progress == Progress(3, 96, 0)
    assert len(lines) == 1
    # of a mix that held this set, whose position in it is known
    (line,) = begin_progress(manifest | {"mix": {"sets": [["web", "b"], ["code", "c"]]}}, reading(**changed))[1]
    assert ("as the only source of data.mix" in line) == (changed == {"data_identity": "b"})


def test_a_stride_of_a_whole_sequence_is_none() -> None:
    plain, stated = (
        Config(ModelSection(block_size=8), DataConfig(stride=stride), run=RunConfig(seed=1)) for stride in (None, 8)
    )
    assert Reading.of(plain, "a") == Reading.of(stated, "a") == reading()


def test_the_order_has_a_seed_of_its_own(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, sets[0], "apart", *SMALL, "--run.seed=5", "--data.seed=7",
                                      "--run.max_steps=2"))  # fmt: skip
    run = run_of(tmp_path, "apart")
    assert read_by(run) == [window for first in (0, 4) for window in sorted(windows_at(first, 4, 40, 7).tolist())]
    manifest = read_checkpoint_manifest(newest(run))
    assert manifest["position_in"]["seed"] == 7

    def resumed_with(own: int | None, seed: int, *allowed: str) -> None:
        config = manifest["config"]
        changed = {"data": config["data"] | {"seed": own}, "run": config["run"] | {"seed": seed}}
        check_same_run(newest(run), config | changed, str(manifest["data_identity"]), list(allowed), optimizer="adamw")

    resumed_with(7, 5)
    resumed_with(None, 7, "run.seed")  # other weights at the start, the same order
    resumed_with(8, 5, "data.seed")
    with pytest.raises(UserError, match=r"trained with data.seed 7, this run has 8: .* --allow-change data.seed"):
        resumed_with(8, 5)


def test_an_imported_model_has_read_nothing() -> None:
    imported = {"step": 0, "tokens": 0, "sequences": 0, "data_identity": None}
    assert begin_progress(imported, reading()) == (Progress(), [])
    assert begin_progress(None, reading()) == (Progress(), [])
