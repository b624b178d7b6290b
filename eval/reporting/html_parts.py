"""HTML by the templates of templates/*.html.

Whatever a template is given is escaped, control characters as well, but for what comes from another template.
"""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.plain_text import shown
from common.progress import format_duration

TEMPLATES = Path(__file__).with_name("templates")
LONGEST_WORD = 14  # characters that a column of a table always has room for


@cache
def templates() -> Environment:
    """All templates, each read once by a process."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"grouped": "{:,}".format, "duration": format_duration}
    found.tests["unbroken"] = _is_unbroken
    return found


def _is_unbroken(value: object) -> bool:
    """Whether a value has a word too long for a narrow column."""
    return max(map(len, str(value).split()), default=0) > LONGEST_WORD


def _visible(value: object) -> Markup | str:
    """What a template shows of a value, before it is escaped."""
    return value if isinstance(value, Markup) else shown(str(value))


def fill(template: str, **values: Any) -> Markup:
    """A template of this name with these values."""
    return Markup(templates().get_template(template).render(values))


def _part(name: str, *values: object) -> Markup:
    """A macro of parts.html with these values."""
    return Markup(getattr(templates().get_template("parts.html").module, name)(*values))


def text(value: object) -> Markup:
    """Any value as text that can't be taken for markup, and turns no text around it."""
    return escape(_visible(value))


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    marked: Collection[int] = (),
) -> Markup:
    """A table; on a narrow screen a card for each row of one with many columns.

    Args:
        numbers: columns set at the right. marked: rows of this project among others'.
    """
    return _part("table", headings, rows, numbers, marked)


def folded(summary: str, body: Markup) -> Markup:
    """Something to unfold."""
    return _part("folded", summary, body)


def code(content: str) -> Markup:
    """Preformatted text."""
    return _part("code", content)


def paragraph(content: str) -> Markup:
    return _part("paragraph", content)


def note(*sentences: str) -> Markup:
    """A paragraph in a softer colour; nothing where there are no sentences."""
    said = [sentence for sentence in sentences if sentence]
    return _part("note", said) if said else Markup()


def warning(sentence: str) -> Markup:
    """A sentence that stands out."""
    return _part("warning", sentence)
