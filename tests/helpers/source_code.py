"""The product's Python files as syntax trees, for tests that look through all of them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "data_prep", "docs", "eval", "model", "setup", "slurm", "train")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def product_code() -> Iterator[tuple[Path, ast.Module]]:
    """(path in the project, tree) of every file; `records`, which stand above all rooms, among them."""
    for room in ROOMS:
        for path in sorted((PROJECT / room).rglob("*.py")):
            yield path.relative_to(PROJECT), _parsed(path)
    yield Path("longhaul.py"), _parsed(PROJECT / "longhaul.py")
