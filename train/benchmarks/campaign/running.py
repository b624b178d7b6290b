"""How a campaign runs its checks: one process after the other, each with a limit, and a record that is always whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.json_file import BadJson, read_json
from common.paths import PROJECT
from common.plain_text import one_line
from common.publish import write_json_output

LATE = 1.5  # a check may take so many times the seconds that are planned for it
LEAST_SHARE = 0.5  # of its planned seconds that must be left for a check to be started
TINY_SECONDS = 10.0  # planned for a check on a CPU, which has no limit but the part's
LAST_LINES, FEW_LINES = 30, 3  # of a check's that are kept: of one that fails, and of others
EVERY_PART = 0


@dataclass(frozen=True)
class Figure:
    """A number that a check finds, beside the one that was predicted.

    Attributes:
        read: it, out of the check's JSON, which may lack it.
        least, most: beyond them the check is off. A prediction alone is only compared with.
        gpu_only: the limits are a GPU's.
    """

    name: str
    read: Callable[[Any], Any]
    predicted: float | None = None
    least: float | None = None
    most: float | None = None
    gpu_only: bool = False

    def of(self, result: Any, *, tiny: bool = False) -> dict[str, Any]:
        """As the record has it. `holds` is None where nothing is demanded, or nothing was found."""
        try:
            measured = self.read(result)
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError, StopIteration):
            measured = None  # it is not there, or is something else
        if not isinstance(measured, int | float):
            measured = None
        least, most = (None, None) if tiny and self.gpu_only else (self.least, self.most)
        holds = None
        if measured is not None and (least is not None or most is not None):
            holds = (least is None or measured >= least) and (most is None or measured <= most)
        found = {"name": self.name, "predicted": self.predicted, "measured": measured}
        return found | {"least": least, "most": most, "holds": holds}


@dataclass(frozen=True)
class Check:
    """One question to the machine.

    Attributes:
        part: of the campaign; EVERY_PART: asked first in each.
        seconds: planned for it.
        command: what Python runs, from the project's folder. {json}, {work}, {out}, {data} are replaced; what it writes
            to {json} is kept in the record.
        shows: what it must show, in a sentence.
        tiny: the command on a CPU; a sentence that says why there is none.
        hides_gpus: the command sees no GPU.
    """

    name: str
    part: int
    seconds: float
    command: Sequence[str]
    shows: str
    figures: Sequence[Figure] = ()
    tiny: Sequence[str] | str = "needs a GPU"
    hides_gpus: bool = False


@dataclass
class Campaign:
    """A part's checks, and the files that hold what came of them.

    Attributes:
        out: folder of `part-N.json`. work: of all else, on a local disk. data: a token set.
        seconds: for all checks together.
        tiny: run them on the CPU, with tiny sizes.
    """

    part: int
    checks: Sequence[Check]
    out: Path
    work: Path
    data: Path
    seconds: float
    tiny: bool = False
    on_change: Callable[[dict[str, Any]], None] = lambda row: None
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> dict[str, Any]:
        """Every check once; returns the record."""
        checks = [check for check in self.checks if check.part in (EVERY_PART, self.part)]
        rows = [self._row(check) for check in checks]
        record: dict[str, Any] = {"part": self.part, "tiny": self.tiny, "seconds": self.seconds, "facts": None}
        record |= {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "checks": rows}
        for check, row in zip(checks, rows, strict=True):
            if row["status"] == "waiting":
                self._take(check, row, record)
            if check.name == "facts":
                record["facts"] = row.pop("result", None)
            self._write(record)
            self.on_change(row)
        return record

    def _row(self, check: Check) -> dict[str, Any]:
        skipped = check.tiny if self.tiny and isinstance(check.tiny, str) else None
        return {
            "name": check.name,
            "status": "skipped" if skipped else "waiting",
            "shows": check.shows,
            "planned_seconds": check.seconds,
            "seconds": None,
            **({"reason": skipped} if skipped else {}),
            "figures": [] if skipped else self._figures(check, None),
        }

    def _take(self, check: Check, row: dict[str, Any], record: dict[str, Any]) -> None:
        left = self.seconds - (time.monotonic() - self._started)
        planned = TINY_SECONDS if self.tiny else check.seconds
        if left < LEAST_SHARE * planned:
            row |= {"status": "not reached", "reason": f"{max(0.0, left):.0f} s were left"}
            return
        row["status"] = "running"
        self._write(record)
        started = time.monotonic()
        answer, log = (self.work / f"{check.name}{suffix}" for suffix in (".json", ".log"))
        row |= self._answer(check, row, answer, log, left if self.tiny else min(left, LATE * planned))
        row["seconds"] = round(time.monotonic() - started, 1)

    def _answer(self, check: Check, row: dict[str, Any], answer: Path, log: Path, limit: float) -> dict[str, Any]:
        command = self._command(check, answer)
        row["command"] = ["python", *command]
        code = run_process([sys.executable, *command], log, limit, self._environment(check))
        try:
            result: Any = read_json(answer, Any)
        except (OSError, BadJson):
            result = None
        found: dict[str, Any] = {"figures": self._figures(check, result), "result": result}
        off = [figure["name"] for figure in found["figures"] if figure["holds"] is False or self._is_missed(figure)]
        if code is None:
            found |= {"status": "out of time", "reason": f"stopped after {limit:.0f} s"}
        elif code != 0:
            found |= {"status": "failed", "reason": f"signal {-code}" if code < 0 else f"exit status {code}"}
        elif off:
            found |= {"status": "off", "reason": f"beyond its limits, or not found: {', '.join(off)}"}
        else:
            found["status"] = "passed"
        found["last_lines"] = last_lines(log, FEW_LINES if found["status"] in ("passed", "off") else LAST_LINES)
        return found

    def _is_missed(self, figure: dict[str, Any]) -> bool:
        """Whether it has limits and was not found; with tiny sizes not all is tried."""
        limited = figure["least"] is not None or figure["most"] is not None
        return limited and figure["measured"] is None and not self.tiny

    def _figures(self, check: Check, result: Any) -> list[dict[str, Any]]:
        return [figure.of(result, tiny=self.tiny) for figure in check.figures]

    def _command(self, check: Check, answer: Path) -> list[str]:
        parts = check.tiny if self.tiny else check.command
        if isinstance(parts, str):
            raise TypeError(f"{check.name} has a reason why it is skipped, and no command")
        places = {"json": answer, "work": self.work, "out": self.out, "data": self.data}
        return [part.format(**places) for part in parts]

    def _environment(self, check: Check) -> dict[str, str]:
        """Caches on a local disk, no network, and on a CPU a core for each check."""
        own = {
            "LONGHAUL_CACHE": str(self.work / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if self.tiny or check.hides_gpus:
            own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return os.environ | own

    def _write(self, record: dict[str, Any]) -> None:
        write_json_output(self.out / f"part-{self.part}.json", record)


def run_process(command: list[str], log: Path, limit: float, environment: dict[str, str]) -> int | None:
    """The exit status of a process, None where it was stopped after `limit` seconds; all that it started ends too."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # whatever it has left running would disturb the next check
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_lines(log: Path, count: int) -> list[str]:
    """The end of what a process printed."""
    text = log.read_bytes()[-(1 << 16) :].decode("utf-8", "replace")
    lines = [one_line(line)[:500] for line in text.replace("\r", "\n").splitlines()]
    return [line for line in lines if line.strip()][-count:]
