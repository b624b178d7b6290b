"""Whether a run gets on is judged by its progress and its process, and every view says it in the same words."""

import json
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.liveness import Signs, judge, look_at, read_signs
from common.metrics_table import MetricsTable
from common.processes import ProcessIdentity
from common.publish import write_json_whole
from common.rewritten_file import read_record
from common.run_folder import RunFolder
from eval.reporting.live_view import LiveRun, frame
from eval.reporting.look import Look
from eval.reporting.page import page
from eval.reporting.run_data import load_run
from slurm.status import read_status, table
from tests.helpers.recorded_runs import recorded_run
from tests.helpers.training import PROJECT
from train.run import heartbeat
from train.run.acts import Acts
from train.run.heartbeat import Heartbeat

NOW = 1_700_000_000.0
SIGNS = Signs(
    status="running",
    reason="training",
    trouble="",
    suspect="",
    job_id="7",
    process="unknown",
    pid=12,
    host="node7",
    phase="validating",
    progress=NOW - 10,
    sign=NOW - 3,
    patience_seconds=120.0,
)


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ({}, "running: validating"),
        ({"process": "alive", "phase": None}, "running: training"),
        ({"sign": NOW + 500, "progress": NOW + 490}, "running: validating"),  # its clock is ahead
        ({"sign": NOW + 500, "progress": NOW + 300}, "silent: no progress for 3 min 20 s (validating)"),
        ({"progress": NOW - 300}, "silent: no progress for 5 min 00 s (validating)"),  # it beats, and that is all
        ({"progress": NOW - 300, "patience_seconds": 400.0}, "running: validating"),
        ({"progress": None}, "silent: no progress yet (validating)"),
        ({"process": "alive", "progress": NOW - 300, "sign": NOW - 300, "phase": None},
         "silent: no progress for 5 min 00 s (training)"),
        ({"suspect": "rank 3 on node7, in backward"}, "silent: waits for rank 3 on node7, in backward"),
        ({"suspect": "rank 3 on node7", "process": "gone"}, "gone: its process 12 on node7 is gone"),
        ({"trouble": "step 9: no room"}, "running: validating; NOT SAVED: step 9: no room"),
        ({"process": "gone"}, "gone: its process 12 on node7 is gone"),
        (
            {"progress": NOW - 300, "sign": NOW - 300},
            "unknown: no sign of life for 5 min 00 s, and its process on node7 can't be seen from here",
        ),
        ({"status": "done", "reason": "all steps done", "process": "gone"}, "done: all steps done"),
        ({"status": "preempted", "reason": "SIGTERM", "sign": None, "progress": None}, "preempted: SIGTERM"),
        ({"status": None, "sign": None, "progress": None}, "unknown: no readable state"),
    ],
)  # fmt: skip
def test_the_judgement_in_words(signs: dict[str, Any], said: str):
    judged = judge(replace(SIGNS, **signs), NOW)
    assert str(judged) == said
    assert judged.is_progressing == said.startswith("running")


@pytest.mark.parametrize(
    ("job_id", "state", "said"),
    [
        ("7", "NODE_FAIL", "gone: its job 7 is NODE_FAIL"),
        ("7", "PENDING", "gone: its job 7 is PENDING"),
        ("7", "RUNNING", "running: validating"),
        ("7", "COMPLETING", "running: validating"),
        ("7", None, "running: validating"),
        ("8", "PENDING", "running: validating"),  # the one that waits for this one's end
    ],
)
def test_slurm_knows_of_processes_on_other_machines(job_id: str, state: str | None, said: str):
    assert str(judge(SIGNS, NOW, job_id=job_id, job_state=state)) == said


@pytest.fixture
def running(tmp_path: Path) -> RunFolder:
    """A run that calls itself running, at step 40 of 100, each step of a second."""
    folder = recorded_run(tmp_path, "one")
    folder.write_state("running", reason="training", step=40, tokens=40_000)
    folder.rank_file(0).parent.mkdir()
    return folder


@pytest.fixture
def killed() -> dict[str, Any]:
    """The identity of a real process that has been killed."""
    code = (
        "import json, sys; from dataclasses import asdict; from common.processes import ProcessIdentity\n"
        "print(json.dumps(asdict(ProcessIdentity.of_this_process())), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT
    ) as process:
        assert process.stdout is not None
        identity: dict[str, Any] = json.loads(process.stdout.readline())
        assert not ProcessIdentity.from_record(identity).is_gone()
        process.kill()
    return identity


def views(folder: RunFolder, now: float) -> list[str]:
    """What each view says of a run."""
    live = LiveRun(folder, MetricsTable(folder.metrics))
    live.refresh()
    run = replace(load_run(folder.path), liveness=look_at(folder, now))
    return [
        "\n".join(frame(live, 300, 10, Look(True, False), now)),
        table([read_status(folder, now)]),
        page([run], {}, now).replace("</b>", "").replace("&#x27;", "'"),
    ]


