"""Real runs of which a few steps are profiled: traces, the table, and a run that is the same as without."""

import gzip
import json
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from common.run_folder import RunFolder
from common.step_profile import PARTS, StepProfile, read_step_profiles
from tests.helpers.mounts import small_disk
from tests.helpers.ranks import RankGroup, run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import (
    PROJECT,
    curve,
    losses,
    run_of,
    tiny_arguments,
    train,
    train_as_rank,
    train_by_path,
    weights_hashes,
)
from train.settings.sections import MOST_PROFILED_STEPS, Config, ProfileConfig, RunConfig

PROFILED = ("--profile.first=3", "--profile.steps=2")
SHORT = ("--run.max_steps=6", "--checkpoint.every_steps=2", "--checkpoint.asynchronous=false", "--eval.every_steps=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it two ranks' runs `plain` and `profiled`, and `single` of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    train(2, folder, tiny_arguments(folder, data, "plain", *SHORT))
    train(2, folder, tiny_arguments(folder, data, "profiled", *SHORT, *PROFILED))
    train(1, folder, tiny_arguments(folder, data, "single", *SHORT, *PROFILED))
    return folder


def log_of(run: RunFolder) -> str:
    return run.log.read_text(encoding="utf-8")


def the_profile(run: RunFolder) -> StepProfile:
    (profile,) = read_step_profiles(run)
    return profile


def trace_of(run: RunFolder, name: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress((run.profile / name).read_bytes()))["traceEvents"]
    return events


@pytest.mark.parametrize(("name", "ranks"), [("single", 1), ("profiled", 2)])
def test_every_rank_leaves_a_trace_and_the_first_a_table(runs: Path, name: str, ranks: int) -> None:
    run = run_of(runs, name)
    profile = the_profile(run)

    assert (profile["first_step"], profile["last_step"]) == (3, 4)
    assert (profile["rank"], profile["world_size"], profile["device"]) == (0, ranks, "cpu")
    assert len(profile["traces"]) == ranks
    assert sorted(path.name for path in run.profile.iterdir()) == sorted([*profile["traces"], "steps-00003-00004.json"])
    for trace in profile["traces"]:
        events = trace_of(run, trace)
        marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert {"step 3", "step 4", "waiting for data", "head and loss"} <= set(marks)
        assert not {"step 2", "step 5"} & set(marks)
        assert sum(event.get("cat") == "cpu_op" for event in events) > 100


@pytest.mark.parametrize(("name", "ranks"), [("single", 1), ("profiled", 2)])
def test_the_table_accounts_for_every_moment(runs: Path, name: str, ranks: int) -> None:
    profile = the_profile(run_of(runs, name))

    assert set(profile["parts"]) == set(profile["shares"]) == set(PARTS)
    assert sum(profile["parts"].values()) == pytest.approx(profile["seconds"])
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert min(profile["parts"].values()) >= 0
    took_time = {part for part, seconds in profile["parts"].items() if seconds > 0}
    assert took_time == set(PARTS) - (set() if ranks > 1 else {"communication"})
    assert all(entry["part"] in PARTS and entry["seconds"] > 0 for entry in profile["largest"])
    assert profile["measured"] == "main thread"


def test_the_terminal_shows_the_table(runs: Path) -> None:
    lines = log_of(run_of(runs, "profiled"))

    assert "profile of steps 3 to 4: " in lines
    assert "a step (main thread of rank 0 of 2)" in lines
    assert [label for label in PARTS.values() if f"  {label} " not in lines] == []


def test_a_profiled_run_is_the_same_run_to_the_bit(runs: Path) -> None:
    plain, profiled = (run_of(runs, name) for name in ("plain", "profiled"))

    assert curve(profiled) == curve(plain)
    newest = "step-00000006"
    assert weights_hashes(profiled.checkpoints / newest) == weights_hashes(plain.checkpoints / newest)


def train_with_one_trace(arguments: list[str]) -> None:
    from train.profiler import step_profiler

    def seen(self: step_profiler.StepProfiler, trace: bytes) -> None:
        self._recorder.log(f"writes while {self._acts.phase}")
        write(self, trace)

    write = step_profiler.StepProfiler._write
    step_profiler.StepProfiler._write = seen  # type: ignore[method-assign]
    step_profiler.MOST_TRACES = 1
    train_as_rank(arguments)


def test_of_many_ranks_the_first_write_traces(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "many", *SHORT, *PROFILED)

    assert RankGroup(2, tmp_path / "store", train_with_one_trace, arguments).join() == [0, 0]

    run = run_of(tmp_path, "many")
    trace = "steps-00003-00004-rank-00000.json.gz"
    assert (the_profile(run)["world_size"], the_profile(run)["traces"]) == (2, [trace])
    assert {path.name for path in run.profile.iterdir()} == {trace, "steps-00003-00004.json"}
    assert "writes while profiling" in log_of(run)  # by which a hang is told from a large trace


def test_the_documentation_explains_every_part() -> None:
    page = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")

    assert [label for label in PARTS.values() if f"\n| {label} | " not in page] == []


def modules_after_training(arguments: list[str]) -> list[str]:
    with pytest.raises(SystemExit) as end:
        train_as_rank(arguments)
    assert not end.value.code
    return [name for name in sys.modules if name.startswith("train.profiler")]


def test_a_run_that_is_not_profiled_knows_nothing_of_it(tmp_path: Path, data: Path) -> None:
    off = tiny_arguments(tmp_path, data, "off", "--run.max_steps=3")
    on = tiny_arguments(tmp_path, data, "on", "--run.max_steps=3", "--profile.first=3")

    assert run_ranks(1, tmp_path / "store", modules_after_training, off) == [[]]
    assert "train.profiler.step_profiler" in run_ranks(1, tmp_path / "store", modules_after_training, on)[0]
    assert not run_of(tmp_path, "off").profile.exists()
    assert (the_profile(run_of(tmp_path, "on"))["first_step"], the_profile(run_of(tmp_path, "on"))["last_step"]) == (
        3,
        3,
    )


def train_with_a_slow_loader(arguments: list[str]) -> None:
    from train.batches.loader import StepBatch, StepLoader

    steps = StepLoader.steps

    def slowly(self: StepLoader, *where: Any) -> Generator[StepBatch]:
        for batch in steps(self, *where):
            time.sleep(1.0)  # the disk that this plants; here, as what the thread reads ahead hides some of a wait
            yield batch

    StepLoader.steps = slowly  # type: ignore[method-assign, assignment]
    train_as_rank(arguments)


def test_a_loader_that_is_too_slow_shows_as_waiting_for_data(runs: Path, tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "slow", "--run.max_steps=4", "--eval.every_steps=0", *PROFILED)

    assert RankGroup(1, tmp_path / "store", train_with_a_slow_loader, arguments).join() == [0]

    slow = the_profile(run_of(tmp_path, "slow"))
    assert slow["parts"]["data"] > 1.9  # of two batches, by another clock than that of the sleep
    assert slow["parts"]["data"] > the_profile(run_of(runs, "single"))["parts"]["data"]


def train_and_die(arguments: list[str], last: int) -> None:
    """SIGKILL right before a profiled step."""
    from train.profiler.step_profiler import StepProfiler

    before = StepProfiler.before

    def dying(self: StepProfiler, step: int) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        before(self, step)

    StepProfiler.before = dying  # type: ignore[method-assign]
    train_as_rank(arguments)


@pytest.mark.parametrize(("first", "profiled"), [(3, (3, 5)), (2, (3, 4))])
def test_a_run_that_is_killed_within_is_profiled_by_the_next_start(
    runs: Path, tmp_path: Path, data: Path, first: int, profiled: tuple[int, int]
) -> None:
    """From the checkpoint of step 2: the steps that it does."""
    arguments = tiny_arguments(tmp_path, data, "killed", *SHORT, f"--profile.first={first}", "--profile.steps=3")
    killed = RankGroup(1, tmp_path / "store", train_and_die, arguments, 4).join()
    run = run_of(tmp_path, "killed")
    assert killed == [-signal.SIGKILL]
    assert not run.profile.exists()

    train(1, tmp_path, arguments)

    profile = the_profile(run)
    assert (profile["first_step"], profile["last_step"]) == profiled
    assert losses(run) == losses(run_of(runs, "single"))


def test_steps_that_are_past_are_reported_unless_they_were_profiled(tmp_path: Path, data: Path) -> None:
    def arguments(max_steps: int, *more: str) -> list[str]:
        return tiny_arguments(tmp_path, data, "late", f"--run.max_steps={max_steps}", *more,
                              "--schedule.kind=constant", "--checkpoint.every_steps=0")  # fmt: skip

    run = run_of(tmp_path, "late")
    train(1, tmp_path, arguments(4))
    train(1, tmp_path, arguments(5, "--profile.first=2", "--profile.steps=2"))
    assert "profile: step 3 is past and was not profiled: give a profile.first of 5 or more" in log_of(run)
    assert not run.profile.exists()

    train(1, tmp_path, arguments(6, "--profile.first=6"))
    train(1, tmp_path, arguments(7, "--profile.first=6", "--profile.steps=1"))
    assert (the_profile(run)["first_step"], the_profile(run)["last_step"]) == (6, 6)
    assert log_of(run).count("is past") == 1


def test_a_stop_within_the_profiled_steps_keeps_nothing_of_them(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "stopped", *SHORT, "--profile.first=1", "--profile.steps=6")
    run = run_of(tmp_path, "stopped")
    run.path.mkdir(parents=True)
    run.stop_file.touch()
    train(1, tmp_path, [*arguments, "--eval.every_steps=0"])
    state = run.read_state()
    assert state is not None and state["status"] == "preempted"
    assert not run.profile.exists()

    train(1, tmp_path, arguments)

    assert (the_profile(run)["last_step"], log_of(run).count("WARNING")) == (6, 0)


def test_what_can_not_be_written_ends_nothing(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "unwritable", *SHORT, *PROFILED)
    run = run_of(tmp_path, "unwritable")
    run.path.mkdir(parents=True)
    run.profile.write_text("a file in its place", encoding="utf-8")

    done = train_by_path(*arguments)

    assert done.returncode == 0, done.stderr
    assert f"WARNING: profile of rank 0: {run.profile} can't be written (File exists)" in done.stdout
    assert "done at step 6" in done.stdout
    assert done.stderr == ""  # PyTorch's profiler would report its own starts there


def test_a_full_disk_ends_nothing_and_leaves_nothing_cut_off(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "full", *SHORT, *PROFILED)
    run = run_of(tmp_path, "full")

    with small_disk(run.profile, kibibytes=16):
        train(1, tmp_path, arguments)
        assert list(run.profile.iterdir()) == []

    assert "WARNING: profile of rank 0: " in log_of(run)
    assert "No space left on device" in log_of(run)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def train_with_a_small_limit(arguments: list[str]) -> None:
    from train.profiler import step_profiler

    step_profiler.MOST_TABLED_BYTES = 1 << 10
    train_as_rank(arguments)


def test_a_trace_that_is_too_large_for_a_table_is_kept(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "large", *SHORT, *PROFILED)

    assert RankGroup(1, tmp_path / "store", train_with_a_small_limit, arguments).join() == [0]

    run = run_of(tmp_path, "large")
    assert [path.name for path in run.profile.iterdir()] == ["steps-00003-00004-rank-00000.json.gz"]
    assert "WARNING: profile of rank 0: no table, its trace is too large (" in log_of(run)


def test_no_room_for_temporary_files_ends_nothing(tmp_path: Path, data: Path) -> None:
    """PyTorch raises nothing where it can't export all of a trace."""
    run = run_of(tmp_path, "temporary")

    with small_disk(tmp_path / "tmp", kibibytes=256):
        done = train_by_path(*tiny_arguments(tmp_path, data, "temporary", *SHORT, *PROFILED), TMPDIR=f"{tmp_path}/tmp")

    assert done.returncode == 0, done.stderr
    assert "WARNING: profile of rank 0: PyTorch has written " in log_of(run)
    assert f"of a trace: is {tmp_path}/tmp full?" in log_of(run)
    assert "done at step 6" in log_of(run)
    assert not run.profile.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first": -1}, "profile.first is -1: give a step, or 0 to profile none"),
        ({"first": 1, "steps": 0}, "profile.steps is 0: give 1 to 20"),
        ({"first": 1, "steps": MOST_PROFILED_STEPS + 1}, "profile.steps is 21: give 1 to 20"),
    ],
)
def test_impossible_steps_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ProfileConfig(**values)
    assert str(refusal.value) == message


def test_steps_after_the_runs_last_are_refused() -> None:
    with pytest.raises(ValueError, match=r"profile.first is 9, the run ends at run.max_steps 8: give an earlier step"):
        Config(profile=ProfileConfig(first=9), run=RunConfig(max_steps=8))
