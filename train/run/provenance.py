"""Where a run came from: command, Longhaul's version and revision, versions of packages, machines.

Named facts only, never the environment; credentials in the command or in uncommitted changes are masked.
"""

import os
import platform
import shlex
import stat
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from common import run_files
from common.credentials import mask_credentials
from common.errors import UserError
from common.paths import PROJECT
from common.publish import write_json_whole
from common.version import VERSION

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "jsonargparse", "wandb", "triton")
MAX_DIFF_CHARACTERS = 200_000
# a patch for `git apply`, whatever a user's configuration does to `git diff`
PLAIN_PATCH = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")


def record_start(
    path: Path, machines: list[dict[str, Any]], cuda: str | None, facts: dict[str, Any], *, with_diff: bool = True
) -> None:
    """Add this start to `provenance.json`, which lists all starts of a run.

    The file is readable for those who may read the sources that it quotes, as far as the umask allows.

    Args:
        cuda: the version that torch was built for.
        with_diff: keep the uncommitted changes of the sources, as a patch.
    """
    # a user may have made it stricter
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666
    try:
        starts = run_files.read_starts(path)
    except UserError as error:
        kept = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.kept")
        os.replace(path, kept)
        print(f"WARNING: {error}: kept as {kept.name}", file=sys.stderr, flush=True)
        starts = []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": mask_credentials(shlex.join([sys.executable, *sys.argv])),
            "version": VERSION,
            **_source(with_diff),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": _versions(),
            "cuda": cuda,
            "ranks": machines,
            **facts,
        }
    )
    write_json_whole(path, {"starts": starts}, mode=mode & _readers_of_the_sources() | 0o600)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that `provenance.json` lists, oldest first; none where it can't be read."""
    try:
        return run_files.read_starts(path)
    except UserError:
        return []


def _source(with_diff: bool) -> dict[str, Any]:
    """The git revision and what differs from it, or nulls outside a checkout; `diff_lacks` lists what is not in it."""
    revision = _git("rev-parse", "HEAD")
    if revision is None or not with_diff:
        return {"revision": revision and revision.strip(), "diff": None}
    diff = _git("diff", "HEAD", *PLAIN_PATCH) or ""
    masked = mask_credentials(diff)
    lacks = ["credentials"] if masked != diff else []
    if untracked := (_git("ls-files", "--others", "--exclude-standard") or "").count("\n"):
        lacks.append(f"{untracked} untracked file{'' if untracked == 1 else 's'}")
    if len(masked) > MAX_DIFF_CHARACTERS:
        lacks.append(f"what follows its first {MAX_DIFF_CHARACTERS:,} characters")
        masked = masked[:MAX_DIFF_CHARACTERS]
    return {"revision": revision.strip(), "diff": masked, **({"diff_lacks": lacks} if lacks else {})}


def _readers_of_the_sources() -> int:
    """Permission bits of a file that no one may read who may not read the project's folder and what has changed in it.

    0666 less those of the group or of others.
    """
    names = (_git("diff", "HEAD", "--name-only", "-z") or "").split("\0")
    mode = 0o666
    for path in {PROJECT, *(PROJECT / name for name in names if name)}:
        try:
            found = path.stat().st_mode
        except OSError:  # deleted
            continue
        for reads, access in ((stat.S_IRGRP, 0o060), (stat.S_IROTH, 0o006)):
            if not found & reads:
                mode &= ~access
    return mode


def _git(*arguments: str) -> str | None:
    """Git's output, unchanged; None where it fails."""
    try:
        done = subprocess.run(  # a file that differs may be in any encoding
            ["git", *arguments], cwd=PROJECT, capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
