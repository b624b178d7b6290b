"""A study as its report reads it, whatever of it is done."""

from pathlib import Path

from eval.comparison.measured_runs import MeasuredRun
from eval.comparison.study_data import Study, StudyRun
from train.studies.planning import PlannedRun, Planner, Waiting, plan, size_label
from train.studies.study_file import StudyFile, read_study_file
from train.studies.study_folder import StudyFolder


def read_study(path: Path, out: Path | None = None) -> Study:
    """Args: path: of the YAML. out: the study's folder where that is not the file's own.

    Raises UserError for a file that is none or that has changed since its runs started, and for a damaged result.
    """
    study, folder = read_study_file(path), StudyFolder(folder_of(path, out))
    folder.check(study)
    return gather(study, folder)


def folder_of(path: Path, out: Path | None) -> Path:
    """Of a study's file: where its results are."""
    return out or path.resolve().parent


def gather(study: StudyFile, folder: StudyFolder) -> Study:
    """The study with what its folder has of it."""
    planner = Planner(study)
    results, failed = read_results(planner, folder)
    runs, waiting = plan(planner, results, failed)
    entries = [_entry(run, results.get(run.name), failed.get(run.name, "")) for run in runs]
    entries += [_waits(entry) for entry in waiting]
    variants = list(study.variants)
    sizes = [size_label(depth) for depth in study.depths]
    budgets = {name: [planner.label(amount) for amount in planner.amounts(name)] for name in variants}

    def place(entry: StudyRun) -> tuple[bool, int, int, int, int]:
        found = budgets[entry.variant]
        budget = found.index(entry.budget) if entry.budget in found else -1
        seed = study.seeds.index(entry.seed) if entry.seed in study.seeds else -1
        return (not entry.trial, variants.index(entry.variant), sizes.index(entry.size), budget, seed)

    return Study(
        name=study.name,
        question=study.question,
        metric=study.metric,
        baseline=study.baseline,
        base=study.base,
        changes={name: variant.options for name, variant in study.variants.items()},
        sizes=sizes,
        shared_budgets=[planner.label(amount) for amount in study.budgets],
        budgets=budgets,
        tune={name: variant.tune for name, variant in study.variants.items()},
        runs=sorted(entries, key=place),
    )


def read_results(planner: Planner, folder: StudyFolder) -> tuple[dict[str, MeasuredRun], dict[str, str]]:
    """Of all runs that have one, trials before those whose options they choose; and why others have failed."""
    results: dict[str, MeasuredRun] = {}
    failed: dict[str, str] = {}
    while True:
        before = len(results) + len(failed)
        for run in plan(planner, results, failed)[0]:
            if run.name in results or run.name in failed:
                continue
            if (found := folder.read_result(run.name) or folder.read_ended(run.name)) is not None:
                results[run.name] = found
            elif why := folder.why_failed(run.name):
                failed[run.name] = why
        if len(results) + len(failed) == before:
            return results, failed


def _entry(run: PlannedRun, result: MeasuredRun | None, failure: str) -> StudyRun:
    why = "" if result is not None else f"failed: {failure}" if failure else "missing"
    return StudyRun(run.variant, run.size, run.budget, run.seed, run.choices, result, why, run.trial)


def _waits(entry: Waiting) -> StudyRun:
    return StudyRun(entry.variant, entry.size, entry.budget, entry.seed, {}, None, "waits for its trials")
