"""A hook of mkdocs: links that lead out of docs/, to code and records, where the pages are a site.

With `repo_url` in mkdocs.yml they lead to the repository; without, which is how the project comes, their text stays.
"""

import re
from typing import Any

_OUT = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """mkdocs calls it for every page."""
    repository = (config.get("repo_url") or "").rstrip("/")
    return _OUT.sub(lambda found: _link(found[1], found[2], found[3], repository), markdown)


def _link(picture: str, text: str, path: str, repository: str) -> str:
    if not repository:
        return f"{text} ({path})" if picture else text
    return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{path})"
