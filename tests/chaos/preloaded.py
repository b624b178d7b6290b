"""Starting a trainer by fork from a process that has imported everything, instead of by exec and import.

Importing PyTorch three times takes most of the time of a short start. Here launcher and ranks are forks: of the
harness, and of the launcher before it has threads. Everything else is as after an exec: the same code of torchrun's
agent and of the trainer, the same tree of processes, sessions and signals, an environment and arguments of their own.
What is not the same: the end of the interpreter (as in multiprocessing's forks) and the command lines that ps shows.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.chaos.marks import OwnMark
from tests.chaos.phases import MARK_VARIABLE

SUBPROCESS_HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
AGENT = "torchrun_agent.py"
SPARE_RANKS = 4
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGCHLD)
_spares: list["Spare"] = []


def preload() -> None:
    """Import what a start imports. No thread may run afterwards: it would be missing in the forks."""
    import torch._dynamo
    import torch.distributed.run

    import train.finetune
    import train.pretrain

    assert train.finetune is not None and train.pretrain is not None and torch._dynamo is not None
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is running: a fork would lose it"
    original = subprocess.Popen
    for module in (subprocess, importlib.import_module(SUBPROCESS_HANDLER)):
        assert module.__dict__["Popen"] is original
        setattr(module, "Popen", PreloadedPopen)  # noqa: B010 (what torchrun starts its workers with)


def start(arguments: Sequence[str], environment: dict[str, str], output: Path, own_mark: OwnMark) -> int:
    """`python arguments…` in a fork of this process; return its process id."""
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.closerange(3, 1024)  # the harness's own
        os.setsid()
        own_mark.write(environment[MARK_VARIABLE])
        run_python(arguments, environment)
    return pid


def ignored_signals() -> list[int]:
    return [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]


def run_python(arguments: Sequence[str], environment: dict[str, str], ignored: Sequence[int] = ()) -> NoReturn:
    """Be `python [-u] script arguments…` from here on."""
    status = 1
    try:
        for number in SIGNALS:  # what is ignored stays so, as over an exec
            if number in ignored:
                signal.signal(number, signal.SIG_IGN)
            else:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        arguments = [argument for argument in arguments if argument != "-u"]
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if arguments[0].endswith(AGENT):
            while len(_spares) < SPARE_RANKS:
                _spares.append(Spare())
        sys.argv = list(arguments)
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        for spare in _spares:
            spare.close()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Spare:
    """A child forked while its parent had one thread, waiting to be told what to run."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self.pid = os.fork()
        if self.pid == 0:
            for elder in _spares:
                elder.close()
            ours.close()
            orders = theirs.makefile("rb").readline()
            if not orders:
                os._exit(0)  # the parent is gone or had no use for it
            theirs.close()
            _spares.clear()
            arguments, environment, new_session, ignored = json.loads(orders)
            if new_session:
                os.setsid()
            run_python(arguments, environment, ignored)
        theirs.close()

    def run(self, arguments: Sequence[str], environment: dict[str, str], *, new_session: bool) -> None:
        orders = [list(arguments), environment, new_session, ignored_signals()]
        self._socket.sendall(json.dumps(orders).encode() + b"\n")
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


class PreloadedPopen(subprocess.Popen[Any]):
    """`subprocess.Popen` that forks where it is asked to start this Python, and does what it always does otherwise."""

    def __init__(self, args: Any, **options: Any) -> None:
        forkable = not isinstance(args, str) and str(args[0]) == sys.executable and "-c" not in args
        if not forkable:
            super().__init__(args, **options)
            return
        environment = dict(options.pop("env", None) or os.environ)
        new_session = options.pop("start_new_session", False)
        process_group = options.pop("process_group", None)
        for stream in ("stdin", "stdout", "stderr"):
            assert options.pop(stream, None) in (None, subprocess.DEVNULL), f"{stream} of a forked start"
        assert not options, f"a forked start knows no {sorted(options)}"
        self.args = args
        self.stdin = self.stdout = self.stderr = None
        self.returncode = None
        self.encoding = self.errors = self.text_mode = None
        self._waitpid_lock = threading.Lock()
        self._input = None
        self._communication_started = False
        self._sigint_wait_secs = 0.25
        self._child_created = True
        command = [str(argument) for argument in args[1:]]
        if _spares:
            spare = _spares.pop()
            self.pid = spare.pid
            spare.run(command, environment, new_session=new_session)
            return
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
        self.pid = os.fork()
        if self.pid == 0:
            if new_session:
                os.setsid()
            elif process_group is not None:
                os.setpgid(0, process_group)
            run_python(command, environment, ignored_signals())