def test_every_view_says_that_a_killed_trainer_is_gone(running: RunFolder, killed: dict[str, Any]):
    """Its heart beat a second ago, and its metrics are of the same moment."""
    now = load_run(running.path).table.lives[-1].end + 1
    write_json_whole(running.lock, killed | {"token": "a", "renewed": now - 1})
    write_json_whole(running.rank_file(0), killed | {"step": 40, "phase": "training", "progressed": now, "time": now})
    for view in views(running, now):
        assert f"its process {killed['pid']} on {killed['host']} is gone" in view
        assert "ETA 1 min" not in view and "60.0 s" not in view and "running: " not in view
    status = read_status(running, now)
    assert (status.status, status.alive, status.eta_seconds) == ("running", "gone", None)


def test_every_view_says_that_a_trainer_only_beats(running: RunFolder):
    """Its process lives (it is this one) and its heart has just beaten, but it has done nothing for five minutes."""
    end = load_run(running.path).table.lives[-1].end
    me = asdict(ProcessIdentity.of_this_process())
    beat = me | {"step": 40, "phase": "training", "progressed": end - 2}
    for now, said in ((end + 60, "running"), (end + 300, "no progress for 5 min 00 s (training)")):
        write_json_whole(running.lock, me | {"token": "a", "renewed": now})
        write_json_whole(running.rank_file(0), beat | {"time": now})
        for view in views(running, now):
            assert said in view
            assert ("no progress" in view) == (said != "running")
            if said != "running":
                assert "ETA 1 min" not in view and "60.0 s" not in view
        assert read_status(running, now).eta_seconds == (60.0 if said == "running" else None)


def test_another_step_or_phase_is_progress_and_an_earlier_starts_heart_is_none(running: RunFolder):
    end = load_run(running.path).table.lives[-1].end
    me = asdict(ProcessIdentity.of_this_process())
    write_json_whole(running.lock, me | {"renewed": end + 300})
    earlier = me | {"started": me["started"] - 1.0}
    write_json_whole(running.rank_file(0), earlier | {"phase": "saving", "progressed": end + 290, "time": end + 290})
    assert str(look_at(running, end + 300)) == "silent: no progress for 5 min 00 s (training)"
    write_json_whole(running.rank_file(0), me | {"phase": "validating", "progressed": end + 290, "time": end + 290})
    assert str(look_at(running, end + 300)) == "running: validating"


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", '{"pid": "12"}', '{"host": 1, "pid": "x", "started": null, "boot": 2, "namespace": 3}',
     '{"time": "noon", "renewed": true, "progressed": {}, "phase": 7}'],
)  # fmt: skip
def test_what_can_not_be_read_is_never_guilty(running: RunFolder, record: str):
    for path in (running.lock, running.rank_file(0)):
        path.write_text(record)
    end = load_run(running.path).table.lives[-1].end
    assert look_at(running, end + 1).verdict == "running"
    assert look_at(running, end + 1000).verdict == "unknown"
    for path in (running.state, running.metrics):
        path.write_text(record)
    assert look_at(running, end + 1000).verdict == "unknown"


def test_a_run_whose_steps_take_long_has_time(running: RunFolder):
    """20 of its steps, or three of its validations."""
    assert read_signs(running).patience_seconds == 120.0
    with open(running.metrics, "a") as file:
        file.write(json.dumps({"step": 41, "val_loss": 2.0, "val_seconds": 100.0, "time": NOW}) + "\n")
    assert read_signs(running).patience_seconds == 300.0


def test_a_heart_that_beats_makes_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    folder = RunFolder(tmp_path)

    def beat_after(moment: float) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            beat = read_record(folder.rank_file(0))  # None while it is being rewritten
            if beat is not None and beat["time"] > moment:
                return beat
        raise AssertionError("no beat came")

    acts = Acts()
    with closing(Heartbeat(folder, 0, acts)):
        first = beat_after(0.0)
        later = beat_after(first["time"])
        assert later["progressed"] == first["progressed"] <= first["time"]
        acts.enter("training")
        changed = time.time()
        assert beat_after(changed + 0.05)["progressed"] >= changed - 0.05
        acts.enter("training", step=1)
        changed = time.time()
        assert beat_after(changed + 0.05)["progressed"] >= changed - 0.05


def test_peak_memory_is_the_process_s_own_whoever_started_it() -> None:
    """On Linux ru_maxrss of a process begins with what its parent holds (execve keeps it)."""
    held = b"1" * (400 << 20)
    command = [sys.executable, "-c", "from common.processes import peak_resident_bytes; print(peak_resident_bytes())"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
    assert 5 << 20 < int(done.stdout) < len(held) / 2
