"""jsonargparse for entries that train: its complaints as one line, in words."""

import os
import re
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


class OptionParser(ArgumentParser):
    """jsonargparse, with its complaints as one line, about types in words, and configurations read as UTF-8."""

    def parse_path(self, path: str | os.PathLike[str], *more: Any, **options: Any) -> Namespace:
        """A configuration file's values. (jsonargparse uses the locale's encoding: wrong on Windows.)"""
        return self.parse_string(Path(path).read_text(encoding="utf-8"), str(path), *more, **options)

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
