"""docs/one-step.md names what there is: its links lead to files that define the quoted names, its code stands there."""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.training import PROJECT

PAGE = PROJECT / "docs" / "one-step.md"
LINKS = re.findall(r"\[`([\w.]+)`\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
QUOTES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def defined_in(path: Path) -> set[str]:
    """Functions, classes, methods and fields of a module, as `Class.name` or `name`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    names.add(f"{node.name}.{item.name}")
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    names.add(f"{node.name}.{item.target.id}")
    return names


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_a_linked_name_is_defined_where_the_link_leads(name: str, link: str) -> None:
    assert name in defined_in((PAGE.parent / link).resolve())


def test_the_quoted_lines_stand_in_the_step() -> None:
    step = [line.strip() for line in (PROJECT / "train/optimization/step.py").read_text(encoding="utf-8").splitlines()]
    assert len(LINKS) > 12
    assert len(QUOTES) == 2
    assert [line for quote in QUOTES for line in quote.splitlines() if line.strip() not in step] == []
