"""A resumed run is the run: bit by bit at the same number of ranks, whatever interrupted it."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from common.checkpoint_files import list_checkpoints
from common.metrics_file import read_json_lines, read_metrics
from common.run_folder import RunFolder
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import (
    curve,
    losses,
    run_of,
    start_ranks_training,
    tiny_arguments,
    train,
    train_as_rank,
    train_by_path,
    weights_hashes,
)
from train.trainer import Outcome, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    # 125 windows of 16 tokens: a step of 32 sequences crosses an epoch's border every fourth step, and shards' borders
    make_token_set(folder, train_tokens=2_001, val_tokens=500, shard_tokens=300)
    return folder


def newest(run: RunFolder) -> int:
    """The step of the newest checkpoint, 0 for none."""
    return max((step for step, _ in list_checkpoints(run.checkpoints)), default=0)


def kill_inside_a_save(group: RankGroup, run: RunFolder, chance: random.Random) -> None:
    """Let a save or two be published, wait until another is under way and kill everything in it."""
    wanted = newest(run) + SAVE_STEPS * chance.randint(1, 2)
    while newest(run) < wanted:
        group.processes[0].join(0.01)
        assert group.processes[0].is_alive()
    left_over = set(run.checkpoints.glob(".step-*.tmp"))  # by an earlier kill: every save has a name of its own
    while not set(run.checkpoints.glob(".step-*.tmp")) - left_over:
        assert group.processes[0].is_alive()
    group.kill()


def kill_between_steps(group: RankGroup, run: RunFolder, chance: random.Random) -> None:
    """Let the run get on by up to ten records, and kill everything."""
    size = run.metrics.stat().st_size if run.metrics.exists() else 0
    wanted = size + chance.randrange(3000)
    while not run.metrics.exists() or run.metrics.stat().st_size < wanted:
        assert group.processes[0].is_alive()
    group.kill()


def kill_at_the_start(group: RankGroup, run: RunFolder, chance: random.Random) -> None:
    """Kill everything a moment after its start."""
    group.processes[0].join(chance.uniform(0.0, 0.6))
    group.kill()


SAVE_STEPS = 2
# at 1, 2 and 4 ranks; tests/chaos kills in every phase of a step and of a save
KILLS = {
    1: [kill_inside_a_save] * 2 + [kill_between_steps] * 3 + [kill_at_the_start],
    2: [kill_inside_a_save] * 3 + [kill_between_steps] * 3 + [kill_at_the_start] * 2,
    4: [kill_inside_a_save] * 2 + [kill_between_steps] * 2 + [kill_at_the_start],
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_killed_at_random_moments_the_run_ends_as_if_undisturbed(tmp_path: Path, data: Path, world_size: int) -> None:
    more = (f"--checkpoint.every_steps={SAVE_STEPS}", "--schedule.kind=constant")
    calm, disturbed = run_of(tmp_path, "calm"), run_of(tmp_path, "disturbed")
    chance = random.Random(world_size)
    for kill in chance.sample(KILLS[world_size], len(KILLS[world_size])):
        # endless: however late a kill comes, it comes before the end
        arguments = tiny_arguments(tmp_path, data, "disturbed", *more, "--run.max_steps=100000")
        kill(start_ranks_training(world_size, tmp_path, arguments), disturbed, chance)
    end = f"--run.max_steps={max(losses(disturbed)) + 5}"
    train(world_size, tmp_path, tiny_arguments(tmp_path, data, "disturbed", *more, end))
    records = read_json_lines(disturbed.metrics)
    begun_at = [record["step"] for record in records if record.get("kind") == "start"]
    assert len({step for step in begun_at if step > 0}) >= KILLS[world_size].count(kill_inside_a_save), begun_at
    train(world_size, tmp_path, tiny_arguments(tmp_path, data, "calm", *more, end))
    assert curve(disturbed) == curve(calm)
    final = weights_hashes(list_checkpoints(calm.checkpoints)[0][1])
    assert weights_hashes(list_checkpoints(disturbed.checkpoints)[0][1]) == final


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_makes_all_save_the_same_step_and_leave(tmp_path: Path, data: Path, name: str) -> None:
    arguments = tiny_arguments(tmp_path, data, "signalled", "--run.max_steps=100000")
    group = start_ranks_training(2, tmp_path, arguments)
    run = run_of(tmp_path, "signalled")
    while len(losses(run)) < 3:
        assert group.processes[1].is_alive()
    pid = group.processes[1].pid
    assert pid is not None
    os.kill(pid, getattr(signal, name))
    assert group.join() == [0, 0]
    state = run.read_state()
    assert state is not None
    assert (state["status"], state["reason"]) == ("preempted", name)
    assert list_checkpoints(run.checkpoints)[0][0] == state["step"] == max(losses(run))


def test_a_stop_file_stops_the_run_once(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "stopped", "--run.max_steps=100000")
    group = start_ranks_training(1, tmp_path, arguments)
    run = run_of(tmp_path, "stopped")
    while len(losses(run)) < 3:
        assert group.processes[0].is_alive()
    run.stop_file.touch()
    assert group.join() == [0]
    state = run.read_state()
    assert state is not None
    assert (state["status"], state["reason"]) == ("preempted", "STOP file")
    assert not run.stop_file.exists()  # the same command goes on


def train_with_a_stop_file_during_the_last_save(arguments: list[str], stop_file: Path) -> None:
    finish = Trainer.finish

    def late(self: Trainer, outcome: Outcome) -> None:
        stop_file.touch()
        finish(self, outcome)

    pytest.MonkeyPatch().setattr(Trainer, "finish", late)
    train_as_rank(arguments)


def test_a_stop_file_that_comes_while_a_pre_empted_run_saves_is_heard_by_the_next_start(
    tmp_path: Path, data: Path
) -> None:
    """A job that is pre-empted puts itself back into the queue: the request would be lost."""
    arguments = tiny_arguments(tmp_path, data, "both", "--run.max_steps=100000", "--schedule.kind=constant")
    run = run_of(tmp_path, "both")
    group = RankGroup(1, tmp_path / "store", train_with_a_stop_file_during_the_last_save, arguments, run.stop_file)
    while len(losses(run)) < 3:
        assert group.processes[0].is_alive()
    pid = group.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert group.join() == [0]
    before = run.read_state()
    assert before is not None
    assert before["stop"] == "signal"
    train(1, tmp_path, [*arguments, f"--run.max_steps={before['step'] + 5}"])
    state = run.read_state()
    assert state is not None
    assert (state["status"], state.get("stop"), state["step"]) == ("preempted", "file", before["step"])
    assert not run.stop_file.exists()


@pytest.mark.parametrize("world_size", [2, 4])
def test_other_world_sizes_read_the_same_sequences_and_learn_the_same(
    tmp_path: Path, data: Path, world_size: int
) -> None:
    more = ("--model.dropout=0",)
    train(1, tmp_path, tiny_arguments(tmp_path, data, "one", *more))
    train(world_size, tmp_path, tiny_arguments(tmp_path, data, "many", *more))
    one, many = read_metrics(run_of(tmp_path, "one").metrics), read_metrics(run_of(tmp_path, "many").metrics)
    sequences = [record["sequences"] for record in one if "sequences" in record]
    assert len(sequences) == 20
    assert all(len(step) == 32 for step in sequences)
    assert [record["sequences"] for record in many if "sequences" in record] == sequences
    for key in ("loss", "val_loss"):
        values = [[record[key] for record in records if key in record] for records in (one, many)]
        assert values[1] == pytest.approx(values[0], abs=1e-5)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, data: Path) -> None:
    train(2, tmp_path, tiny_arguments(tmp_path, data, "calm"))
    train(2, tmp_path, tiny_arguments(tmp_path, data, "moved", "--run.max_steps=10", "--schedule.kind=constant"))
    moved = run_of(tmp_path, "moved")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "moved", "--run.max_steps=15", "--schedule.kind=constant"))
    train(4, tmp_path, tiny_arguments(tmp_path, data, "moved", "--schedule.kind=constant"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "alone", "--schedule.kind=constant"))
    alone = run_of(tmp_path, "alone")
    assert losses(moved) == pytest.approx(losses(alone), abs=1e-5)
    sequences = [
        [record["sequences"] for record in read_metrics(run.metrics) if "sequences" in record] for run in (moved, alone)
    ]
    assert sequences[0] == sequences[1]


def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "damaged", "--run.max_steps=10", "--schedule.kind=constant"))
    run = run_of(tmp_path, "damaged")
    newest = list_checkpoints(run.checkpoints)[0][1]
    weights = next(newest.glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1  # one flipped bit, which safetensors itself would not notice
    weights.write_bytes(content)
    train(1, tmp_path, tiny_arguments(tmp_path, data, "damaged", "--schedule.kind=constant"))
    assert max(losses(run)) == 20
    log = run.log.read_text()
    assert f"skipped: {weights} has changed" in log
    assert "resuming after step 5" in log
    assert any("damaged" in path.name for path in run.checkpoints.iterdir())


def test_a_finished_run_is_done_for_the_same_command_only(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is answered, as mistakes are, without torch."""
    arguments = tiny_arguments(tmp_path, data, "finished", "--run.max_steps=3")
    train(1, tmp_path, arguments)
    run = run_of(tmp_path, "finished")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    relative = [argument for argument in arguments if not argument.startswith("--run.root")]
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ImportError('it is not to be imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    again = train_by_path(*relative, "--log.every_steps=7", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"{run.path} is done: step 3 of 3" in again.stdout  # wherever that is: runs, as the default has it
    assert again.stdout.splitlines()[-1] == "without effect on it: log.every_steps: 10 -> 7"
    another = train_by_path(*arguments, "--optim.lr=2e-2", "--schedule.final_lr_fraction=0.3")
    assert another.returncode == 2
    (line,) = another.stderr.splitlines()
    assert "asks for another run (optim.lr: 0.01 -> 0.02, schedule.final_lr_fraction: 0.1 -> 0.3)" in line
    fewer = train_by_path(*arguments, "--run.max_steps=2")
    assert fewer.returncode == 2
    assert "is at step 3 already, past run.max_steps 2: give --run.max_steps 3 to end it there" in fewer.stderr
    for mistake, words in (
        ("--model.vocab_size=300", "model.vocab_size is 300, but the tokenizer of"),
        ("--batch.tokens_per_step=500", "is 500, not a whole number of sequences of 16 tokens"),
    ):
        assert words in train_by_path(*arguments, mistake).stderr
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    state = run.read_state()
    assert state is not None
    assert state["status"] == "done"
    allowed = ("--optim.lr=2e-2", "--allow-change=optim.lr", "--run.max_steps=2", "--allow-change=run.max_steps")
    train(1, tmp_path, [*arguments, *allowed])


def test_validation_and_samples_leave_the_training_curve_untouched(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "plain", "--eval.every_steps=0"))
    watched = ("--eval.every_steps=1", "--eval.sample_every_steps=1", '--eval.prompts=["ab", "c"]')
    train(1, tmp_path, tiny_arguments(tmp_path, data, "watched", *watched))
    assert losses(run_of(tmp_path, "watched")) == losses(run_of(tmp_path, "plain"))
    assert len(run_of(tmp_path, "watched").samples.read_text().splitlines()) == 40


