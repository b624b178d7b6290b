"""A study's YAML, read into its declared shape: what is compared, over which seeds, sizes and budgets, by which metric.

Torch-free. What is wrong is one line with the file's name and the field's.
"""

import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from common.errors import UserError
from common.json_file import BadJson, Count, Finite, Positive, parse_json
from common.os_errors import refusal
from common.paths import PROJECT, expand_path
from common.yaml_file import BadYaml, parse_yaml, read_yaml, read_yaml_text
from train.settings.config_file import UniqueKeysLoader

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]{0,39}$")]
Options = dict[str, Any]  # by section.key
Values = Annotated[list[Any], Field(min_length=1, max_length=64)]
OF_A_VARIANT = ("config", "budgets", "tune")  # what a variant has besides options, which have a dot
SET_BY_THE_STUDY = ("run.name", "run.root", "run.seed", "run.max_steps")
ADVICE = "docs/studies.md shows one"


@dataclass(frozen=True)
class Seeds:
    """`run.seed` of each run, and `data.seed` where that is to differ from it; one of both may be held."""

    run: Annotated[list[Count], Field(min_length=1)]
    data: Annotated[list[Count], Field(min_length=1)] | None = None

    def pairs(self) -> list[tuple[int, int | None]]:
        """Of each run, in order. Raises UserError where there are not as many of both, or one twice."""
        if self.data is None:
            found: list[tuple[int, int | None]] = [(seed, None) for seed in self.run]
        elif 1 in (len(self.run), len(self.data)):
            found = [(run, data) for run in self.run for data in self.data]
        else:
            raise UserError("seeds: run has several and data has several: hold one of both")
        if len(set(found)) < len(found):
            raise UserError("seeds: one is given twice: name each once")
        return found


@dataclass(frozen=True)
class Budgets:
    """How long runs are, in one of three units."""

    tokens: list[Finite] | None = None
    flops: list[Finite] | None = None
    tokens_per_parameter: list[Finite] | None = None  # of the base configuration at that size

    @property
    def unit(self) -> str:
        return next(name for name, values in asdict(self).items() if values)

    @property
    def amounts(self) -> list[float]:
        return sorted(set(map(float, getattr(self, self.unit))))


@dataclass(frozen=True)
class Sizes:
    """The dial: layers. See `train.studies.sizes` for what follows from it."""

    depth: Annotated[list[Positive], Field(min_length=1)]
    width_per_layer: Positive = 64
    head_size: Positive = 64


@dataclass(frozen=True)
class Trials:
    """The runs that choose the values of tuned options. None: the first seed, the smallest common budget."""

    seed: Count | None = None
    budget: Finite | None = None


@dataclass(frozen=True)
class _File:
    """The file's top level."""

    name: Name
    base: Options
    variants: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    seeds: Seeds
    budgets: Budgets
    question: str = ""
    metric: str = "final"
    baseline: str = "base"
    sizes: Sizes | None = None
    tune: dict[str, Values] = field(default_factory=dict)
    trials: Trials = field(default_factory=Trials)


@dataclass(frozen=True)
class Variant:
    """One variant. `options`: as its files and overrides state them. `budgets`: beside the common ones."""

    options: Options
    budgets: list[float]
    tune: dict[str, list[Any]]


@dataclass(frozen=True)
class StudyFile:
    """A study as it was asked for.

    Attributes:
        base: what its files and overrides state, by option. base_files: absolute.
    """

    path: Path
    name: str
    question: str
    metric: str
    baseline: str
    base: Options
    base_files: list[Path]
    variants: dict[str, Variant]
    seeds: list[tuple[int, int | None]]
    unit: str
    budgets: list[float]
    sizes: Sizes | None
    trial_seed: int | None
    trial_budget: float

    @property
    def depths(self) -> list[int | None]:
        """Smallest first; [None] of a study without sizes."""
        return [*sorted(set(self.sizes.depth))] if self.sizes else [None]


def read_study_file(path: Path) -> StudyFile:
    """Raises UserError in one line for what can't be read or is none."""
    try:
        raw = parse_yaml(read_yaml_text(path), kind=UniqueKeysLoader)
    except OSError as error:
        raise UserError(f"study {refusal('read', error, path, otherwise='name another')}") from None
    except BadYaml as error:
        raise UserError(f"study {path} is not YAML: {error}") from None
    try:
        return _study(path, _shaped(raw))
    except UserError as error:
        raise UserError(f"study {path}: {error}") from None


def _shaped(raw: Any) -> _File:
    if not isinstance(raw, dict):
        raise UserError(f"it holds no keys: {ADVICE}")
    _refuse_unknown(raw, _File, "")
    raw = dict(raw)
    if isinstance(raw.get("seeds"), list):
        raw["seeds"] = {"run": raw["seeds"]}
    if isinstance(raw.get("seeds"), dict):
        raw["seeds"] = {key: value if isinstance(value, list) else [value] for key, value in raw["seeds"].items()}
    if isinstance(raw.get("budgets"), dict):
        raw["budgets"] = {key: _numbers(value) for key, value in raw["budgets"].items()}
    if isinstance(raw.get("trials"), dict) and "budget" in raw["trials"]:
        raw["trials"] = raw["trials"] | {"budget": _numbers(raw["trials"]["budget"])[0]}
    if isinstance(raw.get("variants"), dict):  # `base:` without anything is an empty one
        raw["variants"] = {name: {} if value is None else value for name, value in raw["variants"].items()}
    for key, shape in (("seeds", Seeds), ("budgets", Budgets), ("sizes", Sizes), ("trials", Trials)):
        if isinstance(raw.get(key), dict):
            _refuse_unknown(raw[key], shape, f"{key}.")
    try:
        return parse_json(json.dumps(raw).encode(), _File)
    except (BadJson, TypeError) as error:
        raise UserError(f"{error}: {ADVICE}") from None


