"""Pieces of HTML. Everything that comes out of a run's folder is escaped here."""

import html
from collections.abc import Collection, Sequence

from common.plain_text import shown


def text(value: object) -> str:
    """Any value as text that can't be taken for markup, and turns no text around it."""
    return html.escape(shown(str(value)))


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    marked: Collection[int] = (),
) -> str:
    """A table that scrolls sideways on a narrow screen.

    Args:
        numbers: columns set at the right. marked: rows of this project among others'.
    """

    def cell(tag: str, column: int, content: str) -> str:
        kind = "number" if column in numbers else "any"
        return f'<{tag} class="{kind}">{text(content)}</{tag}>'

    head = "".join(cell("th", column, heading) for column, heading in enumerate(headings))
    lines = [
        ('<tr class="ours">' if index in marked else "<tr>")
        + "".join(cell("td", column, content) for column, content in enumerate(row))
        + "</tr>"
        for index, row in enumerate(rows)
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{"".join(lines)}</tbody></table></div>\n'


def folded(summary: str, body: str) -> str:
    """Something to unfold."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>\n"


def code(content: str, kind: str = "") -> str:
    """Preformatted text; `kind` text is wrapped."""
    return f'<pre class="{kind}">{text(content)}</pre>\n'
