"""A command of the project run to its end in a process from the fork server: torch is there without being imported."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks import _CONTEXT, _PRELOADED
from tests.helpers.terminal import be_the_entry

PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """What a command has printed, and how it ended."""

    status: int | None
    out: str
    error: str


def run_command(
    arguments: Sequence[object], folder: Path, *, given: str = "", environment: Mapping[str, str] | None = None
) -> Ended:
    """`python ARGUMENTS` from `folder`, off a terminal.

    Args:
        arguments: a script, by its path in the project, and its options.
        given: standard input.
        environment: beside that of the tests.

    Raises TimeoutError where it does not end.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as own:
        files = [Path(own) / name for name in ("in", "out", "error")]
        files[0].write_text(given, encoding="utf-8")
        process = _CONTEXT.Process(
            target=_off_a_terminal, args=([*map(str, arguments)], folder, [*map(str, files)], dict(environment or {}))
        )
        process.start()
        process.join(PATIENCE_SECONDS)
        out, error = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files[1:])
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"still running: {arguments}\n{out}\n{error}")
        return Ended(process.exitcode, out, error)


def _off_a_terminal(arguments: list[str], folder: Path, files: list[str], environment: dict[str, str]) -> None:
    os.dup2(os.open(files[0], os.O_RDONLY), 0)
    os.environ |= environment
    be_the_entry(arguments, folder, files[1:])
