"""What a job survives, on a real cluster, and that it computes the same as if nothing had happened."""

import signal
import time

import pytest

from tests.slurm.cluster_files import write_slurm_conf
from tests.slurm.jobs import STEPS, Bench, Job

pytestmark = pytest.mark.slurm


def test_two_nodes_train_to_the_end(undisturbed: Job):
    facts = undisturbed.facts
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), undisturbed.output
    assert undisturbed.state["status"] == "done"
    assert undisturbed.step() == STEPS
    assert undisturbed.decisions[0] == "finished"


def test_the_template_of_1p3b_as_written(isolated_bench: Bench, undisturbed: Job):
    """Submitted, pre-empted, its first node killed, finished."""
    bench = isolated_bench
    job = bench.submit("as-written")
    job.wait_for_step(5)
    bench.pre_empt()
    job.wait_for_step(15, start=1)
    bench.cluster.power_failure(bench.cluster.nodes[0])
    job.wait_for_restart(2)
    bench.cluster.start_node(bench.cluster.nodes[0])
    job.completes(restarts=2, like=undisturbed.run)


def test_pre_emption_with_grace(bench: Bench, undisturbed: Job):
    job = bench.submit("grace")
    job.wait_for_step(5)
    bench.pre_empt()
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]
    assert job.lines[-2]["from_step"] >= 5  # nothing was done twice


def test_pre_emption_with_grace_by_sigterm_alone(bench: Bench, undisturbed: Job):
    """Clusters without preempt_send_user_signal: the trainers get SIGTERM, the job's shell gets nothing."""
    write_slurm_conf(bench.cluster, user_signal=False)
    bench.cluster.ask("scontrol", "reconfigure")
    try:
        job = bench.submit("grace-by-term")
        job.wait_for_step(5)
        bench.pre_empt()
        job.wait_for_restart(1)
        assert "stop requested" not in job.output
        job.completes(restarts=1, like=undisturbed.run)
        assert job.decisions == ["requeue", "finished"]
    finally:
        write_slurm_conf(bench.cluster)
        bench.cluster.ask("scontrol", "reconfigure")


def test_pre_emption_without_grace(bench: Bench, undisturbed: Job):
    job = bench.submit("abrupt", sbatch=("--partition=abrupt",))
    job.wait_for_step(5)
    bench.pre_empt()
    job.completes(restarts=1, like=undisturbed.run)
    assert "requeue" not in job.decisions  # Slurm does it by itself
    assert job.lines[-2]["from_step"] >= 5  # it had KillWait to save


def test_a_user_signal_to_the_batch_script(bench: Bench, undisturbed: Job):
    job = bench.submit("user-signal")
    job.wait_for_step(5)
    bench.cluster.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]


def test_a_signal_to_every_process_of_the_job(plain_bench: Bench, undisturbed: Job):
    """Where Slurm tracks processes without cgroups, launchers, torchrun and shells get the signal, too."""
    job = plain_bench.submit("whole-tree")
    job.wait_for_step(5)
    plain_bench.cluster.ask("scancel", "--full", "--signal=USR1", job.id)
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]


def test_a_true_time_limit(bench: Bench, undisturbed: Job):
    """Slurm looks at time limits twice a minute. Until it does, a rank is frozen, so that the run doesn't end."""
    options = ("--run.deadline=null",)  # or the trainer would leave by its own clock
    job = bench.submit("time-limit", *options, sbatch=("--time=10", "--signal=B:USR1@90"))
    job.wait_for_step(5)
    job.signal_rank(0, signal.SIGSTOP)
    end = time.strftime(
        "%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 100)
    )  # the least that can be asked is a minute
    bench.cluster.ask("scontrol", "update", f"JobId={job.id}", f"EndTime={end}")
    job.wait_for_text("stop requested: the trainers save and exit")
    job.signal_rank(0, signal.SIGCONT)
    job.wait_for_restart(1)
    bench.cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]


def test_the_controller_is_away_while_the_job_ends(bench: Bench, undisturbed: Job):
    """A restart of it, just as the run has saved and left."""
    job = bench.submit("no-controller")
    job.wait_for_step(5)
    bench.cluster.stop_controller()
    job.signal_rank(0, signal.SIGUSR1)
    try:
        job.wait_for_text("asking again to be requeued")
    finally:
        bench.cluster.start_controller()
    job.wait_for_restart(1)
    job.completes(restarts=1, like=undisturbed.run)
    assert job.decisions == ["requeue", "finished"]


def test_power_failure_of_a_node(isolated_bench: Bench, undisturbed: Job):
    bench = isolated_bench
    job = bench.submit("power-failure")
    job.wait_for_step(15)
    bench.cluster.power_failure(bench.cluster.nodes[1])
    job.wait_for_restart(1)
    bench.cluster.start_node(bench.cluster.nodes[1])
    job.completes(restarts=1, like=undisturbed.run)


def test_slurmd_killed_alone(bench: Bench, undisturbed: Job):
    """The node's rank lives on while Slurm takes the node for lost and starts the job again."""
    job = bench.submit("slurmd-killed")
    job.wait_for_step(15)
    job.signal_rank(0, signal.SIGSTOP)  # or the run would end before Slurm misses the node
    bench.cluster.kill_slurmd(bench.cluster.nodes[1])
    job.wait_for_restart(1)
    bench.cluster.start_node(bench.cluster.nodes[1])
    job.completes(restarts=1, like=undisturbed.run)


def test_a_lost_rank_is_started_again_and_a_crash_loop_is_broken(bench: Bench, undisturbed: Job):
    job = bench.submit("crash-loop", LONGHAUL_FRUITLESS_STARTS="1")
    job.wait_for_step(15)  # saved at 10
    job.signal_rank(1, signal.SIGKILL)
    job.wait_for_step(15, start=1)  # saved nothing since
    job.signal_rank(1, signal.SIGKILL)
    job.wait_for_state("FAILED")
    assert job.decisions == ["requeue", "failed"], job.output
    assert "saved nothing new" in job.output
    again = bench.submit("crash-loop")  # somebody has looked at it
    again.completes(restarts=0, like=undisturbed.run)
