"""Versions of the project to compare: folders, or git revisions checked out aside for as long as they are needed."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.paths import PROJECT


@contextmanager
def checked_out(given: str) -> Iterator[Path]:
    """A folder of the project, or a git revision of this one in a worktree that goes at the end. Raises UserError."""
    if (Path(given) / "train" / "pretrain.py").is_file():
        yield Path(given).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="version-") as parent:
        tree = Path(parent) / "tree"
        made = git("worktree", "add", "--quiet", "--detach", str(tree), given)
        if made.returncode != 0:
            raise UserError(f"{given} is neither a folder of the project nor a revision: {made.stderr.strip()}")
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str, folder: Path = PROJECT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8")


def described(checkout: Path) -> dict[str, Any]:
    """What a folder of the project holds: its revision (None outside of git), and whether it was changed since."""
    if not (checkout / ".git").exists():
        return {"revision": None, "changed": None}
    changed = git("status", "--porcelain", folder=checkout).stdout.strip()
    return {"revision": git("rev-parse", "HEAD", folder=checkout).stdout.strip(), "changed": bool(changed)}