def _numbers(value: Any) -> list[Any]:
    """YAML 1.1 reads 2e6 as a text."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        try:
            found.append(float(one) if isinstance(one, str) else one)
        except ValueError:
            found.append(one)
    return found


def _refuse_unknown(found: dict[Any, Any], shape: type, prefix: str) -> None:
    known = [item.name for item in fields(shape)]
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise UserError(f"unknown field {prefix}{key}" + (f": did you mean {prefix}{near[0]}?" if near else ""))


def _study(path: Path, file: _File) -> StudyFile:
    given = [name for name, values in asdict(file.budgets).items() if values]
    if len(given) != 1:
        raise UserError("budgets: give tokens, flops or tokens_per_parameter, one of them, with a list of numbers")
    amounts = [*file.budgets.amounts, *([file.trials.budget] if file.trials.budget is not None else [])]
    if min(amounts) <= 0:
        raise UserError(f"budgets.{given[0]}: {min(amounts):g} is not positive")
    base_files = [_find(path, name) for name in _listed(file.base.get("config"))]
    if not base_files:
        raise UserError("base.config: name the configuration file that all runs start from")
    stated = {key: value for key, value in file.base.items() if key != "config"}
    _check_options(stated, "base")
    variants = {name: _variant(path, name, content, file) for name, content in file.variants.items()}
    if file.baseline not in variants:
        raise UserError(f"baseline: there is no variant {file.baseline}: use one of {', '.join(variants)}")
    if lower := sorted(name for name in variants if [n.lower() for n in variants].count(name.lower()) > 1):
        raise UserError(f"variants.{lower[0]}: another one differs in capital letters only: rename one")
    return StudyFile(
        path=path,
        name=file.name,
        question=file.question,
        metric=file.metric,
        baseline=file.baseline,
        base=_contents(base_files) | stated,
        base_files=base_files,
        variants=variants,
        seeds=file.seeds.pairs(),
        unit=file.budgets.unit,
        budgets=file.budgets.amounts,
        sizes=file.sizes,
        trial_seed=file.trials.seed,
        trial_budget=file.trials.budget if file.trials.budget is not None else file.budgets.amounts[0],
    )


def _variant(path: Path, name: str, content: dict[str, Any], file: _File) -> Variant:
    place = f"variants.{name}"
    _check_options({key: value for key, value in content.items() if key not in OF_A_VARIANT}, place)
    files = [_find(path, file_name) for file_name in _listed(content.get("config"))]
    options = {key: value for key, value in content.items() if key not in OF_A_VARIANT}
    budgets = _numbers(content.get("budgets", []))
    if wrong := [value for value in budgets if type(value) not in (int, float) or value <= 0]:
        raise UserError(f"{place}.budgets: {wrong[0]!r} is not a positive number")
    tune = content.get("tune", file.tune)
    if not isinstance(tune, dict) or any(not isinstance(values, list) or not values for values in tune.values()):
        raise UserError(f"{place}.tune: give options with a list of values each, such as optim.lr: [0.001, 0.002]")
    _check_options(tune, f"{place}.tune")
    for option, values in tune.items():
        if len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{place}.tune: {option} has a value twice")
    return Variant(_contents(files) | options, sorted({float(value) for value in budgets}), dict(tune))


def _check_options(options: Options, place: str) -> None:
    """What these are called and are worth is checked when the runs are planned."""
    for option in options:
        if "." not in str(option):
            raise UserError(f"{place}: {option} is no option: use section.key, such as model.norm")
        if option in (*SET_BY_THE_STUDY, "data.seed"):
            raise UserError(f"{place}: the study sets {option} itself: leave it out")


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(one) for one in (value if isinstance(value, list) else [value])]


def _find(study: Path, name: str) -> Path:
    """A configuration that a study names: beside it, or in the project."""
    given = expand_path(name)
    for folder in (study.resolve().parent, PROJECT):
        if (folder / given).is_file():
            return folder / given
    raise UserError(f"{name} is not beside the study and not in the project: name a configuration file")


def _contents(files: list[Path]) -> Options:
    """What configuration files state, by option, a later one before an earlier one."""
    found: Options = {}
    for path in files:
        try:
            content = read_yaml(path)
        except (OSError, BadYaml, yaml.YAMLError) as error:
            raise UserError(f"{path} can't be read ({error}): name another configuration") from None
        sections = content if isinstance(content, dict) else {}
        for section, values in sections.items():
            pairs = values.items() if isinstance(values, dict) else [("", values)]
            found |= {f"{section}.{key}": value for key, value in pairs}
    return {key: value for key, value in found.items() if key not in (*SET_BY_THE_STUDY, "data.seed")}
