"""What must not be requeued, what is refused, and jobs that run beside each other."""

import json
import re
import shutil
import sys

import pytest

from tests.helpers.training import PROJECT, curve
from tests.slurm.jobs import ENDED, Bench, Job

pytestmark = pytest.mark.slurm


def test_an_exception_is_not_requeued(bench: Bench):
    job = bench.submit("exception", "--optim.lr=1e30", "--optim.grad_clip=0")
    job.wait_for_state(*ENDED)
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("FAILED", "0"), job.output
    assert job.decisions == ["failed"]
    assert "no number" in job.output or "nan" in job.output


def test_wrong_options_end_before_any_trainer_starts(bench: Bench):
    job = bench.submit("wrong", "--optim.learning=1")
    job.wait_for_state(*ENDED)
    assert job.facts["ExitCode"] == "2:0"
    assert "unknown option --optim.learning" in job.output
    assert not job.run.path.exists()


def test_scancel_stays_cancelled(bench: Bench):
    job = bench.submit("cancelled")
    job.wait_for_step(5)
    bench.cluster.ask("scancel", job.id)
    job.wait_for_state("CANCELLED")
    job.wait_for(lambda: job.state["status"] == "preempted", "a save all the same")
    assert job.facts["JobState"] == "CANCELLED"
    assert job.facts["Restarts"] == "0"
    assert "requeue" not in job.decisions


def test_a_finished_run_submitted_again(bench: Bench, undisturbed: Job):
    before = (undisturbed.run.metrics.read_bytes(), undisturbed.run.state.read_bytes())
    job = bench.submit("undisturbed")
    job.wait_for_state(*ENDED)
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("COMPLETED", "0"), job.output
    assert (undisturbed.run.metrics.read_bytes(), undisturbed.run.state.read_bytes()) == before


def test_a_site_s_own_script_and_words_before_python(bench: Bench, undisturbed: Job):
    """The finished run again, from a clone with a slurm/site.sh; `env` stands for a container's command.

    No variable of conda's and no status of a pipe ends the job.
    """
    clone = bench.folder / "clone"
    clone.mkdir()
    for path in PROJECT.iterdir():
        if path.name not in ("slurm", ".venv"):
            (clone / path.name).symlink_to(path)
    shutil.copytree(PROJECT / "slurm", clone / "slurm")
    lines = [f"LONGHAUL_PYTHON={sys.executable}", "in_container=(env INSIDE=1)", "srun_options=(--quiet)"]
    (clone / "slurm" / "site.sh").write_text(
        "\n".join([*lines, 'PS1="(env) $PS1"; false | cat', "echo modules are loaded"]) + "\n"
    )
    job = bench.submit("undisturbed", cwd=clone, LONGHAUL_PYTHON="/nowhere/python")
    job.wait_for_state(*ENDED)
    assert job.facts["JobState"] == "COMPLETED", job.output
    assert "modules are loaded" in job.output
    assert "is done: step" in job.output


def test_two_jobs_at_once_never_meet(bench: Bench, undisturbed: Job):
    jobs = [bench.submit(name, sbatch=("--oversubscribe", "--ntasks-per-node=1")) for name in ("left", "right")]
    for job in jobs:
        job.wait_for_step(1)
    for job in jobs:
        job.completes(restarts=0, like=undisturbed.run)
    starts = [[line["time"] for line in job.lines] for job in jobs]
    assert max(times[0] for times in starts) < min(times[-1] for times in starts)  # they were there together


def test_srun_launches_the_ranks(bench: Bench, undisturbed: Job):
    job = bench.submit("direct", sbatch=("--ntasks-per-node=1",), LONGHAUL_LAUNCH="srun")
    job.wait_for_step(5)
    assert_private(job)
    bench.cluster.ask("scancel", "--signal=USR1", job.id)  # to the tasks, which are the ranks
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]


def test_srun_launches_several_ranks_a_node(bench: Bench):
    job = bench.submit("four", "--run.max_steps=3", sbatch=("--ntasks-per-node=2",), LONGHAUL_LAUNCH="srun")
    job.wait_for_state(*ENDED)
    assert job.facts["JobState"] == "COMPLETED", job.output
    hosts = re.findall(r"rank (\d) on (\S+): ", job.output)
    assert [rank for rank, _ in hosts] == ["0", "1", "2", "3"]
    assert (hosts[0][1] == hosts[1][1], hosts[2][1] == hosts[3][1]) == (True, True)


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_a_job_on_one_node_listens_at_loopback_alone(bench: Bench, launch: str):
    tasks = 2 if launch == "srun" else 1
    one = ("--nodes=1", f"--ntasks-per-node={tasks}")
    job = bench.submit(f"one-{launch}", sbatch=one, LONGHAUL_LAUNCH=launch, LONGHAUL_RANKS_PER_NODE="2")
    job.wait_for_step(2)
    assert_private(job)
    assert job.listening() == {"127.0.0.1"}
    job.run.stop_file.touch()
    job.wait_for_state(*ENDED)
    assert job.facts["JobState"] == "COMPLETED", job.output


def assert_private(job: Job) -> None:
    """No port is open at all addresses, and no command line gives the start's secret away."""
    assert job.listening() & {"0.0.0.0", "::", "::ffff:0.0.0.0"} == set()
    (mark,) = job.run.path.glob(".start-*")
    assert json.loads(mark.read_text())["secret"] not in job.command_lines()


def test_an_unreachable_node_is_named_within_a_minute(isolated_bench: Bench):
    bench, cluster = isolated_bench, isolated_bench.cluster
    cluster.block_ports(cluster.nodes[1], 10_000, 32_767)
    try:
        job = bench.submit("unreachable")
        job.wait_for_state(*ENDED)
    finally:
        cluster.unblock_ports(cluster.nodes[1])
    assert job.facts["JobState"] == "FAILED"
    assert f"{cluster.nodes[1]} did not reach the first node" in job.output
    assert job.facts["RunTime"] < "00:01:00"


def test_a_run_folder_that_only_one_node_sees_is_refused(isolated_bench: Bench):
    job = isolated_bench.submit("local-disk", "--run.root=/dev/shm/runs")  # every node has its own
    job.wait_for_state(*ENDED)
    assert job.facts["ExitCode"] == "2:0"
    assert f"{isolated_bench.cluster.nodes[1]} does not see the run's folder /dev/shm/runs/local-disk" in job.output


def test_two_tasks_a_node_are_refused_under_torchrun(bench: Bench):
    job = bench.submit("two-tasks", sbatch=("--ntasks-per-node=2",))
    job.wait_for_state(*ENDED)
    assert job.facts["ExitCode"] == "2:0"
    assert "4 tasks on 2 nodes" in job.output


def test_a_process_that_would_train_alone_is_refused(bench: Bench):
    script = bench.folder / "alone.sh"
    script.write_text('#!/bin/sh\nexec "$LONGHAUL_PYTHON" train/pretrain.py "$@"\n')
    job = bench.submit("alone", script=str(script))
    job.wait_for_state(*ENDED)
    assert job.facts["ExitCode"] == "2:0"
    assert "would train alone in an allocation of 2 nodes" in job.output


def test_a_stop_file_ends_the_job_for_good(bench: Bench, undisturbed: Job):
    job = bench.submit("stop-file")
    job.wait_for_step(5)
    assert_private(job)
    job.run.stop_file.touch()
    job.wait_for_state(*ENDED)
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("COMPLETED", "0"), job.output
    assert job.decisions == ["stopped"]
    assert curve(job.run) == curve(undisturbed.run)[: len(curve(job.run))]
