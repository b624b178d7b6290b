"""`train/pretrain.py` as users start it: what it writes, and what it says when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.checkpoint_files import list_checkpoints, verify_checkpoint
from common.errors import UserError
from common.metrics_file import read_json_lines, read_metrics
from common.version import VERSION
from data_prep.tokenization.tokenizer import CharTokenizer
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PRETRAIN, losses, run_of, tiny_arguments, train, train_by_path
from train.pretrain import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=20_000, val_tokens=500)
    return folder


@pytest.mark.parametrize(
    ("symbols", "prompt", "message"),
    [
        ("abc", "abC", "eval.prompts has 'abC', but the character 'C' is not among the vocabulary's 3 symbols"),
        ("abc", "", "eval.prompts contains an empty prompt"),
    ],
)
def test_prompts_that_the_data_cannot_begin_are_refused_before_any_work(
    tmp_path: Path, symbols: str, prompt: str, message: str
) -> None:
    """Not at the first sample, hours later, when all since the last checkpoint would be lost."""
    data = tmp_path / "data"
    make_token_set(data, train_tokens=2_000, val_tokens=100, tokenizer=CharTokenizer(symbols))
    sampling = ("--eval.sample_every_steps=1", f"--eval.prompts={json.dumps([prompt])}")
    line = refusal(train_by_path(*tiny_arguments(tmp_path, data, "mute", *sampling)))
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_that_can_not_be_had_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    make_token_set(data, train_tokens=2_000, val_tokens=100)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["kind"] = "another"
    (data / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", [str(PRETRAIN), *tiny_arguments(tmp_path, data, "mute")])
    with pytest.raises(UserError, match="unknown tokenizer 'another'"):
        main()
    assert not (tmp_path / "runs").exists()


def test_a_short_trial_says_that_its_warm_up_is_longer_and_imports_no_compiler(tmp_path: Path, data: Path) -> None:
    """A trial with a lowered run.max_steps would be judged by steps at a fraction of its learning rate.

    Half of the processor time up to the first step went into importing torch's compiler and sympy, which it has no use
    for.
    """
    arguments = tiny_arguments(tmp_path, data, "trial", "--schedule.warmup=700", "--run.max_steps=1")
    done = train_by_path(*arguments, "--eval.sample_every_steps=1", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "torch.optim.adamw" in imported
    assert not {"torch._dynamo", "torch._inductor", "sympy", "matplotlib", "transformers", "wandb"} & imported
    assert "schedule.warmup takes 700 steps: this run never reaches optim.lr" in done.stdout


def torchrun(ranks: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*command, str(PRETRAIN), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_two_ranks_under_torchrun_leave_a_whole_run(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(
        tmp_path, data, "real", "--eval.sample_every_steps=10", '--eval.prompts=["a", "bc", "d"]'
    )
    done = torchrun(2, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = run_of(tmp_path, "real")
    records = read_metrics(run.metrics)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert [record["tokens"] for record in steps] == [512 * step for step in range(1, 21)]
    keys = {"lr", "grad_norm", "tokens_per_second", "mfu", "data_wait_seconds", "memory_gib", "time"}
    assert keys <= set(steps[0])
    assert steps[0]["mfu"] is None  # nobody knows a CPU's peak
    assert [record["step"] for record in records if "val_loss" in record] == [0, 5, 10, 15, 20]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert len(read_json_lines(run.samples)) == 6
    state = json.loads(run.state.read_text())
    assert (state["status"], state["step"], state["tokens"]) == ("done", 20, 20 * 512)
    config = yaml.safe_load(run.config.read_text())
    assert (config["run"]["dtype"], config["recompute"]["mode"], config["run"]["compile"]) == ("fp32", "none", False)
    (start,) = json.loads(run.provenance.read_text())["starts"]
    assert {"command", "revision", "diff", "packages", "ranks", "python"} <= set(start)
    assert start["version"] == VERSION
    assert len(start["ranks"]) == 2
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [20, 15]
    manifest = verify_checkpoint(list_checkpoints(run.checkpoints)[0][1])
    assert manifest["version"] == VERSION
    assert sorted(manifest["files"]) == [
        f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("optimizer", "weights") for rank in (0, 1)
    ]
    sizes = [manifest["files"][name]["bytes"] for name in sorted(manifest["files"])]
    assert sizes[2] == pytest.approx(sizes[3], rel=0.2)  # each writes its share
    for line in ("starting from scratch", "training tokens; the run reads", "estimated memory per rank", "rank 1 on"):
        assert line in done.stdout
    assert done.stdout.splitlines() == [line.split(" ", 2)[2] for line in run.log.read_text().splitlines()]


def test_one_process_needs_no_launcher_and_any_working_directory_will_do(tmp_path: Path, data: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = [a for a in tiny_arguments(tmp_path, data, "plain") if not a.startswith("--run.root")]
    done = train_by_path(*arguments, "--run.max_steps=2", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs" / "plain" / "checkpoints" / "step-00000002").is_dir()


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refused start."""
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    return line


