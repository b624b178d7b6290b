"""A study on a cluster: what is missing becomes a job array, by `slurm/submit.py`, and no process waits for it.

Each call keeps the results of what has ended since, then submits what has neither a result nor a job.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence

from common.errors import UserError
from common.paths import PROJECT
from common.publish import write_whole
from eval.comparison.measured_runs import MeasuredRun
from train.studies.planning import PlannedRun, Planner, Waiting, plan
from train.studies.reading import read_results
from train.studies.study_folder import StudyFolder
from train.studies.work_queue import in_turn, options_of, owner_of


def submit_missing(
    planner: Planner, folder: StudyFolder, submit_options: str, *, again: bool, dry_run: bool, keep_checkpoints: bool
) -> int:
    """Return the exit status, submit.py's own.

    Args:
        submit_options: of submit.py, as in a shell, such as "--gpus-per-node 1 --cpus-per-node 12".
        again: submit what has failed once more.
        dry_run: show what would be submitted; nothing is kept or changed.

    Raises UserError where a run's folder can't be read, or `submit_options` has an open quote.
    """
    try:
        words = shlex.split(submit_options)
    except ValueError as error:
        raise UserError(f"--slurm {submit_options!r}: {error}: close it") from None
    runs, waiting, results, failed = _gather(planner, folder, keep=not dry_run, keep_checkpoints=keep_checkpoints)
    missing = [run for run in in_turn(runs) if run.name not in results and (again or run.name not in failed)]
    missing = [run for run in missing if owner_of(folder.run(run.name)) is None]
    _announce(runs, waiting, results, failed)
    if not missing:
        return 1 if failed or waiting else 0
    jobs = folder.path / "jobs.jsonl"
    write_whole(jobs, "".join(json.dumps(options_of(run, folder)) + "\n" for run in missing))
    name = f"--job-name={planner.study.name}"
    command = [sys.executable, str(PROJECT / "slurm" / "submit.py"), f"--jobs={jobs.resolve()}", name, *words]
    try:
        return subprocess.run([*command, *(["--dry-run"] if dry_run else [])], check=False).returncode
    finally:
        if dry_run:
            jobs.unlink()


def _gather(
    planner: Planner, folder: StudyFolder, *, keep: bool, keep_checkpoints: bool
) -> tuple[list[PlannedRun], list[Waiting], dict[str, MeasuredRun], dict[str, str]]:
    """The plan, and what has become of its runs. A trial that has failed is worse than all others.

    Args: keep: write result files of runs that have ended since.
    """
    results, failed = read_results(planner, folder)
    for name in results if keep else ():
        if not folder.result_file(name).is_file():
            with folder.claim(name) as mine:
                if mine:
                    folder.harvest(name, keep_checkpoints=keep_checkpoints)
    return *plan(planner, results, failed), results, failed


def _announce(
    runs: Sequence[PlannedRun], waiting: Sequence[Waiting], results: dict[str, MeasuredRun], failed: dict[str, str]
) -> None:
    for name, why in sorted(failed.items()):
        print(f"failed: {name}: {why} (--again submits it once more)")
    names = {run.name for run in runs}
    words = [f"{len(names & set(results))} of {len(names)} runs done"]
    words += [f"{len(failed)} failed"] if failed else []
    words += [f"{len(waiting)} wait for trials: give this command again when those have ended"] if waiting else []
    print(", ".join(words), flush=True)
