"""The configuration of a run: sections composed, read from YAML and the command line, and written back.

Precedence, lowest first: defaults, `model.preset`, the YAML file, the command line.
"""

import argparse
import difflib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from jsonargparse import ArgumentParser

from common.command_line import VERSION_HELP, PrintCompletion
from common.errors import UserError
from common.paths import PROJECT, expand_path
from common.run_folder import RunFolder
from common.version import VERSION_LINE
from model.config import PRESETS, ModelConfig
from train.settings.config_file import read_file, take_texts, to_text
from train.settings.option_parser import HelpAll, OptionParser
from train.settings.sections import Config, ObjectiveConfig, RunConfig

DEFAULT_CONFIG = PROJECT / "train" / "configs" / "gpt2-124m.yaml"
CONFIGS = DEFAULT_CONFIG.parent
QUESTIONS = {
    "--help",
    "--help-all",
    "-h",
    "--version",
    "--print-completion",
}  # options about the command itself: it answers them and exits


Kind = TypeVar("Kind", bound=Config)
DROPOUTS = {"model.dropout", "lora.dropout"}


@dataclass(frozen=True)
class Options:
    """What the command line holds besides the configuration."""

    resume: str
    allow_change: list[str]
    print_config: bool


@dataclass(frozen=True)
class Command(Generic[Kind]):
    """An entry that trains: how its command line is read.

    base_of: finds the model that a run in this folder starts from, whose configuration is then the default.
    """

    kind: type[Kind]
    prog: str
    description: str
    default_config: Path
    base_of: Callable[[RunFolder], ModelConfig] | None = None


PRETRAIN = Command(
    Config,
    prog="pretrain.py",
    description="Pre-train a GPT. The same command line resumes a run that was stopped.",
    default_config=DEFAULT_CONFIG,
)


def build_parser(command: Command[Any] = PRETRAIN) -> ArgumentParser:
    parser = OptionParser(
        prog=command.prog,
        description=command.description,
        default_env=False,
        print_config=None,  # its own would show resume as if it were configuration
    )
    parser.add_argument(
        "--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all options and exit"
    )
    parser.add_argument("--version", action="version", version=VERSION_LINE, help=VERSION_HELP)
    parser.add_argument("--print-completion", action=PrintCompletion, metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file, or the name of one in train/configs, such as gpt2-124m; may be repeated, later ones "
        f"win; default {command.default_config.stem}",
    )
    parser.add_argument("--print_config", action="store_true", help="show the resulting configuration and exit")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: the newest good checkpoint of the run, or a new run; never: a new run; PATH: that checkpoint, as "
        "long as the run has none of its own",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="SECTION.KEY",
        help="let a resumed run differ from its checkpoint in this field; may be repeated",
    )
    parser.add_class_arguments(command.kind, nested_key=None)
    return parser


def read_config(arguments: list[str] | None = None) -> tuple[Config, Options]:
    """`read_command` of train/pretrain.py."""
    return read_command(PRETRAIN, arguments)


def read_command(command: Command[Kind], arguments: list[str] | None = None) -> tuple[Kind, Options]:
    """Parse a command line (default: this process's).

    Raises UserError in one line for an unknown key (naming the nearest), a wrong type or an impossible combination.
    """
    arguments = _in_full(sys.argv[1:] if arguments is None else arguments)
    files, others = _split_config_files(arguments)
    files = [find_config(file) for file in files] or [str(command.default_config)]
    types = dict(_field_types(command.kind))
    known = set(types)
    read = [read_file(expand_path(file), types) for file in files]
    contents = [file.content for file in read]
    for file, content in zip(files, contents, strict=True):
        _check_content(Path(file), content, types)
    _check_names(others, known)
    parser = build_parser(command)
    model = PRESETS.get(str(_named("model.preset", contents, others)))
    if (
        model is None
        and command.base_of is not None
        and not QUESTIONS & {argument.split("=")[0] for argument in others}
    ):
        root = _named("run.root", contents, others) or RunConfig().root
        name = _named("run.name", contents, others) or Path(files[-1]).stem
        model = command.base_of(RunFolder.find(root, name))
    if model is not None:
        parser.set_defaults({f"model.{key}": value for key, value in asdict(model).items()})
    # files first: options on the command line win, wherever the files are named on it
    texts, others = take_texts(others, types)
    parsed = parser.parse_args([*(f"--config={file.rest}" for file in read if file.rest), *others])
    for name, value in [*itertools.chain(*(file.texts.items() for file in read)), *texts]:
        key = name.removesuffix("+")
        parsed[key] = value if key == name else [*(parsed[key] or []), *value]
    if ObjectiveConfig(parsed["objective.kind"]).is_exact:
        own = [content for file, content in zip(files, contents, strict=True) if not _is_default(file, command)]
        for name in known & DROPOUTS:
            if _named(name, own, others) is None:  # the base's, or the default file's
                parsed[name] = 0.0
    for name in known:
        if isinstance(value := parsed.get(name), float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}: use a finite number")
    try:
        sections = parser.instantiate(parsed)
        config = command.kind(**{item.name: getattr(sections, item.name) for item in fields(command.kind)})
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if unknown := [name for name in parsed.allow_change if name not in known]:
        raise UserError(f"--allow-change {unknown[0]}: no such option{_nearest(unknown[0], known)}")
    if config.run.name is None:
        config = replace(config, run=replace(config.run, name=Path(files[-1]).stem))
    return config, Options(str(parsed.resume), list(parsed.allow_change), bool(parsed.print_config))


