"""The command line of every entry script: help from its module's docstring, a mistake in one line."""

import argparse
import sys
from collections.abc import Collection
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


class HelpAll(argparse.Action):
    """`--help-all`: print every option, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, CommandParser)
        parser.print_all_help()
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a mistake is a UserError, one line, where argparse prints a page of usage first.

    An argument of type Path is expanded (`expand_path`). Options are written out: an abbreviation might mean another
    option's, too, once that is added.
    """

    def __init__(self, description: str | None, *, common: Collection[str] = (), **options: Any) -> None:
        """Args: common: names of the options that `--help` shows, and `--help-all` all; none: `--help` shows all."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(description=(description or "").strip(), **options)
        self.register("type", Path, expand_path)
        self.add_argument("--version", action="version", version=VERSION_LINE, help=VERSION_HELP)
        self.add_argument("--print-completion", action=PrintCompletion, metavar="NAME", help=argparse.SUPPRESS)
        self._common = {*common, "help", "help_all"} if common else None
        if common:
            self.add_argument("--help-all", action=HelpAll, nargs=0, help="show all options and exit")

    def print_help(self, file: Any = None) -> None:
        """The options of most calls, in their groups; `print_all_help` has the others."""
        if self._common is None:
            super().print_help(file)
            return
        common = [action for action in self._actions if not action.option_strings or action.dest in self._common]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, common, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([action for action in group._group_actions if action in common])
            formatter.end_section()
        count = sum(bool(action.option_strings) and action.help != argparse.SUPPRESS for action in self._actions)
        formatter.add_text(f"--help-all shows all {count} options.")
        self._print_message(formatter.format_help(), file or sys.stdout)

    def print_all_help(self) -> None:
        super().print_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
