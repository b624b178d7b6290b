"""What TensorBoard reads of a run that mirrors itself, over a resume, and of one that is written for it later."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, tiny_arguments, train

SCRIPT = PROJECT / "train" / "sync_tensorboard.py"


def scalars(run: RunFolder, axis: str, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.tensorboard / axis))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def sync(run: RunFolder) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), str(run.path)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("board")
    make_token_set(folder / "data", train_tokens=5_000, val_tokens=500)
    more = ("--log.tensorboard=true", "--schedule.kind=constant", '--eval.prompts=["a"]', "--eval.sample_tokens=2")
    for steps in (7, 12):
        last = (f"--run.max_steps={steps}", f"--eval.sample_every_steps={steps}")
        train(1, folder, tiny_arguments(folder, folder / "data", "board", *more, *last))
    return run_of(folder, "board")


def test_every_step_is_there_once_over_steps_and_over_tokens(run: RunFolder) -> None:
    losses = [(record["step"], record["loss"]) for record in read_metrics(run.metrics) if "loss" in record]
    assert [step for step, _ in losses] == list(range(1, 13))
    for axis, unit in (("steps", 1), ("tokens", 512)):
        found = scalars(run, axis, "train/loss")
        assert [at for at, _ in found] == [step * unit for step, _ in losses]
        assert [value for _, value in found] == pytest.approx([loss for _, loss in losses])
        assert [at for at, _ in scalars(run, axis, "val/loss")] == [step * unit for step in (0, 5, 7, 10, 12)]
    assert all(rate > 0 for _, rate in scalars(run, "steps", "speed/tokens_per_second"))
    log = run.log.read_text()
    assert log.count(f"TensorBoard mirrors this run: {run.tensorboard}") == 2
    assert "not mirroring" not in log


def test_an_old_run_is_written_whole_however_often(run: RunFolder) -> None:
    before = scalars(run, "tokens", "train/loss"), scalars(run, "steps", "val/bits_per_byte")
    for _ in range(2):
        done = sync(run)
        assert done.returncode == 0, done.stderr
        assert f"{Path(sys.executable).with_name('tensorboard')} --logdir " in done.stdout, "PATH may lack it"
        assert (scalars(run, "tokens", "train/loss"), scalars(run, "steps", "val/bits_per_byte")) == before
    events = EventAccumulator(str(run.tensorboard / "steps"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/a/text_summary")] == [7, 12]


def test_a_damaged_record_costs_what_is_damaged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    odd = {"step": 3, "loss": [], "lr": {"a": 1}, "\ud800": 0, "note": "\ud800", "time": 10**30}
    lines = [json.dumps(record) for record in ({"step": 1, "loss": 5.0, "tokens": 9}, odd, {"step": 4, "loss": 1})]
    run.metrics.write_text("\n".join([*lines, '{"step": 5, "lo']))

    done = sync(run)

    assert done.returncode == 0, done.stderr
    assert [at for at, _ in scalars(run, "steps", "train/loss")] == [1, 4]
    assert sync(RunFolder(tmp_path)).stderr.endswith("give the folder of a run that has started\n")
