"""Watch a run: progress, ETA, curves, rates, restarts, the last sample. Without its name: all runs, a line each.

    python eval/watch.py runs/demo
    python eval/watch.py runs/demo --once
    python eval/watch.py --root runs

Plain text that any terminal shows, also over ssh; Ctrl-C quits, without any effect on the run. Where standard output is
no terminal it is printed once. NO_COLOR (no-color.org) and terminals without Unicode are respected.
"""

import argparse
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.metrics_table import MetricsTable
from common.run_folder import RunFolder
from eval.reporting.live_view import LiveRun, Look
from eval.reporting.overview import Overview

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # the alternate screen, no cursor, no line breaks at the edge
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Watch a run, or all.")
    parser.add_argument(
        "run", nargs="?", type=Path, help="folder of a run, such as runs/demo; default: all below --root"
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are; default runs")
    parser.add_argument("--once", action="store_true", help="print the view once and quit")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between updates (default: 2)")
    parser.add_argument("--ascii", action="store_true", help="use no character beyond ASCII")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not arguments.interval > 0:
        raise UserError(f"--interval is {arguments.interval}: use a number of seconds above 0")
    view = one_run(RunFolder(arguments.run)) if arguments.run is not None else Overview(arguments.root)
    live = hasattr(signal, "SIGWINCH")  # not on Windows
    terminal = live and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    look = Look(unicode=not arguments.ascii and can_show_dots(), color=terminal and not os.environ.get("NO_COLOR"))
    view.refresh()  # before the terminal is changed: a mistake is one line
    if arguments.once or not terminal:
        size = shutil.get_terminal_size()
        if arguments.run is None and not terminal:
            size = os.terminal_size((sys.maxsize, sys.maxsize))  # a list is whole in a pipe or a file
        show("\n".join(view.frame(size.columns, size.lines - 1, look, time.time())) + "\n")
        return 0
    watch(view, look, arguments.interval)
    return 0


def one_run(folder: RunFolder) -> LiveRun:
    """Raises UserError where there is none."""
    if not any(os.path.lexists(path) for path in (folder.metrics, folder.state, folder.config)):
        raise UserError(
            f"{folder.path} is not a run's folder: it has neither {folder.config.name} nor {folder.metrics.name}"
        )
    return LiveRun(folder, MetricsTable(folder.metrics))


def can_show_dots() -> bool:
    """Whether standard output takes braille. (The Linux console's fonts have none.)"""
    try:
        "⣿█░…".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return os.environ.get("TERM") != "linux"


def watch(view: LiveRun | Overview, look: Look, interval: float) -> None:
    """Draw until Ctrl-C; the terminal is as before afterwards, with the last view's first lines in it."""
    lines: list[str] = []
    with full_screen() as wakeup:
        try:
            while True:
                view.refresh()
                size = os.get_terminal_size(sys.stdout.fileno())
                lines = view.frame(size.columns, size.lines, look, time.time())
                show("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")
                if select.select([wakeup], [], [], interval)[0]:  # the terminal has another size
                    os.read(wakeup, 4096)
        except KeyboardInterrupt:
            pass
    show("".join(f"{line}\n" for line in lines[:4]))


@contextmanager
def full_screen() -> Iterator[int]:
    """The alternate screen for as long as this lasts; yields a descriptor that is readable after a change of size."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP)}
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGWINCH, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # through `finally`
    try:
        show(ENTER)
        yield reading
    finally:
        show(LEAVE)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old)
        os.close(reading)
        os.close(writing)


def show(text: str) -> None:
    """Write to the terminal in one piece; what its encoding lacks becomes a question mark."""
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "ascii", "replace"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    exit_on_user_error(main)
