"""Running a case in a process from a fork server that has torch loaded, and saying what is wrong with how it ended."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from tests.fuzz.cases import Case
from tests.helpers.ranks import hear_ctrl_c

PROJECT = Path(__file__).resolve().parents[2]
LOST_STATUS = 255  # multiprocessing's, now and then, where its server has not heard how a process ended
ALLOWED_STATUS = (0, 2, 130)
HANG_SECONDS = 60.0
STOP_SECONDS = 15.0  # until a case that may train for long gets its Ctrl-C
MOST_BYTES = 2 << 30
LOOK_SECONDS = 0.02
LEAVING_SECONDS = 5.0
TOKENS_OF_A_TRACEBACK = ("Traceback (most recent call last)", "Fatal Python error", "pydantic", "Segmentation fault")
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "torch", "torch.distributed", "torch._dynamo", "numpy", "tests.fuzz.judge", "train.pretrain", "train.finetune",
    "eval.generate", "eval.perplexity", "eval.import_hf", "eval.report", "eval.compare", "data_prep.text_files",
    "eval.generation.texts", "eval.perplexity_task.report", "eval.hugging_face.import_model",
]  # fmt: skip
_STARTING = threading.Lock()  # multiprocessing starts its server without one


@dataclass(frozen=True)
class Verdict:
    """How a case ended, and what is wrong with that: "" or one of traceback, hang, memory, status, leftovers."""

    case: Case
    status: int
    fault: str
    detail: str  # of the fault, or the case's last words
    seconds: float


def run_case(case: Case, folder: Path) -> Verdict:
    """Run a case in `folder`, which must not exist, and which is gone afterwards where nothing is wrong."""
    verdict = _run_once(case, folder)
    if verdict.status == LOST_STATUS:
        shutil.rmtree(folder)
        verdict = _run_once(case, folder)
    return verdict


def _run_once(case: Case, folder: Path) -> Verdict:
    files, temporary = folder / "files", folder / "tmp"
    files.mkdir(parents=True)
    temporary.mkdir()
    case.make(files)
    before = dict(_contents(files))
    started = time.monotonic()
    with _STARTING:
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        process = _CONTEXT.Process(target=_be_the_entry, args=(case.arguments, folder))
        process.start()
    trouble = _watch(process, case.stopped)
    seconds = time.monotonic() - started
    status = process.exitcode if process.exitcode is not None else -signal.SIGKILL
    left = _kill_session(process.pid)
    said = "".join((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    fault, detail = _fault(status, trouble, said, case.also)
    if not fault and (leftovers := left + _leftovers(files, temporary, before, status, case.keeps)):
        fault, detail = "leftovers", ", ".join(leftovers[:5])
    if not fault:
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(case, status, fault, detail, seconds)


def _fault(status: int, trouble: str, said: str, also: tuple[int, ...]) -> tuple[str, str]:
    tail = "\n".join(said.splitlines()[-12:])
    if trouble:
        return trouble, tail
    if any(token in said for token in TOKENS_OF_A_TRACEBACK):
        return "traceback", tail
    if status not in (*ALLOWED_STATUS, *also):
        return "status", f"{status}: {tail}"
    if status == 2 and "error: " not in said:
        return "status", f"2 without a sentence: {tail}"
    return "", tail.splitlines()[-1] if tail else ""


def _watch(process: ForkServerProcess, stopped: bool) -> str:
    """Wait for the end; "hang" or "memory" where there had to be one."""
    started, asked = time.monotonic(), False
    while process.is_alive():
        process.join(LOOK_SECONDS)
        passed = time.monotonic() - started
        if stopped and not asked and passed > STOP_SECONDS:
            asked = True
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGINT)
        trouble = "hang" if passed > HANG_SECONDS else "memory" if _bytes_of(process.pid) > MOST_BYTES else ""
        if trouble:
            process.kill()
            process.join()
            return trouble
    process.join()
    return ""


def _bytes_of(pid: int | None) -> int:
    with suppress(psutil.Error):
        memory: int = psutil.Process(pid).memory_info().rss
        return memory
    return 0


def _kill_session(session: int | None) -> list[str]:
    """End what a case has left running; return what that was."""
    family = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                family.append(process)
    left = []
    _, alive = psutil.wait_procs(family, timeout=LEAVING_SECONDS)  # some notice by a pipe that their parent has ended
    for process in alive:
        with suppress(psutil.Error):
            left.append(f"process {' '.join(process.cmdline())[-80:]}")
            process.kill()
    return left


def _leftovers(files: Path, temporary: Path, before: dict[str, str], status: int, keeps: tuple[str, ...]) -> list[str]:
    """Temporary files; after a refusal, everything that it made, changed or deleted outside the folders in `keeps`."""
    after = dict(_contents(files))
    found = [f"tmp/{name}" for name, _ in _contents(temporary)]
    found += [name for name in after if name not in before and name.endswith((".tmp", ".partial"))]
    if status == 2:
        before, after = ({k: v for k, v in c.items() if not _within(k, keeps)} for c in (before, after))
        found += [f"{name} is new" for name in after.keys() - before.keys()]
        found += [f"{name} is gone" for name in before.keys() - after.keys()]
        found += [f"{name} has changed" for name in after.keys() & before.keys() if after[name] != before[name]]
    return sorted(set(found))


def _within(name: str, folders: tuple[str, ...]) -> bool:
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


def _contents(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, what stands there) of everything below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"
        elif not path.is_file():
            what = "no file"
        elif path.stat().st_size > 1 << 26:
            what = f"{path.stat().st_size} bytes"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        yield str(path.relative_to(folder)), what


def _be_the_entry(arguments: list[str], folder: Path) -> None:
    """In the forked process: run an entry as a person would from `folder`/files."""
    import atexit
    import runpy
    import tempfile

    import torch

    os.setsid()
    torch.set_num_threads(1)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        target = name if name == os.devnull else str(folder / name)
        os.dup2(os.open(target, flags | os.O_CREAT, 0o666), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ |= {"TMPDIR": str(folder / "tmp"), "HOME": str(folder.parent / "home"), "OMP_NUM_THREADS": "1"}
    os.environ |= {"LONGHAUL_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    tempfile.tempdir = None  # what the fork server has found
    hear_ctrl_c()
    os.chdir(folder / "files")
    script = str(PROJECT / arguments[0])
    sys.argv = [script, *arguments[1:]]
    atexit._clear()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # temporary folders; `atexit._clear` has taken it away, too
