"""Run `uv pip install` instead of pip where uv is there: the same packages and hashes in a fraction of the time.

uv reads neither pip's configuration files nor its PIP_* variables: what decides where packages come from is handed
over.
"""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

from common.errors import UserError
from setup.pip_install import follow
from setup.why_not_installed import OF_UV, reason

NOT_UVS = ("--use-pep517",)  # what uv does anyway
# pip's settings, as uv's variables
SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
WITH_COMMAS = ("UV_FIND_LINKS",)
SECTIONS = ("global", "install", ":env:")  # of pip's configuration, the later ones count


def find_uv(name: str) -> str | None:
    """The program, where it is there and starts. Args: name: or path; "" refuses uv."""
    found = shutil.which(name) if name else None
    if found is None:
        return None
    try:
        done = subprocess.run([found, "--version"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found if done.returncode == 0 else None


def uv_install(uv: str, python: Path, arguments: list[str], *, log: Path, what: str, lock: int | None) -> None:
    """`uv pip install` with pip's `arguments` in the environment of `python`; as `pip_install`.

    Raises UserError with uv's own reason.
    """
    command = [uv, "pip", "install", "--python", str(python), *(word for word in arguments if word not in NOT_UVS)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment_for_uv(dict(os.environ), pip_configuration(python)),
        pass_fds=() if lock is None else (lock,),
    ) as process:
        said = follow(process, log, what, "uv")
    if process.returncode:
        raise UserError(f"uv could not install the {what}: {reason(said, OF_UV)} (all of it: {log}; UV= takes pip)")


def pip_configuration(python: Path) -> dict[str, str]:
    """pip's settings by name, from its files and variables."""
    done = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    return read_configuration(done.stdout)


def read_configuration(listed: str) -> dict[str, str]:
    """What `pip config list` prints: lines such as `global.index-url='…'`, `:env:.find-links='…'`."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        match = re.match(r"(global|install|:env:)\.([\w-]+)=(.*)", line)
        if match:
            found[match[1]][match[2]] = str(ast.literal_eval(match[3]))
    return {name: value for section in SECTIONS for name, value in found[section].items()}


def environment_for_uv(environment: dict[str, str], pip: dict[str, str]) -> dict[str, str]:
    """An environment with pip's settings as uv's variables; those that are set already stay."""
    for name, variable in SETTINGS.items():
        value = pip.get(name, "")
        if not value or (name == "no-index" and value.lower() in ("0", "false", "no", "off")):
            continue
        joined = ("," if variable in WITH_COMMAS else " ").join(value.split())
        environment.setdefault(variable, "1" if name == "no-index" else joined)
    # as pip: the best version of all places, not the first place that has any
    environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environment