def test_a_finished_stable_phase_is_extended(tmp_path: Path, data: Path) -> None:
    """Warm-up/stable/decay: a longer run goes on from a checkpoint of the stable phase as if it had been planned so."""
    schedule = ("--schedule.kind=wsd", "--schedule.decay=5", "--run.max_steps=30")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "planned", *schedule))
    short = ("--schedule.kind=wsd", "--schedule.decay=5", "--run.max_steps=20")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "short", *short))
    stable = run_of(tmp_path, "short").checkpoints / "step-00000015"
    train(1, tmp_path, tiny_arguments(tmp_path, data, "longer", *schedule, f"--resume={stable}"))
    planned, longer = losses(run_of(tmp_path, "planned")), losses(run_of(tmp_path, "longer"))
    assert longer == {step: planned[step] for step in range(16, 31)}


def test_gradients_in_several_buckets_add_up_in_the_same_order_after_a_resume(tmp_path: Path, data: Path) -> None:
    """From 3 ranks on the order matters, and DDP settles it only after its first backward."""
    more = (
        "--model.n_embd=256",
        "--batch.tokens_per_step=384",
        "--schedule.kind=constant",
        "--checkpoint.every_steps=0",
    )
    train(3, tmp_path, tiny_arguments(tmp_path, data, "calm", *more, "--run.max_steps=6"))
    train(3, tmp_path, tiny_arguments(tmp_path, data, "halved", *more, "--run.max_steps=3"))
    train(3, tmp_path, tiny_arguments(tmp_path, data, "halved", *more, "--run.max_steps=6"))
    assert losses(run_of(tmp_path, "halved")) == losses(run_of(tmp_path, "calm"))
    ends = [list_checkpoints(run_of(tmp_path, name).checkpoints)[0][1] for name in ("calm", "halved")]
    assert weights_hashes(ends[0]) == weights_hashes(ends[1])


