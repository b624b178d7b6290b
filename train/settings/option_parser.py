"""jsonargparse for entries that train: its complaints as one line, in words."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

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


COMMON = (
    "config", "model.preset", "data.path", "objective.kind", "run.name", "run.max_steps", "optim.lr",
    "batch.tokens_per_step", "batch.micro_batch", "eval.every_steps", "eval.tokens", "checkpoint.every_steps",
    "log.wandb", "log.tensorboard", "lora.rank", "run.device", "run.dtype", "run.compile", "run.seed", "run.root",
    "resume", "print_config", "version", "help", "help_all",
)  # fmt: skip
OF_FINE_TUNING = "objective.kind"  # pre-training has it, too, where few set it


class HelpAll(argparse.Action):
    """`--help-all`: print every option, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, OptionParser)
        parser.print_all_help()
        parser.exit()


class OptionParser(ArgumentParser):
    """jsonargparse, with its complaints as one line, about types in words, and configurations read as UTF-8."""

    def parse_path(self, path: str | os.PathLike[str], *more: Any, **options: Any) -> Namespace:
        """A configuration file's values. (jsonargparse uses the locale's encoding: wrong on Windows.)"""
        return self.parse_string(Path(path).read_text(encoding="utf-8"), str(path), *more, **options)

    def print_help(self, file: Any = None) -> None:
        """The options that are set in most runs; `print_all_help` has the others."""
        common = set(COMMON)
        if not any(action.dest == "lora.rank" for action in self._actions):
            common.remove(OF_FINE_TUNING)
        shown = [action for action in self._actions if action.dest in common]
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s --config NAME_OR_FILE [--SECTION.KEY VALUE …]", self._actions, [])
        formatter.add_text(self.description)
        formatter.start_section("common options")
        formatter.add_arguments(sorted(shown, key=lambda action: COMMON.index(action.dest)))
        formatter.end_section()
        formatter.add_text(f"--help-all shows all {len(self._actions)} options, docs/options.md has them, too.")
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
