"""Every entry script answers a mistaken command line with one line and status 2, and explains itself."""

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# they start processes, or are started by one: tests/train/test_launch.py
OF_TORCHRUN = {"train/launch.py", "train/launching/torchrun_agent.py"}
ASK_ALL = """
import contextlib, json, runpy, sys, tempfile
answers = {}
for script in sys.argv[1:]:
    for option in ("--no-such-option", "--hel", "--help"):
        sys.argv = [script, option]
        said, complained = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            try:
                runpy.run_path(script, run_name="__main__")
                status = None
            except SystemExit as end:
                status = end.code
        answers[f"{script} {option}"] = [status, *(file.seek(0) or file.read() for file in (said, complained))]
print(json.dumps(answers))
"""


def entry_scripts() -> list[str]:
    rooms = ("data_prep", "eval", "model", "setup", "slurm", "train")
    found = [
        path for room in rooms for path in (PROJECT / room).rglob("*.py") if "exit_on_user_error(" in path.read_text()
    ]
    return sorted({path.relative_to(PROJECT).as_posix() for path in found} - OF_TORCHRUN)


def test_a_mistake_is_one_line_and_help_is_there() -> None:
    """In one process, so that torch is loaded once."""
    scripts = entry_scripts()
    assert len(scripts) > 25
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, *scripts], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for script in scripts:
        for mistake in ("--no-such-option", "--hel"):  # the beginning of an option is none
            status, said, complained = answers[f"{script} {mistake}"]
            assert (status, said) == (2, ""), (script, said)
            assert complained.startswith("error: ") and complained.count("\n") == 1, (script, complained)
        status, said, _ = answers[f"{script} --help"]
        assert status == 0, script
        assert "usage: " in said, script
