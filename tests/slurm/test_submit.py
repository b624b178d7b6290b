"""What submit.py writes and plans, without a cluster; and the same run without Slurm."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.run_folder import RunFolder
from slurm.planned_jobs import listed_jobs, plan_jobs
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, run_of, tiny_arguments, train_by_path
from train.estimates.time_limit import minutes

GOLDEN = Path(__file__).parent / "golden"
SMOKE = PROJECT / "train" / "configs" / "smoke.yaml"


def run_submit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    unset = {"SBATCH_PARTITION", "SBATCH_ACCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(PROJECT / "slurm" / "submit.py"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("one-run", ["--nodes=4", "--time=1-12:00:00", "--partition=gpu", "--account=physics"]),
        (
            "containers",
            [
                "--nodelist=n[1-4]",
                "--exclude=n5",
                "--mail-type=END,FAIL",
                "--mail-user=me@example.org",
                "--image=docker:me/torch",
                "--container=apptainer exec --nv '/shared/my images/torch.sif'",
                "--container-image=/shared/torch.sqsh",
                "--container-mounts=/shared,/data:/corpus",
                "--python=python3",
            ],
        ),
        ("sweep", ["--gpus-per-node=1", "--cpus-per-node=12", "--sweep=optim.lr=3e-4,6e-4", "--sweep=run.seed=1,2"]),
    ],
)
def test_the_script_for_sbatch(name: str, arguments: list[str], tmp_path: Path):
    """`LONGHAUL_NEW_GOLDEN=1 pytest …` writes the files anew, to be read in the diff."""
    done = run_submit("--config", str(SMOKE), "--dry-run", *arguments, "--", "--run.max_steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    places = {str(tmp_path): "WORKING_FOLDER", sys.executable: "PYTHON", str(PROJECT): "PROJECT"}
    text = done.stdout
    for place, word in places.items():
        text = text.replace(place, word)
    golden = GOLDEN / f"{name}.sbatch"
    if "LONGHAUL_NEW_GOLDEN" in os.environ:
        golden.write_text(text)
    assert text == golden.read_text()
    assert not (tmp_path / "runs").exists()  # nothing was submitted


def test_a_dry_run_shows_the_plan_and_warns_of_a_limit_before_the_first_save(tmp_path: Path):
    config = PROJECT / "train" / "configs" / "gpt2-1p3b.yaml"
    options = ["--dry-run", "--nodes=2", "--gpu=a100-80", "--time=20"]
    done = run_submit("--config", str(config), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#   plan of gpt2-1p3b: 9,536 steps, 10.0B tokens, on 2 x 8 x a100-80\n" in done.stdout
    warning = "#   WARNING: a start ends at 20 min 00 s, before its first regular save: checkpoint.every_steps"
    assert warning in done.stdout


def test_a_sweep_names_its_runs():
    jobs = plan_jobs("smoke", ["--run.root=/r"], ["optim.lr=3e-4,6e-4", "run.seed=1,2"])
    names = [f"smoke-lr-{lr}-seed-{seed}" for lr in ("3e-4", "6e-4") for seed in (1, 2)]
    assert [job.name for job in jobs] == names
    assert [job.folder for job in jobs] == [Path("/r") / name for name in names]
    assert "--optim.lr=6e-4" in jobs[-1].options


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("optim.lr=1e-4,2e-4,1e-4", "smoke-lr-1e-4 twice"),
        ("optim.lr", "give KEY=VALUE"),
        ("optim.learning=1", "unknown option"),
        ("optim.lr=fast", "optim.lr"),
    ],
)
def test_a_wrong_sweep_is_one_line(sweep: str, words: str):
    with pytest.raises(UserError, match=words):
        plan_jobs(str(SMOKE), [], [sweep])


LISTED = [f"--config={SMOKE}", "--run.root=r"]


def test_a_list_of_runs_is_one_array_of_what_is_left(tmp_path: Path):
    lines = [json.dumps([*LISTED, f"--run.name={name}", f"--run.seed={seed}"]) for seed, name in enumerate("abc")]
    (tmp_path / "study.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    folder = RunFolder(tmp_path / "r" / "b")
    folder.path.mkdir(parents=True)
    folder.write_state("done", reason="all steps", step=5, tokens=5)
    call = ["--jobs=study.jsonl", "--dry-run", "--at-once=1", "--job-name=mine", "--", "--run.max_steps=5"]
    done = run_submit(*call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout.splitlines()
    assert text[0] == "b is not submitted: it is done"
    assert {"#SBATCH --array=0-1%1", "#SBATCH --job-name=mine"} <= set(text)
    runs = [line for line in text if line.startswith(f"# {tmp_path}/r/")]
    assert [line.split(":")[0][-1] for line in runs] == ["a", "c"]
    assert all(line.endswith("--run.max_steps=5") for line in runs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("--run.name=a", "line 1: give a JSON list of options"),
        ('["--run.name=a", 5]', "line 1: give a JSON list of options"),
        (f"{json.dumps(LISTED)}\n{json.dumps(LISTED)}", "has smoke twice"),
        ('["--run.nam=a"]', "unknown option"),
    ],
)
def test_a_wrong_list_of_runs_is_one_line(text: str, words: str, tmp_path: Path):
    (tmp_path / "jobs").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        listed_jobs(tmp_path / "jobs", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("24:00:01", 1441), ("1-0", 1440), ("2-12:30", 3630), ("0:20", 1)],
)
def test_times_as_sbatch_takes_them(text: str, expected: int):
    assert minutes(text) == expected


def test_what_sbatch_refuses_is_one_line(tmp_path: Path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    done = run_submit("--config", str(SMOKE), "--partition=gpuu", cwd=tmp_path)
    *echoed, last = done.stderr.splitlines()  # submitit shows what sbatch says, too
    assert (done.returncode, last) == (2, "error: not submitted: sbatch: error: invalid partition specified: gpuu")
    assert all(line.startswith("sbatch: ") for line in echoed)
    assert not (tmp_path / "runs" / "smoke").exists()


def test_a_wrong_time_is_one_line():
    with pytest.raises(UserError, match="--time soon"):
        minutes("soon")
    for nothing in ("0", "0:00:00", "0-0"):  # "no limit" to sbatch
        with pytest.raises(UserError, match=f"--time {nothing}: a job needs a limit"):
            minutes(nothing)


def test_no_container_without_slurm(tmp_path: Path):
    done = run_submit("--config", str(SMOKE), "--local", "--container=shifter", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: --local doesn't enter a container: start submit.py itself inside it"],
    )


def test_a_variable_of_the_job_is_not_expanded_where_it_is_submitted(monkeypatch):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    (job,) = plan_jobs(str(SMOKE), ["--data.stage_to=$SLURM_TMPDIR/longhaul"], [])
    assert "--data.stage_to=$SLURM_TMPDIR/longhaul" in job.options


def test_the_same_without_slurm(tmp_path: Path):
    make_token_set(tmp_path / "data")
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "local", "--run.max_steps=5")
    config, options = arguments[0].removeprefix("--config="), arguments[1:]
    done = run_submit("--config", config, "--gpus-per-node=2", "--local", "--", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all steps are done" in done.stdout
    assert stat.S_IMODE((tmp_path / "runs" / "submitit").stat().st_mode) == 0o700  # jobs run the pickles in it
    state = RunFolder(tmp_path / "runs" / "local").read_state()
    assert state is not None
    assert (state["status"], state["step"]) == ("done", 5)
    alone = tiny_arguments(tmp_path, tmp_path / "data", "alone", "--run.max_steps=5")
    assert train_by_path(*alone).returncode == 0
    steps = [[row[0] for row in curve(run_of(tmp_path, name))] for name in ("local", "alone")]
    assert steps[0] == steps[1]


def test_the_job_s_beginning_does_not_wait_for_torch():
    """Importing it takes half a minute on a busy file system, and nothing is trained before a check of the options."""
    code = "import sys, slurm.start_job, slurm.preflight, slurm.requeue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
