"""Tables of HTML pages, without how they look."""

import re


def plain_cells(page: str) -> str:
    """A page whose cells have no attributes."""
    return re.sub(r"<td [^>]*>", "<td>", page)
