"""The configuration of a run: sections composed, read from YAML and the command line, and written back.

Precedence, lowest first: defaults, `model.preset`, the YAML file, the command line.
"""

import difflib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from common.errors import UserError
from model.config import PRESETS, ModelConfig, preset_config
from train.batch import BatchConfig
from train.optimizer import OptimConfig
from train.run_config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, RecomputeConfig, RunConfig
from train.schedule import ScheduleConfig

PROJECT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = PROJECT / "train" / "configs" / "gpt2-124m.yaml"


@dataclass(frozen=True)
class ModelSection(ModelConfig):
    """The architecture.

    Args:
        preset: a named size to begin from; what else stands in this section changes it.
    """

    preset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None:
            preset_config(self.preset)

    def architecture(self) -> ModelConfig:
        """The model's own configuration, without the name it began from."""
        values = asdict(self)
        del values["preset"]
        return ModelConfig(**values)


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.data.stride is not None and self.data.stride > self.model.block_size:
            raise ValueError(
                f"data.stride {self.data.stride} would leave out the tokens between windows of model.block_size "
                f"{self.model.block_size}: give at most that"
            )


@dataclass(frozen=True)
class Options:
    """What the command line says besides the configuration."""

    resume: str
    allow_change: list[str]
    print_config: bool


class _Parser(ArgumentParser):
    """jsonargparse, with its complaints as one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser() -> ArgumentParser:
    parser = _Parser(
        prog="pretrain.py",
        description="Pre-train a GPT. Start it again with the same command line and it goes on where it stopped.",
        default_env=False,
        print_config=None,  # its own would show resume as if it were configuration
    )
    parser.add_argument("--config", action="config", help=f"YAML file; default {DEFAULT_CONFIG.relative_to(PROJECT)}")
    parser.add_argument("--print_config", action="store_true", help="show the resulting configuration and leave")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: the newest good checkpoint of the run, or a new run; never: a new run; PATH: that checkpoint",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="SECTION.KEY",
        help="let a resumed run differ from its checkpoint in this field; may be repeated",
    )
    parser.add_class_arguments(Config, nested_key=None)
    return parser


def read_config(arguments: list[str] | None = None) -> tuple[Config, Options]:
    """Parse a command line (default: this process's).

    Raises UserError in one line for an unknown key (naming the nearest), a wrong type or an impossible combination.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    files, others = _split_config_files(arguments)
    files = files or [str(DEFAULT_CONFIG)]
    contents = [_read_yaml(Path(file)) for file in files]
    _check_names(others)
    parser = build_parser()
    preset = _preset_named(contents, others)
    if preset is not None:
        parser.set_defaults({f"model.{key}": value for key, value in asdict(PRESETS[preset]).items()})
    # files first: what stands on the command line wins, wherever on it the files are named
    parsed = parser.parse_args([*(f"--config={file}" for file in files), *others])
    try:
        sections = parser.instantiate(parsed)
        config = Config(**{section.name: getattr(sections, section.name) for section in fields(Config)})
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if config.run.name is None:
        config = replace(config, run=replace(config.run, name=Path(files[-1]).stem))
    return config, Options(str(parsed.resume), list(parsed.allow_change), bool(parsed.print_config))


def as_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(as_dict(config), sort_keys=False, width=120)


def field_names(of: type = Config, prefix: str = "") -> Iterator[str]:
    """Every configurable field as section.key."""
    for item in fields(of):
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from field_names(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _split_config_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take `--config FILE` and `--config=FILE` out of a command line."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            try:
                files.append(next(rest))
            except StopIteration:
                raise UserError("--config needs the name of a YAML file") from None
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


def _read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file, its keys checked. Raises UserError naming the file."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"configuration {path} can't be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"configuration {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"configuration {path} must hold sections such as model: and data:")
    known = set(field_names())
    sections = {name.split(".")[0] for name in known}
    for section, values in content.items():
        if section not in sections:
            raise UserError(f"{path}: unknown section {section!r}{_nearest(str(section), sections)}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: section {section} must hold keys and values")
        for key in values:
            if f"{section}.{key}" not in known:
                raise UserError(f"{path}: unknown key {section}.{key}{_nearest(f'{section}.{key}', known)}")
    return content


def _check_names(arguments: list[str]) -> None:
    """Meet a misspelt option with the nearest name, which the parser would not give."""
    known = {f"--{name}" for name in field_names()}
    known |= {"--help", "--print_config", "--resume", "--allow-change"}
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and len(name) > 2 and name.rstrip("+") not in known:
            raise UserError(f"unknown option {name}{_nearest(name, known)} (see --help)")


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _preset_named(contents: list[dict[str, Any]], arguments: list[str]) -> str | None:
    """The preset that files and command line settle on; a wrong name is left to the parser to refuse."""
    preset = None
    for content in contents:
        preset = content.get("model", {}).get("preset", preset)
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--model.preset":
            preset = following
        elif argument.startswith("--model.preset="):
            preset = argument.removeprefix("--model.preset=")
    return preset if preset in PRESETS else None
