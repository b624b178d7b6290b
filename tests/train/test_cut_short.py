"""A run that is cut short between its save and what is measured after it: the next start measures that first."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints
from common.metrics_file import read_json_lines, read_metrics, record_kind
from common.run_folder import RunFolder
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_as_rank, train_by_path
from train.checkpoints.saver import CheckpointKeeper
from train.checkpoints.writer import CheckpointWriter
from train.evaluations.multiple_choice import HellaSwag
from train.run.recorder import Recorder

OF_THE_CLOCK = ("time", "tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A token set, and options that have everything measured at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    questions = write_official(folder / "official.jsonl", official_rows(8, words_at_most=1))
    hellaswag = ("--eval.hellaswag_every_steps=10", f"--eval.hellaswag_data={questions}")
    samples = ("--eval.sample_every_steps=10", '--eval.prompts=["ab", "c"]')
    return folder, [*hellaswag, *samples, "--checkpoint.every_steps=10", "--checkpoint.asynchronous=false"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, given: tuple[Path, list[str]]) -> RunFolder:
    folder = tmp_path_factory.mktemp("calm")
    train(1, folder, tiny_arguments(folder, given[0], "calm", *given[1]))
    return run_of(folder, "calm")


def measured(run: RunFolder) -> list[dict[str, Any]]:
    """All that was recorded, but for times."""
    return [
        {key: value for key, value in record.items() if key not in OF_THE_CLOCK and not key.endswith("_seconds")}
        for record in read_metrics(run.metrics)
        if record_kind(record) not in ("start", "save", "ranks")
    ]


def written(run: RunFolder) -> list[tuple[Any, ...]]:
    return sorted((sample["step"], sample["prompt"], sample["text"]) for sample in read_json_lines(run.samples))


def patch(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **keywords: around(original, *arguments, **keywords))


def killed_after_the_save(step: int) -> None:
    def around(finish: Callable[..., Any], writer: CheckpointWriter, **options: Any) -> Any:
        pending = writer.pending_step
        saved = finish(writer, **options)
        if pending == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return saved

    patch(CheckpointWriter, "finish", around)


def killed_after_the_first_sample(step: int) -> None:
    def around(sample: Callable[..., Any], recorder: Recorder, of_step: int, prompt: str, text: str) -> None:
        sample(recorder, of_step, prompt, text)
        if of_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    patch(Recorder, "sample", around)


def failing_in_hellaswag(step: int) -> None:
    def around(measure: Callable[..., Any], hellaswag: HellaSwag, progress: Any, parts: Any) -> None:
        if progress.step == step:
            raise RuntimeError("no memory for these questions")
        measure(hellaswag, progress, parts)

    patch(HellaSwag, "measure", around)


def stopped_after_the_save(step: int) -> None:
    def around(save: Callable[..., Any], keeper: CheckpointKeeper, progress: Any, **options: Any) -> Any:
        saved = save(keeper, progress, **options)
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return saved

    patch(CheckpointKeeper, "save", around)


def train_disturbed(arguments: list[str], disturb: Callable[[int], None], step: int) -> None:
    disturb(step)
    train_as_rank(arguments)


@pytest.mark.parametrize(
    ("disturb", "step", "world_size", "codes"),
    [
        (killed_after_the_save, 10, 1, [-9]),
        (killed_after_the_save, 20, 2, [-9, -9]),
        (killed_after_the_first_sample, 20, 1, [-9]),
        (failing_in_hellaswag, 20, 1, [1]),
        (stopped_after_the_save, 10, 1, [0]),
        (stopped_after_the_save, 20, 2, [0, 0]),
    ],
)
def test_what_a_run_had_no_time_to_measure_is_measured_by_its_next_start(
    tmp_path: Path,
    given: tuple[Path, list[str]],
    undisturbed: RunFolder,
    disturb: Callable[[int], None],
    step: int,
    world_size: int,
    codes: list[int],
) -> None:
    arguments = tiny_arguments(tmp_path, given[0], "cut", *given[1])
    run = run_of(tmp_path, "cut")
    assert RankGroup(world_size, tmp_path / "store", train_disturbed, arguments, disturb, step).join() == codes
    assert list_checkpoints(run.checkpoints)[0][0] == step == max(losses(run))
    assert measured(run) != measured(undisturbed) or written(run) != written(undisturbed)
    assert "val_loss" in measured(run)[-1 if disturb is not killed_after_the_first_sample else -2]
    if disturb is stopped_after_the_save:
        state = run.read_state() or {}
        assert (state["status"], state["stop"], state["step"]) == ("preempted", "signal", step)
    train(1, tmp_path, arguments)
    if world_size == 1:
        assert measured(run) == measured(undisturbed)
        assert written(run) == written(undisturbed)
    else:  # other sums, the same measurements
        assert [set(record) for record in measured(run)] == [set(record) for record in measured(undisturbed)]
        assert [sample[:2] for sample in written(run)] == [sample[:2] for sample in written(undisturbed)]
    assert (run.read_state() or {})["status"] == "done"


def test_a_run_that_lacks_nothing_is_done_and_one_whose_end_comes_earlier_is_validated_first(
    tmp_path: Path, given: tuple[Path, list[str]]
) -> None:
    arguments = tiny_arguments(tmp_path, given[0], "early", *given[1], "--eval.every_steps=0", "--schedule.warmup=0")
    run = run_of(tmp_path, "early")
    group = RankGroup(1, tmp_path / "store", train_disturbed, arguments, stopped_after_the_save, 10)
    assert group.join() == [0]
    assert [record["step"] for record in measured(run) if "val_loss" in record] == [0]
    train(1, tmp_path, [*arguments, "--run.max_steps=10"])
    assert [record["step"] for record in measured(run) if "val_loss" in record] == [0, 10]
    assert [record["step"] for record in measured(run) if "hellaswag_acc_norm" in record] == [10]
    assert max(losses(run)) == 10
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = train_by_path(*arguments, "--run.max_steps=10")
    assert again.returncode == 0, again.stderr
    assert "is done: step 10 of 10" in again.stdout
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