def _is_default(file: str, command: Command[Any]) -> bool:
    return expand_path(file).resolve() == command.default_config.resolve()


def _in_full(arguments: Sequence[str]) -> list[str]:
    """`--objective sft` is short for `--objective.kind sft`; each `--reward FILE.py:FUNCTION` or RUN is one of the list
    `rollout.reward`.
    """
    short, full = "--objective", "--objective.kind"
    arguments = [full + item.removeprefix(short) if item.split("=")[0] == short else item for item in arguments]
    found, rewards, rest = [], [], iter(arguments)
    for item in rest:
        if item.split("=")[0] != "--reward":
            found.append(item)
        elif (reward := item.removeprefix("--reward=") if "=" in item else next(rest, "")) and reward[0] != "-":
            rewards.append(reward)
        else:
            raise UserError("--reward has no function: give FILE.py:FUNCTION, or a reward model's run")
    return [*found, *([f"--rollout.reward={json.dumps(rewards)}"] if rewards else [])]


def find_config(named: str) -> str:
    """The configuration file that is meant: this one, or that of this name in train/configs (or a folder in it).

    Raises UserError where it is neither, but looks like a name.
    """
    if Path(named).suffix or os.sep in named or os.path.lexists(expand_path(named)):
        return named
    known = {path.stem: path for path in sorted(CONFIGS.rglob("*.yaml"))}
    if named not in known:
        raise UserError(
            f"--config is {named}, which is neither a file nor the name of one in train/configs"
            f"{_nearest(named, set(known))} ({', '.join(known)})"
        )
    return str(known[named])


def as_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


def to_yaml(config: Config) -> str:
    return to_text(as_dict(config))


def field_names(of: type = Config) -> Iterator[str]:
    """Every configurable field as section.key."""
    return (name for name, _ in _field_types(of))


def _field_types(of: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every configurable field as section.key, with its type."""
    for item in fields(of):
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from _field_types(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.type


def _split_config_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take `--config FILE` and `--config=FILE` out of a command line."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            try:
                files.append(next(rest))
            except StopIteration:
                raise UserError("--config has no file: give the name of a YAML file") from None
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


def _check_content(path: Path, content: dict[str, Any], types: dict[str, Any]) -> None:
    """Raises UserError naming the file where a key is unknown, or has no value though its field needs one."""
    known = set(types)
    sections = {name.split(".")[0] for name in known}
    for section, values in content.items():
        if section not in sections:
            raise UserError(f"{path}: unknown section {section!r}{_nearest(str(section), sections)}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: section {section} must hold keys and values")
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in known:
                raise UserError(f"{path}: unknown key {name}{_nearest(name, known)}")
            if value is None and type(None) not in get_args(types[name]):
                raise UserError(f"{path}: {name} has no value: give one, or leave it out")


def _check_names(arguments: list[str], fields_known: set[str]) -> None:
    """Suggest the nearest name for a misspelt option, which the parser doesn't do."""
    known = {f"--{name}" for name in fields_known}
    known |= QUESTIONS | {"--print_config", "--resume", "--allow-change"}
    if arguments and not arguments[0].startswith("-"):
        raise UserError(f"unexpected argument {arguments[0]}: use --config FILE for a configuration (see --help)")
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and len(name) > 2 and name.rstrip("+") not in known:
            raise UserError(f"unknown option {name}{_nearest(name, known)} (see --help)")


def _nearest(name: str, known: set[str]) -> str:
    for full in sorted(known):  # only the key, as other trainers take it
        if full.rpartition(".")[2] == name.removeprefix("--"):
            return f", did you mean {full}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _named(option: str, contents: list[dict[str, Any]], arguments: list[str]) -> str | None:
    """The value of an option by files and command line, before it is parsed."""
    section, key = option.split(".")
    value = None
    for content in contents:
        value = content.get(section, {}).get(key, value)
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == f"--{option}":
            value = following
        elif argument.startswith(f"--{option}="):
            value = argument.removeprefix(f"--{option}=")
    return None if value is None else str(value)
