"""The runs that a study is made of: each one's name, command line and cost, and which trials choose its options.

Names are made of variant, size, values of tuned options, budget and seeds, so that a run is the same whatever else the
study gets later.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import UserError
from common.publish import canonical_json
from eval.comparison.measured_runs import MeasuredRun
from eval.comparison.run_groups import find_metric
from eval.comparison.study_data import Seed
from model.counts import flops_per_token, parameter_count
from train.settings.command_line import read_config
from train.settings.sections import Config
from train.studies.sizes import rates_of, shape_of
from train.studies.study_file import Options, StudyFile

UNITS = {"tokens": "", "flops": "flops", "tokens_per_parameter": "tpp"}
SHORTEST_RUN = 2  # steps


@dataclass(frozen=True)
class PlannedRun:
    """One run. `options`: of train/pretrain.py, without its folder; `tokens` and `flops` are its whole cost."""

    name: str
    variant: str
    size: str
    budget: str
    seed: Seed
    choices: dict[str, Any]
    trial: bool
    options: tuple[str, ...]
    steps: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Waiting:
    """A run that can't be named before its trials have results."""

    variant: str
    size: str
    budget: str
    seed: Seed


@dataclass
class Planner:
    """Makes the runs of one study, checking each kind of them once.

    Raises UserError where options are not train/pretrain.py's, or together impossible.
    """

    study: StudyFile

    def __post_init__(self) -> None:
        self._read: dict[tuple[str, ...], Config] = {}

    def trials(self, variant: str, depth: int | None) -> list[PlannedRun]:
        """One for each set of values of the variant's tuned options, in the order of the file; none where there is
        nothing to tune."""
        tune = self.study.variants[variant].tune
        seed = self._trial_seed
        return [
            self._run(variant, depth, self.study.trial_budget, seed, dict(zip(tune, values, strict=True)), trial=True)
            for values in itertools.product(*tune.values())
            if tune
        ]

    def ordinary(self, variant: str, depth: int | None, choices: dict[str, Any]) -> list[PlannedRun]:
        """A variant's runs at one size, by budget and seed."""
        amounts = self.amounts(variant)
        return [self._run(variant, depth, amount, seed, choices) for amount in amounts for seed in self.study.seeds]

    def amounts(self, variant: str) -> list[float]:
        """Smallest first."""
        return sorted({*self.study.budgets, *self.study.variants[variant].budgets})

    def label(self, amount: float) -> str:
        return _short(amount) + UNITS[self.study.unit]

    def waiting(self, variant: str, depth: int | None) -> list[Waiting]:
        return [Waiting(variant, size_label(depth), self.label(amount), seed)
                for amount in self.amounts(variant) for seed in self.study.seeds]  # fmt: skip

    @property
    def _trial_seed(self) -> Seed:
        seeds = self.study.seeds
        wanted = self.study.trial_seed
        return seeds[0] if wanted is None else next((s for s in seeds if s[0] == wanted), (wanted, seeds[0][1]))

    def _run(
        self,
        variant: str,
        depth: int | None,
        amount: float,
        seed: Seed,
        choices: dict[str, Any],
        *,
        trial: bool = False,
    ) -> PlannedRun:
        options = self._options(variant, depth, amount) | choices
        config = self._config(options)
        step, stages = config.batch.tokens_per_step, config.batch.stages
        per_token = flops_per_token(config.model.architecture())
        steps = max(1, stages.steps_to(self._tokens(depth, amount, per_token)))
        if steps < SHORTEST_RUN:
            raise UserError(
                f"study {self.study.path}: budgets: {self.label(amount)} is less than {SHORTEST_RUN} steps of {step:,} "
                "tokens: give more"
            )
        seeds = {"run.seed": seed[0]} | ({} if seed[1] is None else {"data.seed": seed[1]})
        options = options | {"run.max_steps": steps} | seeds
        self._config(options | {"run.seed": 0})
        parts = [variant, size_label(depth), *map(_choice, choices.items()), self.label(amount), f"s{seed[0]}"]
        parts += [] if seed[1] is None else [f"d{seed[1]}"]
        return PlannedRun(
            name="-".join(part for part in parts if part),
            variant=variant,
            size=size_label(depth),
            budget=self.label(amount),
            seed=seed,
            choices=choices,
            trial=trial,
            options=self._arguments(options),
            steps=steps,
            tokens=stages.tokens_after(steps),
            flops=float(stages.tokens_after(steps) * per_token),
        )

    def _options(self, variant: str, depth: int | None, amount: float) -> Options:
        """What the study states beside the base's files: the base's overrides, the size's rules, the variant's."""
        stated = dict(self.study.base)
        if depth is not None and self.study.sizes is not None:
            shape = shape_of(depth, self.study.sizes)
            sized = self._config(stated | shape)
            per_token = flops_per_token(sized.model.architecture())
            horizon = self._tokens(depth, amount, per_token)
            stated |= shape | rates_of(self._base, shape["model.n_embd"], horizon)
        return stated | self.study.variants[variant].options

    def _tokens(self, depth: int | None, amount: float, per_token: int) -> float:
        """Of a budget. Tokens per parameter are of the base configuration's, so that all variants get as many."""
        if self.study.unit == "tokens":
            return amount
        if self.study.unit == "flops":
            return amount / per_token
        shape = {} if depth is None or self.study.sizes is None else shape_of(depth, self.study.sizes)
        return amount * parameter_count(self._config(self.study.base | shape).model.architecture())

    @cached_property
    def _base(self) -> Config:
        return self._config(self.study.base)

    def _arguments(self, options: Options) -> tuple[str, ...]:
        files = [f"--config={path}" for path in self.study.base_files]
        return (*files, *(f"--{name}={_as_text(value)}" for name, value in options.items()))

    def _config(self, options: Options) -> Config:
        arguments = self._arguments(options)
        if arguments not in self._read:
            try:
                config = read_config(list(arguments))[0]
                for name in ("warmup", "decay"):
                    value = getattr(config.schedule, name)
                    if value >= 1 and (name == "warmup" or config.schedule.kind == "wsd"):
                        raise UserError(f"schedule.{name} is {value} steps: give a share of the run below 1")
            except UserError as error:
                raise UserError(f"study {self.study.path}: {error}") from None
            self._read[arguments] = config
        return self._read[arguments]


