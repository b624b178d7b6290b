"""A study as its report reads it: four variants, a sweep, budgets, and runs that are missing, failed or not causal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.comparison.measured_runs import MeasuredRun
from eval.comparison.study_data import Study, StudyRun
from tests.helpers.study_runs import law, write_study_run

NOISE = (0.0, 0.003, -0.002)
BUDGETS = (50, 70, 100, 140, 200, 280)  # steps of the baseline
SHARED = 100
RATES = (1e-3, 2e-3, 4e-3)
SWIGLU = {"model.activation": "swiglu"}
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "gain": SWIGLU,
    "leak": {"model.norm": "sequence"},
    "rate": {"optim.weight_decay": 0.2},
}


def whole_study(root: Path, *, sweep: bool = True) -> Study:
    """`gain` is 1.3 times as good as `base`, `rate` is swept, `leak` is not causal and lacks a run."""
    runs = []
    for steps in BUDGETS:
        runs += [_run(root, "base", steps, seed) for seed in (1, 2, 3)]
    runs += [_run(root, "gain", SHARED, seed, gain=1.3) for seed in (1, 2, 3)]
    runs += [_run(root, "leak", SHARED, seed, record={"causal": False}, offset=-0.5) for seed in (1, 2)]
    runs += [StudyRun("leak", "", _budget(SHARED), (3, None), {}, None, "failed: the loss is not finite")]
    if sweep:
        runs += [_run(root, "rate", SHARED, 1, rate=rate, trial=True) for rate in RATES]
        runs += [_run(root, "rate", SHARED, seed, rate=RATES[-1]) for seed in (1, 2)]
        runs += [StudyRun("rate", "", _budget(SHARED), (3, None), {"optim.lr": RATES[-1]}, None, "missing")]
    changes = CHANGES if sweep else {name: change for name, change in CHANGES.items() if name != "rate"}
    return Study(
        name="lengths",
        question="Is <SwiGLU> better?",
        metric="final",
        baseline="base",
        base={"model.n_layer": 2},
        changes=dict(changes),
        sizes=[""],
        shared_budgets=[_budget(SHARED)],
        budgets={name: [_budget(steps) for steps in (BUDGETS if name == "base" else (SHARED,))] for name in changes},
        tune={"rate": {"optim.lr": list(RATES)}} if sweep else {},
        runs=runs,
    )


def _budget(steps: int) -> str:
    return f"{steps}K"


def _run(
    root: Path,
    variant: str,
    steps: int,
    seed: int,
    *,
    gain: float = 1.0,
    offset: float = 0.0,
    rate: float | None = None,
    trial: bool = False,
    **options: Any,
) -> StudyRun:
    shift = offset + NOISE[seed - 1] * (1 if variant == "base" else -1) - (rate or 0) * 2
    loss: Callable[[float], float] = lambda tokens: law(tokens * gain) + shift  # noqa: E731
    changes = {option.replace(".", "__"): value for option, value in CHANGES[variant].items()}
    changes |= {"optim__lr": rate} if rate else {}
    folder = root / f"{variant}-{steps}-{rate or 0:g}-{seed}"
    if not folder.exists():
        write_study_run(folder, seed=seed, steps=steps, every=10, loss=loss, **changes, **options)
    choices = {"optim.lr": rate} if rate else {}
    return StudyRun(variant, "", _budget(steps), (seed, None), choices, MeasuredRun.load(folder), trial=trial)
