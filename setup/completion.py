"""Print what makes bash complete the options of Longhaul's scripts, and the names of configurations after --config.

    .venv/bin/python setup/completion.py > .venv/completion.bash
    source .venv/completion.bash        # in every new shell, from ~/.bashrc

It completes after `python SCRIPT`, whatever Python's path is, and after `train/launch.py … train/pretrain.py`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.host_limits import allowed_cores
from common.paths import PROJECT

FOLDERS = ("data_prep", "eval", "train", "slurm")
DISPATCH = """
_longhaul_configs() {{
    compgen -W "{names}" -- "$1"
    compgen -f -- "$1"
}}
_longhaul_python() {{ # complete the last script that is named so far
    local index script=
    for ((index = COMP_CWORD - 1; index > 0; index--)); do
        case ${{COMP_WORDS[index]}} in *.py) script=${{COMP_WORDS[index]}} && break ;; esac
    done
    case $script in
{cases}
        *) COMPREPLY=() && return ;;
    esac
    COMP_WORDS=("${{COMP_WORDS[@]:index}}")
    COMP_CWORD=$((COMP_CWORD - index))
    "$script"
}}
complete -o default -o bashdefault -F _longhaul_python python python3
"""


def main() -> int:
    CommandParser(__doc__).parse_args()
    print(completion(list(commands())), end="")
    return 0


def completion(scripts: list[str]) -> str:
    """The shell code for these scripts. Raises UserError where one does not answer."""
    with ThreadPoolExecutor(allowed_cores()) as pool:
        parts = list(pool.map(completion_of, scripts))
    names = " ".join(sorted(path.stem for path in (PROJECT / "train" / "configs").rglob("*.yaml")))
    cases = "\n".join(f"        *{script}) script=_shtab_{prefix_of(script)} ;;" for script in scripts)
    return "\n".join(parts) + DISPATCH.format(names=names, cases=cases)


def commands() -> Iterator[str]:
    """The scripts that take options of their own, by their paths in the project."""
    for folder in FOLDERS:
        for path in sorted((PROJECT / folder).glob("*.py")):
            if "__main__" in (text := path.read_text(encoding="utf-8")) and re.search("CommandParser|read_co", text):
                yield path.relative_to(PROJECT).as_posix()


def prefix_of(script: str) -> str:
    return "longhaul_" + re.sub(r"\W", "_", script.removesuffix(".py"))


def completion_of(script: str) -> str:
    """What shtab makes of a script's options, less what binds it to a command of that name. Raises UserError."""
    command = [sys.executable, str(PROJECT / script), f"--print-completion={prefix_of(script)}"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"{script} could not say what it takes ({said[-1]}): run make environment first")
    return "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith(("complete ", "#")))


if __name__ == "__main__":
    exit_on_user_error(main)
