"""Run pip with one line of progress instead of hundreds of lines; its full output goes to a log file."""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.errors import UserError
from common.plain_text import print_codes
from setup.why_not_installed import OF_PIP, reason

LINE_SECONDS = 10.0  # how often progress is written where standard output is no terminal
STEPS = ("Collecting", "Downloading", "Building", "Installing", "Resolved", "Prepared", "Installed")  # uv's, too


def pip_install(python: Path, arguments: list[str], *, log: Path, what: str, lock: int | None) -> None:
    """`pip install` with `arguments` in the environment of `python`.

    Args:
        log: file that pip's output is appended to. what: what is being installed, for the line of progress.
        lock: file descriptor that pip should hold open as well, if any.

    Raises UserError with pip's own reason.
    """
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    environment = {**os.environ, "PIP_USER": "0", "PYTHONUNBUFFERED": "1"}  # user = true in a pip.conf breaks in a venv
    with subprocess.Popen(
        [*command, *progress_option(python), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        pass_fds=() if lock is None else (lock,),
    ) as pip:
        said = follow(pip, log, what, "pip")
    if pip.returncode:
        raise UserError(f"pip could not install the {what}: {reason(said, OF_PIP)} (all of it: {log})")


def progress_option(python: Path) -> list[str]:
    """Since 24.1 pip can write its progress as plain lines."""
    query = "import pip; print(*pip.__version__.split('.')[:2])"
    answer = subprocess.run(
        [python, "-c", query], capture_output=True, text=True, encoding="utf-8", errors="replace", check=True
    ).stdout
    return ["--progress-bar", "raw"] if tuple(map(int, answer.split())) >= (24, 1) else []


def follow(pip: "subprocess.Popen[str]", log: Path, what: str, tool: str) -> list[str]:
    """Show the progress of pip, or of another `tool`, until it ends; return its lines."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=forward, args=(pip, lines), daemon=True).start()
    terminal, started, shown, said = sys.stdout.isatty(), time.monotonic(), 0.0, list[str]()
    step, done = f"starting {tool}", ""
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        while True:
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                line = ""
            if line is None:
                break
            if amount := re.match(r"Progress (\d+) of (\d+)", line):
                done = f" {100 * int(amount[1]) // max(1, int(amount[2]))} %"
            elif line:
                file.write(line)
                said.append(line.strip())
                if line.strip().startswith(STEPS):
                    step, done = short(line.strip()), ""
            elapsed = time.monotonic() - started
            if elapsed - shown >= (0.2 if terminal else LINE_SECONDS):
                shown = elapsed
                show(f"installing {what}: {elapsed:.0f} s, {step}{done}", terminal)
    show(f"installing {what}: {time.monotonic() - started:.0f} s, {tool} has ended", terminal)
    if terminal:
        print()
    return said


def short(line: str) -> str:
    """A line of pip's for one line of progress."""
    if line.startswith("Installing collected packages: "):
        return f"unpacking {line.count(',') + 1} packages"
    return line.split(" (from ")[0][:70]


def forward(pip: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert pip.stdout is not None
    for line in pip.stdout:
        lines.put(line)
    lines.put(None)


def show(text: str, terminal: bool) -> None:
    if terminal:
        print_codes("\r\x1b[K")
        print(text, end="", flush=True)
    else:
        print(text, flush=True)
