"""What to do where a package isn't installed. Needs nothing but the standard library."""

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
INSTALLED_AS = {"yaml": "pyyaml", "lm_eval": "lm-eval[hf]"}  # where that is not the imported name


def requirement_of(module: str) -> str | None:
    """What pip installs a module by, where requirements.txt or requirements-dev.txt name it."""
    known = INSTALLED_AS.get(module, module).lower().replace("_", "-")
    for file in ("requirements.txt", "requirements-dev.txt"):
        try:
            lines = (PROJECT / file).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for line in lines:
            named = re.match(r"[\w.\[\]-]+", line)
            if named and known.split("[")[0] == named[0].split("[")[0].lower().replace("_", "-"):
                return named[0]
    return None


def advice(requirement: str) -> str:
    """What to do where a package is missing: most likely this is not the Python that has them all."""
    made = PROJECT / ".venv"
    if (made / "longhaul.json").exists() and Path(sys.prefix).resolve() != made.resolve():
        own = made / "bin" / "python"
        return f"start the command with {own if own.exists() else made / 'Scripts' / 'python.exe'}, which make has made"
    if sys.prefix == sys.base_prefix and find_spec("torch") is None:
        return "make environment makes .venv, whose .venv/bin/python has all of them (docs/install.md)"
    return install_command([requirement])


def install_command(requirements: Sequence[str]) -> str:
    """A shell command that installs packages for this Python, at the versions that Longhaul is tested with."""
    python, constraints = shlex.quote(sys.executable), shlex.quote(str(PROJECT / "constraints.txt"))
    if find_spec("pip") is not None:
        command = f"{python} -m pip install"
    elif shutil.which("uv"):
        command = f"uv pip install --python {python}"
    else:
        command = f"{python} -m ensurepip && {python} -m pip install"
    return f"{command} {' '.join(map(shlex.quote, requirements))} -c {constraints}"
