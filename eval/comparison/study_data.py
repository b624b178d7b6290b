"""A study as its report reads it: what is asked, what differs, and every run that it is made of."""

from dataclasses import dataclass, replace
from typing import Any

from common.errors import UserError
from eval.comparison.measured_runs import MeasuredRun

Seed = tuple[int, int | None]  # `run.seed`, and `data.seed` where the study sets it


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, done or not.

    Attributes:
        size: of the sizes, such as `d6` (a depth); empty where the study has none.
        budget: of the budgets, such as `2M` (tokens) or `1e15flops` or `20tpp` (tokens per parameter).
        choices: the values of the options that are tuned; of a run that waits for its trials, empty.
        trial: it only helps to choose these. A trial at the study's own seed and budget, whose choices turned out best,
            is listed once more as an ordinary run.
        run: None where it has no result.
        why: why it has none: `missing`, `waits for its trials`, or `failed: …`.
    """

    variant: str
    size: str
    budget: str
    seed: Seed
    choices: dict[str, Any]
    run: MeasuredRun | None
    why: str = ""
    trial: bool = False


@dataclass(frozen=True)
class Study:
    """All lists are in the study's order of variants, sizes, budgets and seeds, whatever that of the runs was.

    Attributes:
        metric: as `--compare --metric` takes it, fixed before the first run.
        baseline: the variant that others are compared with.
        changes: by variant, the overrides of the base configuration by option; `config` is a file that it adds.
        sizes: smallest first; a study without any has one, which is empty.
        budgets: by variant, smallest first. All variants have those of `shared_budgets`; others are for multipliers.
        tune: by variant, the values of each tuned option, as the file lists them.
        base: the base configuration by option, as the file gives it (`config` and overrides).
    """

    name: str
    question: str
    metric: str
    baseline: str
    base: dict[str, Any]
    changes: dict[str, dict[str, Any]]
    sizes: list[str]
    shared_budgets: list[str]
    budgets: dict[str, list[str]]
    tune: dict[str, dict[str, list[Any]]]
    runs: list[StudyRun]

    def against(self, baseline: str) -> "Study":
        """The same results, compared with another variant. Raises UserError where there is none of that name."""
        if baseline not in self.changes:
            raise UserError(f"--baseline: there is no variant {baseline}: use one of {', '.join(self.changes)}")
        return replace(self, baseline=baseline)
