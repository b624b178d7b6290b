"""All runs under a root at a glance: one line each, whatever one of them is."""

import json
import os
from pathlib import Path
from typing import Any

from common.metrics_file import MetricsFile
from common.run_folder import RunFolder
from eval.reporting.look import Look
from eval.reporting.overview import Overview
from tests.eval.test_report import run_script
from tests.helpers.recorded_runs import BEGIN, recorded_run, train_record

PLAIN = Look(unicode=True, color=False)


def test_every_run_has_a_line_and_what_trains_comes_first(tmp_path: Path) -> None:
    recorded_run(tmp_path, "a-done")
    busy = recorded_run(tmp_path, "z-busy", lives=[(0, 25), (20, 32)])
    metrics = MetricsFile(busy.metrics)
    metrics.append(train_record(33, BEGIN + 200, 3.0))
    metrics.append({"kind": "spike", "step": 33, "skips": 1, "time": BEGIN + 200})
    metrics.close()
    checkpoint = busy.checkpoints / "step-00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    os.utime(checkpoint / "checkpoint.json", (BEGIN + 100, BEGIN + 100))
    busy.write_state("running", reason="training", step=33, tokens=33_000)
    hung = recorded_run(tmp_path, "m-hung")
    suspect = "rank 3 on node7, step 41, in backward, silent for 74 s"
    hung.write_state("running", reason="training", step=40, tokens=40_000, suspect=suspect)
    (tmp_path / "runs" / "notes").mkdir()
    overview = Overview(tmp_path / "runs")
    overview.refresh()

    head, *rows = overview.frame(400, 50, PLAIN, BEGIN + 220.0)

    assert head.split() == ["run", "state", "step", "ETA", "tokens/s", "suspect", "skips", "saved", "goodput"]
    cells = [row.split() for row in rows]
    assert [row[0] for row in cells] == ["m-hung", "z-busy", "a-done"]
    assert cells[0][1:4] == ["silent", "40/100", "-"]
    assert "  rank 3 on node7  " in rows[0] and rows[0].endswith(f"waits for {suspect}")
    assert cells[1][1:3] == ["running", "33/100"] and "2 min 00 s ago" in rows[1]
    assert cells[1][-2].endswith("%") and " 1 " in rows[1]
    assert cells[2][1] == "done"
    assert overview.frame(30, 3, PLAIN, BEGIN + 220.0)[-1] == "and 2 more"
    assert max(map(len, overview.frame(30, 3, PLAIN, BEGIN + 220.0))) <= 30


def test_a_run_that_grows_or_comes_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    overview = Overview(root)
    overview.refresh()
    assert overview.frame(400, 5, PLAIN, 0.0) == [f"no runs in {root} yet"]
    folder = recorded_run(tmp_path, "new", lives=[(0, 7)])
    overview.refresh()
    assert "7/100" in overview.frame(200, 5, PLAIN, BEGIN)[1]
    metrics = MetricsFile(folder.metrics)
    metrics.append(train_record(8, BEGIN + 20, 3.0))
    metrics.close()
    overview.refresh()
    assert "8/100" in overview.frame(200, 5, PLAIN, BEGIN)[1]


def test_a_run_that_can_not_be_read_costs_its_own_line(tmp_path: Path) -> None:
    recorded_run(tmp_path, "good")
    for name, file in (("piped", "metrics.jsonl"), ("torn", "state"), ("locked", "lock")):
        folder = recorded_run(tmp_path, name)
        (folder.path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "runs" / "piped" / "metrics.jsonl")
    (tmp_path / "runs" / "torn" / "state").write_text('{"status": "runn')
    (tmp_path / "runs" / "locked" / "lock").symlink_to("/dev/zero")
    odd: dict[str, Any] = {"kind": "start", "step": 3, "launched": "early", "time": []}
    RunFolder(tmp_path / "runs" / "odd").path.mkdir()
    (tmp_path / "runs" / "odd" / "metrics.jsonl").write_text(json.dumps(odd) + "\n" + '{"kind": "hang", "step": 4}\n')

    done = run_script("watch.py", "--root", "runs", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    rows = {row.split()[0]: row for row in done.stdout.splitlines()[1:]}
    assert set(rows) == {"good", "locked", "odd", "piped", "torn"}
    assert "metrics.jsonl can't be read (it is a pipe, not a file)" in rows["piped"]
    assert "state is damaged" in rows["torn"]
    assert {name for name, row in rows.items() if row.split()[1] == "unreadable"} == {"piped", "torn"}
    assert rows["good"].split()[1:3] == ["done", "40/100"]


def test_a_root_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run_script("watch.py", "--once", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs ") and done.stderr.count("\n") == 1