def plan(
    planner: Planner, results: Mapping[str, MeasuredRun], failed: Collection[str] = ()
) -> tuple[list[PlannedRun], list[Waiting]]:
    """All runs that can be named, and those that wait for trials, in the study's order.

    Args: results: of finished runs, by name. failed: names of runs that will have none.

    Raises UserError as `Planner`, and where two runs would have one name.
    """
    runs: list[PlannedRun] = []
    waiting: list[Waiting] = []
    for variant in planner.study.variants:
        for depth in planner.study.depths:
            trials = planner.trials(variant, depth)
            runs += trials
            choices = choose(trials, results, planner.study.metric, failed) if trials else {}
            if choices is None:
                waiting += planner.waiting(variant, depth)
            else:
                runs += planner.ordinary(variant, depth, choices)
    counts = Counter((run.name.lower(), run.trial) for run in runs)
    if clash := sorted(name for (name, _), count in counts.items() if count > 1):
        raise UserError(f"study {planner.study.path}: two runs would be called {clash[0]}: rename a variant")
    return runs, waiting


def choose(
    trials: list[PlannedRun], results: Mapping[str, MeasuredRun], metric: str, failed: Collection[str] = ()
) -> dict[str, Any] | None:
    """The best trial's values; None where one is missing, or none can be ranked.

    What has failed, or can't be ranked, as its loss is NaN, is worse than all others.
    """
    if any(trial.name not in results and trial.name not in failed for trial in trials):
        return None
    ended = [(trial, results[trial.name]) for trial in trials if trial.name in results]
    if not ended:
        return None
    chosen = find_metric(metric, [run for _, run in ended])
    ranked = []
    for trial, run in ended:
        value = None if run.why_unfit(chosen) else run.value(chosen)
        if value is not None:
            ranked.append((-value if chosen.higher_is_better else value, canonical_json(trial.choices), trial.choices))
    return min(ranked)[2] if ranked else None


def size_label(depth: int | None) -> str:
    return "" if depth is None else f"d{depth}"


def _choice(pair: tuple[str, Any]) -> str:
    """One tuned option in a run's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "", f"{pair[0].split('.')[-1]}{_as_text(pair[1])}")


def _short(amount: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= amount < 1e12:
            return f"{amount / size:.6g}{letter}"
    return f"{amount:.6g}".replace("+", "")


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
