"""Errors for people: a user's mistake is one line that says what to do, without a traceback."""

import os
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from common.plain_text import accept_any_text

USER_ERROR_STATUS = 2
LAUNCHED = ("TORCHELASTIC_RUN_ID", "SLURM_LOCALID")  # a rank of torchrun or srun; else LOCAL_RANK may be a leftover
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count


class UserError(Exception):
    """Something the user can put right. The message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def exit_on_user_error(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry script's `main` and leave with its exit status.

    A `UserError` becomes one line on standard error and exit status 2, Ctrl-C exit status 130. Under a launcher every
    rank of a machine meets the same mistake in the same way, so only the machine's first says it. No text that is
    printed can end the script, whatever the terminal can show.
    """
    accept_any_text()
    try:
        status = main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or not any(name in os.environ for name in LAUNCHED):
            where = "" if os.environ.get("RANK", "0") == "0" else f" (on {socket.gethostname()})"
            print(f"error: {error}{where}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_STATUS)
    except BrokenPipeError:  # the reader (head, less) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status or 0)
