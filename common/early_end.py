"""How a command ends before its `main` runs: while it still imports what it needs.

Commands set `end_in_one_line` as their `sys.excepthook` before they import anything else of the project: it needs
nothing but the standard library.
"""

import sys
from types import TracebackType

from common.errors import INTERRUPTED_STATUS, USER_ERROR_STATUS
from common.missing_packages import advice, requirement_of


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Raises SystemExit after a line on Ctrl-C, or on a package of requirements*.txt that can't be imported; else shows
    the traceback as Python does.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED_STATUS)
    name = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    requirement = requirement_of(name)
    if requirement is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {name} is not installed for {sys.executable}: {advice(requirement)}", file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR_STATUS)
