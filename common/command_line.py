"""The command line of every entry script: help from its module's docstring, a mistake in one line."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError
from common.paths import expand_path
from common.version import VERSION_LINE

VERSION_HELP = "print Longhaul's version and exit"


class PrintCompletion(argparse.Action):
    """`--print-completion NAME`: print how a shell completes this command, and exit. For setup/completion.py.

    NAME is what the shell's functions are called by. An option `--config` also takes the names of configurations.
    """

    def __call__(self, parser: argparse.ArgumentParser, _: Any, name: Any, __: Any = None) -> None:
        import shtab

        for action in parser._actions:
            if action.dest == "config":
                action.complete = {"bash": "_longhaul_configs"}  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell="bash", root_prefix=name))
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a mistake is a UserError, one line, where argparse prints a page of usage first.

    An argument of type Path is expanded (`expand_path`). Options are written out: an abbreviation might mean another
    option's, too, once that is added.
    """

    def __init__(self, description: str | None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(description=(description or "").strip(), **options)
        self.register("type", Path, expand_path)
        self.add_argument("--version", action="version", version=VERSION_LINE, help=VERSION_HELP)
        self.add_argument("--print-completion", action=PrintCompletion, metavar="NAME", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
