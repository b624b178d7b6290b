"""Errors for people: a user's mistake is one line that says what to do, without a traceback."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from common.memory_errors import is_out_of_memory, what_was_asked
from common.os_errors import is_of_surroundings, refusal
from common.plain_text import accept_any_text

USER_ERROR_STATUS = 2
TORCHRUN = "TORCHELASTIC_RUN_ID"
LAUNCHED = (TORCHRUN, "SLURM_LOCALID")  # a rank of torchrun or srun; else LOCAL_RANK may be a leftover
LESS_WORK = "end other programs, give it less at once, or take a machine with more memory (docs/training.md)"
FIRST_RANK_SECONDS = 10.0  # how much later the first rank of a machine may meet a mistake than the others do
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count


class UserError(Exception):
    """Something the user can fix. The message is one line: what is wrong, then what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class OfThisProcess(UserError):
    """An error that may happen on one rank only, so each rank reports its own."""


class OutOfMemory(OfThisProcess):
    """What was asked for doesn't fit into the memory."""

    def __init__(self, error: BaseException, advice: str) -> None:
        asked = what_was_asked(error)
        super().__init__(f"out of memory{f' ({asked})' if asked else ''}: {advice}")


@contextmanager
def advising_on_memory(advice: str) -> Iterator[None]:
    """Raises OutOfMemory, with what to do, where memory runs out inside. Also a decorator, of a script's `main`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(error, advice) from None


@contextmanager
def _naming_files() -> Iterator[None]:
    """Raises OfThisProcess for an error of the file system that no code has reported in its own words."""
    try:
        yield
    except OSError as error:
        if not is_of_surroundings(error):
            raise
        raise OfThisProcess(refusal("used", error)) from None


def exit_on_user_error(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry script's `main` and leave with its exit status.

    A `UserError` becomes one line on standard error and exit status 2, Ctrl-C exit status 130. Under a launcher every
    rank of a machine meets the same mistake in the same way, so only the machine's first prints it; the others wait for
    that. Errors of memory, and those of the file system that only people can mend (a full disk, no permission), are one
    line as well, wherever they come from. No text that is printed can end the script, whatever the terminal can show.
    """
    accept_any_text()
    try:
        with advising_on_memory(LESS_WORK), _naming_files():
            status = main()
    except UserError as error:
        launched = any(name in os.environ for name in LAUNCHED)
        if os.environ.get("LOCAL_RANK", "0") != "0" and launched and not isinstance(error, OfThisProcess):
            _leave_it_to_the_first_rank()
            if TORCHRUN not in os.environ:  # srun may leave the other ranks
                sys.exit(USER_ERROR_STATUS)
        where = "" if os.environ.get("RANK", "0") == "0" else f" (on {socket.gethostname()})"
        print(f"error: {error}{where}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_STATUS)
    except BrokenPipeError:  # the reader (head, less) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status or 0)


def _leave_it_to_the_first_rank() -> None:
    """Wait to be ended by the launcher, which ends all ranks when one has ended: the first one is to print before that.

    It returns where nothing has ended it for so long: with torchrun the first rank has not met the mistake then.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(FIRST_RANK_SECONDS)
