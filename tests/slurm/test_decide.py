"""What becomes of a job, by the facts alone."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from common.errors import UserError
from common.run_folder import RunFolder
from slurm.decision import Facts, decide, decide_for
from slurm.history import StartId, append_end, append_start, fruitless_starts, read_starts, starts_file, steps_trained
from slurm.job_start import begin, refuse_a_crash_loop
from slurm.status import read_status
from tests.helpers.mounts import fill, small_disk
from tests.helpers.token_sets import make_token_set

START = StartId("7", 2)


def facts(status: str | None = None, *, own: bool = True, **changes: Any) -> Facts:
    """A start that trained 30 steps from the checkpoint where the start before began, and left `status` behind."""
    state = None
    if status is not None:
        state = {"status": status, "reason": "why", "step": 130}
        state |= {name: changes.pop(name) for name in ("stop", "failure", "reason") if name in changes}
    usual = Facts(
        state,
        own and status is not None,
        steps_trained=30,
        fruitless=1,
        asked=False,
        pre_empted=False,
        ended_by_slurm=False,
        exit_status=1,
    )
    return replace(usual, **changes)


@pytest.mark.parametrize(
    ("case", "action"),
    [
        # the run's own word
        (facts("done", exit_status=0), "finished"),
        (facts("done", exit_status=1), "finished"),  # torchrun's status after a clean end may be 1
        (facts("done", ended_by_slurm=True), "finished"),
        (facts("preempted", stop="signal", reason="SIGUSR1"), "requeue"),
        (facts("preempted", stop="deadline"), "requeue"),
        (facts("preempted", stop="file", reason="STOP file"), "stopped"),
        (facts("preempted", stop="signal", reason="SIGINT"), "stopped"),
        (facts("preempted", stop="signal", reason="SIGINT twice, without a save"), "stopped"),
        (facts("failed", failure="exception"), "failed"),
        (facts("failed"), "failed"),
        (facts("failed", failure="exception", asked=True), "failed"),
        # a loss
        (facts("failed", failure="lost_rank"), "requeue"),
        (facts("failed", failure="hung"), "requeue"),
        (facts("failed", failure="hung", steps_trained=0), "failed"),
        (facts("failed", failure="lost_gpu"), "requeue"),
        (facts("failed", failure="storage"), "requeue"),  # a file system that was away
        (facts("running"), "requeue"),
        (facts("preempted", stop="launcher"), "requeue"),
        (facts("failed", failure="lost_rank", steps_trained=0), "failed"),
        (facts("failed", failure="storage", steps_trained=0), "failed"),
        (facts("running", steps_trained=0), "failed"),
        (facts("running", steps_trained=0, asked=True), "requeue"),
        (facts("failed", failure="lost_rank", fruitless=3), "failed"),
        (facts("failed", failure="storage", fruitless=3), "failed"),  # and stays so
        (facts("running", fruitless=3), "failed"),
        # a time limit that is too short to get anywhere; to be pre-empted ever again is another matter
        (facts("preempted", stop="signal", asked=True, fruitless=3), "failed"),
        (facts(None, asked=True, fruitless=3), "failed"),
        (facts("preempted", stop="signal", pre_empted=True, fruitless=3), "requeue"),
        (facts(None, pre_empted=True), "requeue"),
        # Slurm has ended the job: scancel, or it requeues by itself
        (facts("preempted", stop="signal", ended_by_slurm=True), "leave"),
        (facts("failed", failure="lost_rank", ended_by_slurm=True), "leave"),
        (facts("running", ended_by_slurm=True), "leave"),
        (facts(None, ended_by_slurm=True), "leave"),
        # nothing of this start's
        (facts(None, exit_status=2), "failed"),
        (facts("preempted", own=False, stop="signal"), "failed"),
        (facts("running", own=False), "failed"),
        (facts("done", own=False, exit_status=0), "finished"),
        (facts("done", own=False, exit_status=1), "failed"),
        (facts(None, asked=True), "requeue"),
        (facts("preempted", own=False, stop="signal", asked=True), "requeue"),
    ],
)
def test_decision(case: Facts, action: str):
    assert decide(case).action == action


def test_fruitless_starts_are_counted_from_the_newest_checkpoint(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def start(number: int, checkpoint: int) -> None:
        (folder.checkpoints / f"step-{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
        append_start(folder, StartId("7", number), ["n1"], "torchrun")

    append_start(folder, StartId("6", 0), ["n1"], "torchrun")  # another job's
    append_start(folder, StartId("7", 0), ["n1"], "torchrun")
    assert fruitless_starts(read_starts(folder), START, 0) == 1
    start(1, 100)
    start(2, 100)
    assert fruitless_starts(read_starts(folder), START, 100) == 2
    assert fruitless_starts(read_starts(folder), START, 200) == 0  # it has saved since
    append_end(folder, START, "requeue", "a time limit", pre_empted=False)
    assert fruitless_starts(read_starts(folder), START, 100) == 2
    append_end(folder, START, "requeue", "a more important job", pre_empted=True)
    start(3, 100)
    assert fruitless_starts(read_starts(folder), START, 100) == 1  # being pre-empted is no fault


def test_a_job_that_slurm_itself_requeues_again_and_again_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGHAUL_FRUITLESS_STARTS", raising=False)
    folder = RunFolder(tmp_path / "run")
    for number in range(3):
        refuse_a_crash_loop(folder, StartId("7", number))
        append_start(folder, StartId("7", number), ["n1"], "torchrun")  # and the node fails
    with pytest.raises(UserError, match=r"the last 3 starts of job 7 saved nothing after step 0: look into .*log.txt"):
        refuse_a_crash_loop(folder, StartId("7", 3))
    refuse_a_crash_loop(folder, StartId("8", 0))  # submitted anew
    monkeypatch.setenv("LONGHAUL_FRUITLESS_STARTS", "four")
    with pytest.raises(
        UserError, match=r"^LONGHAUL_FRUITLESS_STARTS is 'four' in the environment, not a whole number of 1"
    ):
        refuse_a_crash_loop(folder, StartId("8", 0))
    monkeypatch.delenv("LONGHAUL_FRUITLESS_STARTS")
    (folder.checkpoints / "step-00000100").mkdir(parents=True)
    refuse_a_crash_loop(folder, StartId("7", 3))


def test_the_facts_come_from_the_run_and_the_controller(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    folder = RunFolder(tmp_path / "run")
    append_start(folder, StartId("7", 1), ["n1"], "torchrun")
    with open(starts_file(folder), "a") as file:
        file.write('{"time": 17000')  # where a node lost its power: it must not take the next start's line with it
    append_start(folder, START, ["n1"], "torchrun")
    begun = read_starts(folder)[1]["time"]
    records = [{"step": step, "step_seconds": 1.0, "time": begun + step - 5} for step in range(10)]
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert steps_trained(folder, START) == 5  # the others are of an earlier start
    folder.write_state("preempted", reason="SIGTERM", step=9, tokens=1, stop="signal")

    def decision(job: str) -> str:
        return decide_for(folder, job, asked=False, told=False, exit_status=1).action

    assert decision("JobId=7 JobState=RUNNING PreemptTime=None Command=x --run.name JobState=CANCELLED") == "requeue"
    assert decision("JobId=7 JobState=CANCELLED PreemptTime=None") == "leave"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")  # the state is an earlier start's
    assert decision("JobId=7 JobState=RUNNING PreemptTime=None") == "failed"
    assert decision("JobId=7 JobState=RUNNING PreemptTime=2026-11-22T05:00:00") == "requeue"
    written = [line["decision"] for line in read_starts(folder) if line["kind"] == "end"]
    assert written == ["requeue", "leave", "failed", "requeue"]


@pytest.mark.parametrize(
    ("culprit", "failure", "left_out"),
    [
        ("n2", "hung", ("n2",)),
        ("n2.example.org", "lost_gpu", ("n2",)),  # its host name
        ("n2", "lost_rank", ()),  # for lack of memory, probably: that is no fault of the node's
        ("elsewhere", "hung", ()),
        ("", "hung", ()),
    ],
)
def test_the_node_of_a_rank_that_hung_is_left_out_next_time(
    culprit: str, failure: Any, left_out: tuple[str, ...], tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    folder = RunFolder(tmp_path / "run")
    append_start(folder, START, ["n1", "n2"], "torchrun")
    folder.metrics.write_text(json.dumps({"step": 1, "step_seconds": 1.0, "time": time.time()}) + "\n")
    folder.write_state("failed", reason="why", step=1, tokens=1, failure=failure, culprit_node=culprit)
    job = "JobId=7 JobState=RUNNING PreemptTime=None Partition=gpu NodeList=n[1-2] NumNodes=2 ExcNodeList=n9"
    cluster = "".join(f"n{number}|idle|64|500000|gpu:8|(null)\n" for number in range(1, 4))
    decision = decide_for(folder, job, asked=False, told=False, exit_status=1, cluster=cluster)
    assert decision.action == "requeue"
    assert decision.left_out.nodes == left_out
    assert decision.left_out.excluded == ("n9,n2" if left_out else None)
    assert read_starts(folder)[-1].get("left_out", []) == list(left_out)
    assert read_status(folder, time.time()).left_out == list(left_out)


def test_a_full_disk_costs_no_decision_and_a_start_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    make_token_set(data)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with small_disk(tmp_path / "disk", 64) as disk:
        folder = RunFolder(disk / "run")
        start, file = StartId.of_environment(), starts_file(folder)
        append_start(folder, start, ["n1"], "torchrun")
        append_start(folder, start, ["n1" + "x" * (4096 - 30 - 2 * file.stat().st_size)], "torchrun")
        assert 4096 - 60 < file.stat().st_size < 4096  # of a page, which is what a file takes
        folder.write_state("preempted", reason="SIGTERM", step=9, tokens=1, stop="signal")
        fill(disk)
        decision = decide_for(folder, "JobId=7 JobState=RUNNING", asked=False, told=False, exit_status=1)
        assert decision.action == "requeue"
        assert "slurm.jsonl can't be written: No space left on device" in capsys.readouterr().err
        with pytest.raises(
            UserError, match=r"slurm.jsonl can't be written \(No space left on device\): free some space"
        ):
            begin(
                ["--config=train/configs/smoke.yaml", f"--run.root={disk}", "--run.name=run", f"--data.path={data}"],
                ["n1"],
                ["n1"],
                "torchrun",
            )
