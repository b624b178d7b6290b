"""submit.py: jobs through submitit, on the cluster and without it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.slurm.jobs import Bench, Job
from tests.train.test_study_queue import write_study
from train.studies.study_folder import StudyFolder

pytestmark = pytest.mark.slurm


def submit(bench: Bench, name: str, *options: str) -> list[Job]:
    trainer = [option for option in bench.options(name) if not option.startswith("--config=")]
    command = ["slurm/submit.py", "--config=train/configs/smoke.yaml", "--gpus-per-node=0", *options]
    done = bench.run_python(*command, "--", *trainer)
    assert done.returncode == 0, done.stderr
    jobs = []
    for line in done.stdout.splitlines():
        if line.startswith("submitted job "):
            words = line.replace(",", "").replace(":", "").split()
            jobs.append(Job(words[2], bench.run(Path(words[3]).name), bench.cluster, Path(words[6])))
    assert jobs, done.stdout
    return jobs


def test_a_real_interruption(bench: Bench, undisturbed: Job):
    (job,) = submit(bench, "submitit", "--nodes=2")
    assert [(line["kind"], line["job_id"]) for line in job.lines] == [("submission", job.id)]
    job.wait_for_step(5)
    for number in ("TERM", "USR2"):  # what submitit's own Job._interrupt() sends, as for a pre-emption
        bench.cluster.ask("scancel", f"--signal={number}", job.id)
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]


def test_an_interruption_in_a_container_without_slurm(bench: Bench, undisturbed: Job):
    """`env` stands for the container: in its PATH there is no scontrol, so that the job's script has to requeue."""
    inside = bench.folder / "inside"
    inside.mkdir()
    for program in ("bash", "dirname", "sed"):
        (inside / program).symlink_to(str(shutil.which(program)))
    (job,) = submit(bench, "contained", "--nodes=2", f"--container=env PATH={inside}")
    job.wait_for_step(5)
    bench.cluster.ask("scancel", "--signal=USR2", job.id)
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]
    assert "scontrol can't requeue from here" in job.output
    assert "the job's end is SLURM_JOB_END_TIME's" in job.run.log.read_text()


def test_a_sweep_is_a_job_array_of_named_runs(bench: Bench):
    jobs = submit(bench, "sweep", "--nodes=1", "--cpus-per-node=1", "--sweep=optim.lr=3e-4,6e-4")
    assert [job.run.path.name for job in jobs] == ["sweep-lr-3e-4", "sweep-lr-6e-4"]
    assert jobs[0].id.split("_")[0] == jobs[1].id.split("_")[0]
    for job in jobs:
        job.wait_for_state("COMPLETED", "FAILED", seconds=150)
        assert job.facts["JobState"] == "COMPLETED", job.output
        assert job.state["status"] == "done"
    rates = [json.loads(job.run.metrics.read_text().splitlines()[-5])["step"] for job in jobs]
    assert rates


def test_a_study_is_submitted_until_nothing_is_missing(bench: Bench):
    """Given again while its jobs run it submits nothing twice, and what waits for trials once these have ended."""
    path = write_study(
        bench.folder / "study",
        base={"config": "tiny.yaml", "schedule.warmup": 0.1, "data.path": str(bench.data), "run.device": "cpu"},
        variants={"base": {}, "norm": {"model.norm": "rmsnorm", "tune": {"optim.lr": [0.01, 0.02]}}},
        trials={"budget": 5120},
        seeds=[1],
    )
    folder = StudyFolder(path.parent)

    def study(status: int = 0) -> str:
        done = bench.run_python("train/study.py", str(path), "--slurm=--gpus-per-node 0 --cpus-per-node 1")
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def wait_for(*names: str) -> None:
        done = lambda: all(folder.status(name) == "done" for name in names)  # noqa: E731
        bench.cluster.wait_for(done, " and ".join(names), seconds=150)

    first = ["base-10.24k-s1", "norm-lr0.01-5.12k-s1", "norm-lr0.02-5.12k-s1"]
    text = study()
    assert text.count("submitted job") == 3
    assert "1 wait for trials" in text
    assert "submitted job" not in study()
    wait_for(*first)
    report = bench.run_python("train/study.py", str(path), "--report")  # before any result file is there
    assert report.returncode == 0, report.stderr
    assert not folder.results.exists()
    text = study()
    assert text.count("submitted job") == 1
    assert "3 of 4 runs done" in text
    (last,) = {run.name for run in folder.runs.glob("norm-*-10.24k-s1")}
    wait_for(last)
    assert "4 of 4 runs done" in study()
    assert sorted(file.stem for file in folder.results.glob("*.json")) == sorted([*first, last])
    for name in (*first, last):
        lines = (folder.run(name).path / "slurm.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["kind"] for line in lines].count("submission") == 1
        assert not folder.run(name).checkpoints.exists()
