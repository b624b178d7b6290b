"""Every command in docs/reports.md is run, in its order."""

import json
import re
import shlex
from pathlib import Path

import pytest

from eval.reporting.key_figures import key_figures
from eval.reporting.run_data import load_run
from tests.helpers.forked_command import run_command
from tests.helpers.recorded_runs import recorded_run
from tests.helpers.training import PROJECT

DOCUMENT = PROJECT / "docs" / "reports.md"


def test_every_command_of_the_reports_page_works(tmp_path: Path) -> None:
    recorded_run(tmp_path, "demo", lives=[(0, 25), (20, 40)], hellaswag=True)
    recorded_run(tmp_path, "longer", learning_rate=4e-3)
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        python, script, *options = shlex.split(line, comments=True)
        assert python == "python"
        done = run_command([script, *options], tmp_path)
        assert done.status == 0, (line, done)
    assert (tmp_path / "runs" / "demo" / "report" / "report.html").exists()
    assert (tmp_path / "reports" / "lengths" / "report.html").exists()
    assert (tmp_path / "reports" / "models.json").exists()


def test_the_committed_record_still_gives_its_figures() -> None:
    """The record is a run's folder as the trainer wrote it."""
    record = PROJECT / "records" / "2026-11-22-report"
    (before,) = json.loads((record / "figures.json").read_text())["runs"]
    again = key_figures(load_run(record, "interrupted")).as_json()
    seconds, recorded = again.pop("seconds"), before.pop("seconds")
    assert seconds == pytest.approx({key: recorded.get(key, 0.0) for key in seconds})
    assert recorded.keys() <= seconds.keys()
    newer = {key: again.pop(key) for key in again.keys() - before.keys()}
    assert again == pytest.approx({key: before[key] for key in again})
    assert (newer["steps_skipped"], newer["rollbacks"]) == (0, 0)
    assert newer["goodput"] == pytest.approx(seconds["compute"] / seconds["total"], rel=0.1)
