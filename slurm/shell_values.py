"""Named values for a shell: each on a line of its own, which no banner of a wrapper or container can look like."""

from collections.abc import Mapping

from common.errors import UserError
from common.plain_text import print_exactly

MARKER = "longhaul:"  # job.sh and node.sh look for it


def print_values(values: Mapping[str, object]) -> None:
    """Print `longhaul:NAME=VALUE` lines; the shell takes them as they are and evaluates nothing.

    Raises UserError where a value has a line break, before anything is printed.
    """
    for name, value in values.items():
        if "\n" in str(value):
            raise UserError(
                f"{name} is {str(value)!r}and has a line break, which jobs can't handle: choose another name"
            )
    print()  # ends a line that a wrapper may have left unfinished
    for name, value in values.items():
        print_exactly(f"{MARKER}{name}={value}")
