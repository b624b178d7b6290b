"""An entry of the project on terminals of its own, in a process from the fork server: what each terminal receives."""

import fcntl
import multiprocessing
import os
import pty
import select
import struct
import sys
import termios
import time
import tty
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks import _CONTEXT, _PRELOADED, hear_ctrl_c

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120.0
ROWS, COLUMNS = 50, 200


@dataclass(frozen=True)
class Shown:
    """What a terminal for standard output and one for standard error have received, and how the entry ended."""

    status: int
    out: bytes
    error: bytes


def run_on_terminal(arguments: list[str], folder: Path, *, out_file: Path | None = None) -> Shown:
    """`python ARGUMENTS` from `folder`, as a person would type it. The terminals take lines' ends as they are written.

    Args:
        out_file: where standard output goes instead of to its terminal.

    Raises TimeoutError where it does not end.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    terminals = [pty.openpty(), pty.openpty()]
    for _, inner in terminals:
        tty.setraw(inner)  # no "\r" of the kernel's own
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    names = [os.ttyname(inner) for _, inner in terminals]
    names[0] = names[0] if out_file is None else str(out_file)
    process = _CONTEXT.Process(target=_without_input, args=(arguments, folder, names))
    process.start()
    received = {outer: b"" for outer, _ in terminals}
    try:
        _read_until_the_end(process, received)
    finally:
        for descriptors in terminals:
            for descriptor in descriptors:
                os.close(descriptor)
    assert process.exitcode is not None
    return Shown(process.exitcode, *received.values())


def _read_until_the_end(process: multiprocessing.process.BaseProcess, received: dict[int, bytes]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    ended = False
    while True:
        ready, _, _ = select.select([*received, *([] if ended else [process.sentinel])], [], [], 0 if ended else 1.0)
        if process.sentinel in ready:
            process.join()
            ended = True
        for outer in received.keys() & set(ready):
            received[outer] += os.read(outer, 1 << 16)
        if ended and not ready:
            return
        if time.monotonic() > until:
            process.kill()
            process.join()
            raise TimeoutError(f"still running: {received}")


def _without_input(arguments: list[str], folder: Path, terminals: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    be_the_entry(arguments, folder, terminals)


def be_the_entry(arguments: list[str], folder: Path, terminals: list[str]) -> None:
    """Be `python ARGUMENTS` in this process. Args: terminals: of standard output and error; input is there already."""
    import runpy

    import torch

    hear_ctrl_c()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HOME": str(folder), "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"LONGHAUL_CACHE": str(folder / "cache"), "WANDB_MODE": "offline"}
    for number, name in enumerate(terminals, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    script = str(PROJECT / arguments[0])
    sys.argv = [script, *arguments[1:]]
    runpy.run_path(script, run_name="__main__")
