"""Every entry script answers a mistaken command line with one line and status 2, explains itself, has a version."""

import json
import re
import subprocess
import sys
from pathlib import Path

from common.version import VERSION

PROJECT = Path(__file__).resolve().parents[2]
LAUNCHER = "train/launch.py"  # answers mistakes in a process that it starts: tests/train/test_launch_options.py
OF_LAUNCHER = "train/launching/torchrun_agent.py"  # only it starts that
MISTAKES = ("--no-such-option", "--hel")  # the beginning of an option is none
ASK_ALL = """
import contextlib, json, runpy, sys, tempfile
answers = {}
for question in sys.argv[1:]:
    script, _ = sys.argv = question.split()
    said, complained = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            runpy.run_path(script, run_name="__main__")
            status = None
        except SystemExit as end:
            status = end.code
    answers[question] = [status, *(file.seek(0) or file.read() for file in (said, complained))]
print(json.dumps(answers))
"""


def entry_scripts() -> list[str]:
    rooms = ("data_prep", "docs", "eval", "model", "setup", "slurm", "train")
    found = [
        path for room in rooms for path in (PROJECT / room).rglob("*.py") if "exit_on_user_error(" in path.read_text()
    ]
    return sorted({path.relative_to(PROJECT).as_posix() for path in found} - {OF_LAUNCHER})


def test_a_mistake_is_one_line_and_help_is_there() -> None:
    """In one process, so that torch is loaded once."""
    scripts = entry_scripts()
    assert len(scripts) > 25 and LAUNCHER in scripts
    mistakes = [f"{script} {mistake}" for script in scripts if script != LAUNCHER for mistake in MISTAKES]
    questions = [f"{script} {question}" for script in scripts for question in ("--help", "--version")]
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, *mistakes, *questions], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for mistake in mistakes:
        status, said, complained = answers[mistake]
        assert (status, said) == (2, ""), (mistake, said)
        assert complained.startswith("error: ") and complained.count("\n") == 1, (mistake, complained)
    for script in scripts:
        status, said, _ = answers[f"{script} --help"]
        assert status == 0, script
        assert "usage: " in said, script
        assert answers[f"{script} --version"] == [0, f"longhaul {VERSION}\n", ""], script


def test_the_changelogs_newest_list_is_this_versions() -> None:
    headings = re.findall(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == VERSION
    assert len(headings) == len(set(headings))
