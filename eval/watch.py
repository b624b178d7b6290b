"""Watch runs: progress, ETA, curves, rates, restarts, the last sample. Without a name: all runs, a line each.

    python eval/watch.py runs/demo
    python eval/watch.py runs/demo runs/longer
    python eval/watch.py runs/demo --once
    python eval/watch.py --root runs

Plain text that any terminal shows, also over ssh; q or Ctrl-C quits, without any effect on runs. Where standard output
is no terminal it is printed once. NO_COLOR (no-color.org) and terminals without Unicode are respected.
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
from itertools import zip_longest
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.metrics_table import MetricsTable
from common.run_folder import RunFolder
from eval.reporting.live_view import LiveRun, SeveralRuns
from eval.reporting.look import Look
from eval.reporting.overview import Overview

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # the alternate screen, no cursor, no line breaks at the edge
View = LiveRun | SeveralRuns | Overview
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Watch a run, or all.")
    parser.add_argument(
        "run", nargs="*", type=Path, help="folders of runs, such as runs/demo; default: all below --root"
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
    runs = tuple(one_run(RunFolder(path)) for path in arguments.run)
    view: View = runs[0] if len(runs) == 1 else SeveralRuns(runs) if runs else Overview(arguments.root)
    live = hasattr(signal, "SIGWINCH")  # not on Windows
    terminal = live and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    look = Look(unicode=not arguments.ascii and can_show_dots(), color=terminal and not os.environ.get("NO_COLOR"))
    view.refresh()  # before the terminal is changed: a mistake is one line
    if arguments.once or not terminal:
        size = shutil.get_terminal_size()
        if not runs and not terminal:
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


def watch(view: View, look: Look, interval: float) -> None:
    """Draw until q or Ctrl-C; the terminal is as before afterwards, with the last view's first lines in it."""
    lines: list[str] = []
    drawn: list[str] | None = None  # what the terminal shows; None where that is unknown
    with full_screen() as wakeup, single_keys() as keys:
        try:
            while True:
                view.refresh()
                size = os.get_terminal_size(sys.stdout.fileno())
                lines = view.frame(size.columns, size.lines, look, time.time())
                show(changes(drawn, lines))
                drawn = lines
                ready = select.select([wakeup, *keys], [], [], interval)[0]
                if wakeup in ready:  # the terminal has another size
                    os.read(wakeup, 4096)
                    drawn = None
                if any(number in ready for number in keys) and leaves(os.read(keys[0], 64), keys):
                    break
        except KeyboardInterrupt:
            pass
    show("".join(f"{line}\n" for line in lines[:4]))


def leaves(typed: bytes, keys: list[int]) -> bool:
    """Whether one of the keys is q; at the end of input there is nothing more to wait for."""
    if not typed:
        keys.clear()
    return b"q" in typed or b"Q" in typed


def changes(drawn: list[str] | None, lines: list[str]) -> str:
    """What turns the terminal's lines into these, drawn at once where it can hold its picture back (mode 2026).

    Only lines that differ are written, so that nothing flickers over a slow connection. drawn: None: all are unknown.
    """
    if drawn is None:
        text = "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J"
    else:
        pairs = enumerate(zip_longest(drawn, lines, fillvalue=""), 1)
        text = "".join(f"\x1b[{row};1H{new}\x1b[K" for row, (old, new) in pairs if old != new)
    return f"\x1b[?2026h{text}\x1b[?2026l" if text else ""


@contextmanager
def single_keys() -> Iterator[list[int]]:
    """Keys are read as they are typed, and not shown; yields the descriptor to read them from, if there is one."""
    import termios  # not on Windows
    import tty

    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (AttributeError, OSError, ValueError, termios.error):  # no terminal there, or nothing at all
        yield []
        return
    try:
        tty.setcbreak(number, termios.TCSANOW)
        yield [number]
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


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