def test_a_run_over_overlapping_windows_goes_on_as_if_undisturbed(tmp_path: Path, data: Path) -> None:
    more = ("--data.stride=1", "--schedule.kind=constant")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm", *more, "--run.max_steps=10"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "stopped", *more, "--run.max_steps=5"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "stopped", *more, "--run.max_steps=10"))
    calm = run_of(tmp_path, "calm")
    assert curve(run_of(tmp_path, "stopped")) == curve(calm)
    read = [window for record in read_metrics(calm.metrics) for window in record.get("sequences", [])]
    assert len(set(read)) == len(read) == 320  # of 1,985 windows
    assert max(read) > 2_001 // 16  # more windows than fit side by side

    arguments = tiny_arguments(tmp_path, data, "stopped", "--data.stride=2", "--run.max_steps=15")
    refused = train_by_path(*arguments)
    assert refused.returncode == 2
    assert "was trained with data.stride 1, this run has 2" in refused.stderr


def test_what_others_left_in_the_folder_changes_no_bit_and_nothing_of_it_is_lost(tmp_path: Path, data: Path) -> None:
    """Foreign and torn lines, records of other types, a heartbeat and a mirror's place of other types."""
    more = ("--eval.sample_every_steps=5", '--eval.prompts=["ab"]', "--run.max_steps=15")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm", *more))
    arguments = tiny_arguments(tmp_path, data, "odd", *more)
    train(1, tmp_path, arguments)
    calm, odd = run_of(tmp_path, "calm"), run_of(tmp_path, "odd")
    shutil.rmtree(odd.checkpoints / "step-00000015")
    foreign = (
        b'[]\n"x"\n' + b"[" * 5_000 + b'\n{"step": "11", "loss": 1}\n{"step": 10, "kind": []}\n\0\0\n{"step": 10, "ti'
    )
    for path in (odd.metrics, odd.samples):
        path.write_bytes(path.read_bytes() + foreign)
    odd.provenance.write_text("null")
    odd.rank_file(0).write_text('{"pid": []}')
    odd.state.write_text('{"status": {}}')
    train(1, tmp_path, arguments)
    assert curve(odd) == curve(calm)
    assert weights_hashes(odd.checkpoints / "step-00000015") == weights_hashes(calm.checkpoints / "step-00000015")
    assert foreign + b"\n" in odd.metrics.read_bytes()
    assert [path.read_text() for path in odd.path.glob("provenance.json.*.kept")] == ["null"]
    assert (odd.read_state() or {})["status"] == "done"


