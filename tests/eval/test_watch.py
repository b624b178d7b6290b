"""The live view in a real (pseudo-)terminal, beside a run that grows, and its lines at any size."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.metrics_file import MetricsFile, read_metrics
from common.metrics_table import MetricsTable
from common.run_folder import RunFolder
from eval.reporting.live_view import LiveRun, SeveralRuns, frame, seconds_per_step
from eval.reporting.look import Look
from eval.reporting.terminal_plot import axis, bucket_means, plot
from eval.watch import ENTER, LEAVE, changes
from tests.eval.test_report import run_script
from tests.helpers.recorded_runs import BEGIN, recorded_run, train_record
from tests.helpers.training import PROJECT

COLOR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """watch.py in a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 100, lines: int = 24, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "eval" / "watch.py"), *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ
            | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
            | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (one call; Ctrl-C comes from it)
        )
        os.close(slave)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def wait_for(self, found: Callable[[str], bool], seconds: float = 60.0) -> str:
        """Read until what came is as wished; return and forget it."""
        deadline = time.monotonic() + seconds
        while not found(self.shown):
            assert time.monotonic() < deadline, f"never came: {self.shown[-3000:]!r}"
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    assert found(self.shown), self.shown[-3000:]
        shown, self.shown = self.shown, ""
        return shown

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def leave(self) -> int:
        """Read what is still written, and the exit status."""
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 65536):
                self.shown += data.decode("utf-8", "replace")
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str, **options: object) -> Terminal:
        opened.append(Terminal(*arguments, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


WHOLE = "\x1b[J\x1b[?2026l"  # how a whole picture ends


def append(folder: RunFolder, *records: dict[str, object]) -> None:
    metrics = MetricsFile(folder.metrics)
    for record in records:
        metrics.append(record)
    metrics.close()


def test_a_growing_run_is_followed_and_ctrl_c_leaves_cleanly(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = RunFolder(tmp_path / "young")
    folder.path.mkdir()
    folder.config.write_text("run: {max_steps: 50}\n")
    watch = terminal(str(folder.path), "--interval", "0.1")
    first = watch.wait_for(lambda shown: "waiting for the first" in shown)
    assert first.startswith(ENTER)

    append(folder, {"kind": "start", "step": 0, "time": BEGIN})
    append(folder, *(train_record(step, BEGIN + step, 3.0) for step in range(1, 21)))
    shown = watch.wait_for(lambda shown: "step 20 of 50 (40.0%)" in shown and "│" in shown)
    assert "loss 3.0000" in shown

    with open(folder.metrics, "ab") as file:
        file.write(b'{"step": 21, "lo')
    append(folder, {"kind": "start", "step": 15, "time": BEGIN + 90}, train_record(16, BEGIN + 91, 2.5))
    append(folder, {"step": 16, "tokens": 16_000, "val_loss": 2.75, "time": BEGIN + 92})
    shown = watch.wait_for(lambda shown: "step 16 of 50" in shown and "2.7500" in shown and "1 restart" in shown)

    watch.press_ctrl_c()
    assert watch.leave() == 0
    assert LEAVE in watch.shown
    assert "Traceback" not in watch.shown
    assert "step 16 of 50" in watch.shown[watch.shown.index(LEAVE) :], "what was seen last stays in the terminal"


def test_another_size_is_drawn_at_once(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = recorded_run(tmp_path, "wide")
    watch = terminal(str(folder.path), "--interval", "3600", columns=120)
    shown = watch.wait_for(lambda shown: shown.endswith(WHOLE))
    assert max(len(line) for line in screen(shown)) > 60

    watch.resize(30, 10)

    shown = watch.wait_for(lambda shown: shown.endswith(WHOLE))
    assert max(len(line) for line in screen(shown)) <= 30
    assert len(screen(shown)) <= 10


def test_q_leaves_and_only_changed_lines_are_drawn(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = recorded_run(tmp_path, "run")
    watch = terminal(str(folder.path), "--interval", "0.1", columns=100)
    first = watch.wait_for(lambda shown: shown.endswith(WHOLE))
    (axis,) = (line for line in screen(first) if line.startswith("    step"))
    assert "┴1" in axis or "└1" in axis
    last = [record for record in read_metrics(folder.metrics) if record.get("loss") is not None][-1]
    step = int(last["step"])
    append(folder, train_record(step + 1, float(last["time"]) + 1, 2.0))
    shown = watch.wait_for(lambda shown: f"step {step + 1:,}" in shown and shown.endswith("\x1b[?2026l"))
    assert WHOLE not in shown and "\x1b[H" not in shown  # no line that is as it was
    os.write(watch.master, b"xq")
    assert watch.leave() == 0
    assert LEAVE in watch.shown and "xq" not in watch.shown


def test_changes_turn_one_picture_into_the_next() -> None:
    assert changes(["a", "b"], ["a", "b"]) == ""
    assert changes(["a", "b"], ["a", "c"]) == "\x1b[?2026h\x1b[2;1Hc\x1b[K\x1b[?2026l"
    assert "\x1b[2;1H\x1b[K" in changes(["a", "b"], ["a"])
    assert "\x1b[2;1Hb\x1b[K" in changes(["a"], ["a", "b"])


@pytest.mark.parametrize(("height", "shown"), [(40, 3), (24, 3), (9, 2), (3, 1)])
def test_several_runs_are_shown_one_below_the_other(tmp_path: Path, height: int, shown: int) -> None:
    runs = [recorded_run(tmp_path, name) for name in ("one", "two", "three")]
    view = SeveralRuns(tuple(LiveRun(run, MetricsTable(run.metrics)) for run in runs))
    view.refresh()
    lines = view.frame(80, height, Look(unicode=True, color=False), BEGIN)
    assert len(lines) <= height and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith(("one ", "two ", "three "))] == [
        "one", "two", "three"
    ][:shown]  # fmt: skip
    assert ("more for which" in lines[-1]) is (shown < 3)
    assert lines.count("loss") == (3 if height >= 24 else 0)  # the titles of their curves


def test_an_axis_names_its_ends_in_any_width() -> None:
    for width in range(130):
        for line in axis((1.0, 1_000_000.0), width, braille=True):
            assert len(line) == width and line.endswith("1,000,000")
    (line,) = axis((1.0, 401.0), 60, braille=False)
    assert line.startswith("    step+1-") and "-201-" in line


def screen(shown: str) -> list[str]:
    """The lines of the last frame, without colours."""
    last = shown.rsplit("\x1b[H", 1)[1]
    return [COLOR.sub("", line).replace("\x1b[K", "").replace(WHOLE, "").strip("\r") for line in last.split("\n")]


def test_a_termination_gives_the_terminal_back(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    watch = terminal(str(recorded_run(tmp_path, "run").path))
    watch.wait_for(lambda shown: shown.endswith(WHOLE))
    watch.process.send_signal(signal.SIGTERM)
    assert watch.leave() == 128 + signal.SIGTERM
    assert watch.shown.endswith(LEAVE)


def test_no_color_and_no_unicode(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = recorded_run(tmp_path, "plain")
    coloured = terminal(str(folder.path)).wait_for(lambda shown: shown.endswith(WHOLE))
    assert COLOR.search(coloured) and "⠉" in coloured
    for environment in ({"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}, {"TERM": "linux"}):
        shown = terminal(str(folder.path), **environment).wait_for(lambda shown: shown.endswith(WHOLE))
        assert bool(COLOR.search(shown)) == ("NO_COLOR" not in environment)
        assert shown.isascii() == ("NO_COLOR" not in environment)
        assert "*" in shown or "NO_COLOR" in environment


def test_without_a_terminal_it_prints_once(tmp_path: Path) -> None:
    recorded_run(tmp_path, "run", lives=[(0, 25), (20, 40)], hellaswag=True)

    done = run_script("watch.py", "runs/run", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for expected in ("done: all steps done", "1 restart", "step 40 of 100", "HellaSwag 0.2900", "sample, step 20"):
        assert expected in done.stdout, expected


@pytest.mark.parametrize(
    ("arguments", "said"), [(["nowhere"], "not a run's folder"), (["run", "--interval", "0"], "above")]
)
def test_wrong_input_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run_script("watch.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> LiveRun:
    """A run that has everything, and a sample that would upset a terminal."""
    folder = recorded_run(tmp_path_factory.mktemp("watch"), "a-run-with-a-long-name", lives=[(0, 60), (55, 80)])
    samples = MetricsFile(folder.samples)
    samples.append({"step": 80, "prompt": "Once\x1b[2J", "text": "ünïcode\n\x07 " + "and on " * 100})
    samples.close()
    run = LiveRun(folder, MetricsTable(folder.metrics))
    run.refresh()
    return run


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.booleans(), st.booleans())
def test_a_frame_fits_any_terminal(full: LiveRun, width: int, height: int, unicode: bool, color: bool) -> None:
    lines = frame(full, width, height, Look(unicode, color), BEGIN)
    assert 1 <= len(lines) <= height
    for line in lines:
        bare = COLOR.sub("", line)
        assert len(bare) <= width
        assert bare.isprintable()
        assert unicode or bare.isascii()
        assert color or bare == line
    if width >= 24 and height >= 20:
        assert len(lines) >= height - 2, "the plots take the room there is"


def test_the_rate_is_that_of_the_newest_start_with_what_lies_between_steps(tmp_path: Path) -> None:
    """Steps of a second; a validation and a save, 2.5 s together, after step 30 between them."""
    table = MetricsTable(recorded_run(tmp_path, "run", lives=[(0, 25), (20, 40)]).metrics)
    table.update()
    assert seconds_per_step(table) == pytest.approx((19 + 2.5) / 19)


def test_a_run_whose_saves_fail_is_red_on_top(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "full")
    folder.write_state("running", reason="training", step=40, tokens=1, trouble="step 30 could not be saved: no room")
    run = LiveRun(folder, MetricsTable(folder.metrics))
    run.refresh()
    title = frame(run, 200, 20, Look(True, True), run.table.lives[-1].end)[0]
    assert "NOT SAVED: step 30 could not be saved: no room" in title and "1;31m" in title


def test_a_plot_puts_values_at_their_height() -> None:
    rising = plot(np.arange(1000.0), 30, 5, braille=False)
    assert [line.rindex("*") for line in rising] == sorted((line.rindex("*") for line in rising), reverse=True)
    assert rising[0].startswith("   975.5|") and rising[-1][9] == "*"
    dots = plot(np.array([0.0, 1.0]), 9 + 4, 2, braille=True)
    assert [line[9:] for line in dots] == ["⠀⠀⡏⠉", "⣀⣀⠇"]


def test_bucket_means_are_means() -> None:
    values = np.arange(10.0)
    values[3] = np.nan
    assert bucket_means(values, 3).tolist() == [1.0, 4.5, 7.5]
    assert bucket_means(values[:2], 5).tolist() == [0.0, 1.0]