def test_missing_data_name_the_command_that_makes_them(tmp_path: Path) -> None:
    line = refusal(train_by_path("--run.root", str(tmp_path / "runs"), cwd=tmp_path))
    assert "fineweb-edu" in line
    assert "data_prep/fineweb.py" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch.tokens_per_step=32768", "20,000 tokens in its train split, but one step needs 32,769"),
        ("--model.block_size=512", "500 tokens in its val split, but one sequence needs 513"),
        ("--batch.tokens_per_step=1000", "tokens: use 992 or 1008"),
        ("--batch.micro_batch=5", "use batch.micro_batch 4 or 8,"),
        ("--model.vocab_size=300", "has 257 ids: leave model.vocab_size out"),
        ("--run.device=cuda", "run.device is cuda, but PyTorch sees no GPU"),
        ("--resume=nowhere", "nowhere is not a folder"),
        (
            "--data.path={folder}/without",
            "without has no val split: make the set from more documents or with a smaller --val-one-in, or from one",
        ),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path: Path, data: Path, argument: str, message: str) -> None:
    make_token_set(tmp_path / "without", val_tokens=0)
    argument = argument.format(folder=tmp_path)
    line = refusal(train_by_path(*tiny_arguments(tmp_path, data, "bad"), argument, CUDA_VISIBLE_DEVICES=""))
    assert message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.n_layer=3", "trained with model.n_layer 2, this run has 3: put it back, or give --allow-change"),
        ("--run.seed=8", "run.seed 1337, this run has 8"),
        ("--batch.tokens_per_step=1024", "batch.tokens_per_step 512, this run has 1024"),
        ("--resume=never", "has checkpoints already"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, data: Path, argument: str, message: str) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "mine", "--run.max_steps=2"))
    before = {path: path.read_bytes() for path in run_of(tmp_path, "mine").path.rglob("*") if path.is_file()}
    assert message in refusal(train_by_path(*tiny_arguments(tmp_path, data, "mine"), argument))
    after = {path: path.read_bytes() for path in run_of(tmp_path, "mine").path.rglob("*") if path.is_file()}
    assert after == before


def test_other_data_are_refused_by_a_resumed_run(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "mine", "--run.max_steps=2"))
    other = tmp_path / "other"
    make_token_set(other, train_tokens=20_000, val_tokens=500, seed=1)
    assert "was trained on other data" in refusal(train_by_path(*tiny_arguments(tmp_path, other, "mine")))
    allowed = train_by_path(*tiny_arguments(tmp_path, other, "mine", "--allow-change=data.path", "--run.max_steps=3"))
    assert allowed.returncode == 0, allowed.stderr