@pytest.mark.parametrize("name", ["state", "metrics.jsonl", "lock", "ranks/rank-00000.json"])
def test_a_pipe_where_a_file_is_written_is_refused_before_anything_is_written(
    tmp_path: Path, data: Path, name: str
) -> None:
    run = run_of(tmp_path, "piped")
    (run.path / name).parent.mkdir(parents=True)
    os.mkfifo(run.path / name)
    group = start_ranks_training(1, tmp_path, tiny_arguments(tmp_path, data, "piped"))
    assert group.join(60.0) == [2]
    assert [path.name for path in run.path.rglob("*") if not path.is_dir()] == [Path(name).name]


def train_without_drawing(arguments: list[str]) -> None:
    def draw(*_: object) -> None:
        raise AssertionError("a resumed run has no use for random weights")

    pytest.MonkeyPatch().setattr("model.initialisation.initialise", draw)
    train_as_rank(arguments)


def test_a_resumed_run_draws_no_random_weights(tmp_path: Path, data: Path) -> None:
    options = ("--schedule.kind=constant", "--run.max_steps=8")
    train(2, tmp_path, tiny_arguments(tmp_path, data, "calm", *options))
    arguments = tiny_arguments(tmp_path, data, "stopped", *options)
    train(2, tmp_path, [*arguments, "--run.max_steps=5"])
    assert RankGroup(2, tmp_path / "store", train_without_drawing, arguments).join() == [0, 0]
    run, calm = run_of(tmp_path, "stopped"), run_of(tmp_path, "calm")
    assert losses(run) == losses(calm)
    (_, saved), (_, expected) = (list_checkpoints(folder.checkpoints)[0] for folder in (run, calm))
    assert weights_hashes(saved) == weights_hashes(expected)
