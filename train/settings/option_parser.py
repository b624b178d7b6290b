"""jsonargparse for entries that train: its complaints as one line, in words."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from common.errors import UserError

_IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": 'a list such as ["a", "b"]',
    "dict": 'a mapping such as {"name": "value"}',
    "NoneType": "null",
}


COMMON = {  # what `--help` shows: titles, and the options under them
    "the run": ("config", "run.name", "run.max_steps", "run.seed", "run.root", "resume"),
    "the model and what it learns from": ("model.preset", "data.path", "objective.kind", "lora.rank"),
    "optimization": ("optim.lr", "batch.tokens_per_step", "batch.micro_batch"),
    "validating, saving, recording": (
        "eval.every_steps", "eval.tokens", "checkpoint.every_steps", "log.wandb", "log.tensorboard",
    ),
    "the machine": ("run.device", "run.dtype", "run.compile"),
    "about this command": ("print_config", "version", "help", "help_all"),
}  # fmt: skip
OF_FINE_TUNING = "objective.kind"  # pre-training has it, too, where few set it


class HelpAll(argparse.Action):
    """`--help-all`: print every option, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, OptionParser)
        parser.print_all_help()
        parser.exit()


class ShortHelp(DefaultHelpFormatter):
    """Of each option the first sentence and the default: `--help-all` and docs/options.md have types and the rest."""

    def _get_help_string(self, action: argparse.Action) -> str:
        sentence = (action.help or "").split(". ")[0].removesuffix(".")
        shows_default = action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        return sentence + (" (default: %(default)s)" if shows_default and "default" not in sentence else "")


class OptionParser(ArgumentParser):
    """jsonargparse, with its complaints as one line, about types in words, and configurations read as UTF-8."""

    def parse_path(self, path: str | os.PathLike[str], *more: Any, **options: Any) -> Namespace:
        """A configuration file's values. (jsonargparse uses the locale's encoding: wrong on Windows.)"""
        return self.parse_string(Path(path).read_text(encoding="utf-8"), str(path), *more, **options)

    def print_help(self, file: Any = None) -> None:
        """The options that are set in most runs, in groups; `print_all_help` has the others."""
        actions = {action.dest: action for action in self._actions}
        if "lora.rank" not in actions:
            del actions[OF_FINE_TUNING]
        formatter = ShortHelp(self.prog)
        formatter.add_usage("%(prog)s --config NAME_OR_FILE [--SECTION.KEY VALUE …]", self._actions, [])
        formatter.add_text(self.description)
        for title, names in COMMON.items():
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
        count = sum(bool(action.option_strings) and action.help != argparse.SUPPRESS for action in self._actions)
        formatter.add_text(f"--help-all shows all {count} options, docs/options.md has them, too.")
        print(formatter.format_help(), end="", file=file or sys.stdout)

    def print_all_help(self) -> None:
        super().print_help()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{_about_a_type(message) or message} (see --help)")


def _about_a_type(message: str) -> str | None:
    """jsonargparse's complaint about a value of the wrong type in our words; None for any other complaint."""
    found = re.search(r'Parser key "([\w.]+)".*(?:Got value|Given value): (.*)', message, re.DOTALL)
    expected = re.findall(r"Expected a (?:<class '(\w+)'>|typing.Literal\[(.*?)\])", message)
    if not found or not expected:
        return None
    choices = [
        _IN_WORDS.get(kind, kind) or literals.replace("'", "").replace(", ", " or ") for kind, literals in expected
    ]
    return f"{found[1]} is {found[2].strip()}: use {' or '.join(choices)}"