def test_a_run_branches_into_a_new_name(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "trunk", "--schedule.kind=constant"))
    checkpoint = run_of(tmp_path, "trunk").checkpoints / "step-00000015"
    branch = tiny_arguments(tmp_path, data, "branch", "--schedule.kind=constant", f"--resume={checkpoint}")
    train(1, tmp_path, [*branch, "--run.max_steps=18"])
    behind = tiny_arguments(tmp_path, data, "trunk", "--schedule.kind=constant", f"--resume={checkpoint}")
    assert "has newer checkpoints than step-00000015: --run.name NAME branches" in refusal(train_by_path(*behind))
    elsewhere = checkpoint.with_name("step-00000150")
    checkpoint.with_name("step-00000020").rename(elsewhere)
    assert "did not start from" in refusal(train_by_path(*branch, f"--resume={elsewhere}"))
    short = train_by_path(*branch, "--run.name=short", "--run.max_steps=15")
    assert "has 15 steps already" in refusal(short)
    assert not run_of(tmp_path, "short").path.exists()
    shutil.rmtree(checkpoint)  # as the trunk's own retention does in time
    train(1, tmp_path, branch)  # the same command goes on with the branch: nothing of it is done again
    trunk, run = losses(run_of(tmp_path, "trunk")), run_of(tmp_path, "branch")
    assert losses(run) == {step: trunk[step] for step in range(16, 21)}
    starts = [record["step"] for record in read_json_lines(run.metrics) if record.get("kind") == "start"]
    assert starts == [15, 18]
    assert f"skipped: --resume {checkpoint}: {run.path} has checkpoints of its own by now" in run.log.read_text()


def test_a_dead_rank_ends_the_run_with_its_name(tmp_path: Path, data: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PRETRAIN)]
    launcher = subprocess.Popen(
        [*command, *tiny_arguments(tmp_path, data, "dying", "--run.max_steps=100000")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = run_of(tmp_path, "dying")
    while len(losses(run)) < 3:
        assert launcher.poll() is None
    workers = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(launcher.pid)], text=True).split()]
    os.kill(workers[1], 9)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "Signal 9" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_checkpoint_of_weights_alone_is_trained_on(tmp_path: Path, data: Path) -> None:
    """What eval/import_hf.py writes: step 0, no optimizer state, no configuration, no data."""
    train(1, tmp_path, tiny_arguments(tmp_path, data, "first", "--schedule.kind=constant"))
    checkpoint = list_checkpoints(run_of(tmp_path, "first").checkpoints)[0][1]
    for path in checkpoint.glob("optimizer-*"):
        path.unlink()
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    files = {name: facts for name, facts in manifest["files"].items() if name.startswith("weights-")}
    kept = {key: manifest[key] for key in ("format_version", "model", "tokenizer")}
    kept["model"] |= {"mlp_hidden": 4 * 32, "n_kv_head": 2}  # which the configuration leaves out: null
    bare = kept | {"files": files, "data_identity": None, "step": 0, "tokens": 0, "sequences": 0}
    (checkpoint / "checkpoint.json").write_text(json.dumps(bare))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "second", f"--resume={checkpoint}", "--run.max_steps=3"))
    first, second = losses(run_of(tmp_path, "first")), losses(run_of(tmp_path, "second"))
    assert sorted(second) == [1, 2, 3]
    assert second[1] < first[1] - 1  # it knows what the first run learnt
    other = train_by_path(*tiny_arguments(tmp_path, data, "third", f"--resume={checkpoint}", "--model.n_layer=3"))
    assert "model.n_layer 2, this run has 3" in refusal(other)


def test_a_run_whose_output_nobody_reads_any_more_goes_on(tmp_path: Path, data: Path) -> None:
    command = [sys.executable, str(PRETRAIN), *tiny_arguments(tmp_path, data, "unread", "--log.every_steps=1")]
    trainer = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    while "step 2/20" not in trainer.stdout.readline():
        assert trainer.poll() is None
    trainer.stdout.close()  # as `| head` does
    assert trainer.wait(timeout=60) == 0
    assert max(losses(run_of(tmp_path, "unread"))) == 20
    assert "step 20/20" in run_of(tmp_path, "unread").log.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")
def test_on_a_terminal_there_is_a_bar_with_loss_rate_and_eta(tmp_path: Path, data: Path) -> None:
    import pty
    import termios

    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 140))
    command = [sys.executable, str(PRETRAIN), *tiny_arguments(tmp_path, data, "seen")]
    trainer = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert trainer.wait(timeout=60) == 0
    text = shown.decode()
    assert "20/20 [" in text  # steps, time passed and left
    assert "tokens/s" in text.split("20/20 [")[-1]
    assert "loss " in text.split("20/20 [")[-1]
    assert "step 20/20 | loss" in run_of(tmp_path, "seen").log.read_text()
