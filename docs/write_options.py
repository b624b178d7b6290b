"""Write docs/options.md, the reference of all options of train/pretrain.py.

python docs/write_options.py          # after an option was added or changed
python docs/write_options.py --check  # exit status 1 where the file is out of date
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.paths import PROJECT
from train.finetune import finetune_command
from train.settings.command_line import build_parser, field_names
from train.settings.sections import FinetuneConfig

REFERENCE = PROJECT / "docs" / "options.md"
HEAD = """# Options of `train/pretrain.py`

Written by `python docs/write_options.py` from the program itself. Every option can be in a YAML file
(`optim: {lr: 3e-4}`) or on the command line (`--optim.lr 3e-4`); the command line wins over the file, the file over
`model.preset`, the preset over the defaults. `--print_config` shows the result.
"""


FINETUNE_HEAD = """# Options of `train/finetune.py`

All of the above (of `model` only `dropout` and `block_size`: the model is the base's), a default file of its own
(`train/configs/finetune.yaml`), and:
"""


def reference() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD, *_sections(build_parser())]
    own = {name.split(".")[0] for name in field_names(FinetuneConfig)} - {name.split(".")[0] for name in field_names()}
    parts.append(FINETUNE_HEAD)
    parts += [part for part in _sections(build_parser(finetune_command(""))) if part.split("`")[1] in own]
    return "\n".join(parts)


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table per group of options."""
    for group in parser._action_groups:
        rows = [row for action in group._group_actions if (row := _row(action))]
        if rows:
            section = next((name.split(".")[0].strip("| `-") for name in rows if "." in name.split("`")[1]), None)
            title = f"`{section}`: {str(group.title).rstrip(':.')}" if section else "Beside the configuration"
            yield f"## {title}\n\n| option | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(action: argparse.Action) -> str | None:
    """One option; None for what only jsonargparse knows (a section as a whole)."""
    name = next((option for option in action.option_strings if option.startswith("--")), None)
    if name is None or (action.metavar == "CONFIG" and name != "--config"):
        return None
    default = "" if action.default in (None, argparse.SUPPRESS) else f"`{action.default}`"
    words = " ".join((action.help or "").replace("|", "\\|").split())
    return f"| `{name}` | {default} | {words} |"


def main() -> int:
    parser = CommandParser("Write docs/options.md from the options that train/pretrain.py takes.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the page is out of date")
    arguments = parser.parse_args()
    text = reference()
    if arguments.check:
        same = REFERENCE.exists() and REFERENCE.read_text(encoding="utf-8") == text
        print(f"{REFERENCE} is {'up to date' if same else 'out of date: python docs/write_options.py'}")
        return 0 if same else 1
    REFERENCE.write_text(text, encoding="utf-8")
    print(f"wrote {REFERENCE}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
