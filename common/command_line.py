"""The command line of every entry script: help as its module says it, a mistake in one line."""

import argparse
from typing import Any, NoReturn

from common.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a mistake is a UserError, one line, where argparse prints a page of usage first."""

    def __init__(self, description: str | None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=(description or "").strip(), **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
