"""`train/study.py STUDY.yaml`: plan, show what it costs, train or submit what is missing."""

import argparse

from common.errors import UserError
from train.studies.cluster_jobs import submit_missing
from train.studies.cost import describe_plan
from train.studies.machine import find_gpus, make_slots
from train.studies.planning import Planner, plan
from train.studies.progress_view import ProgressView
from train.studies.reading import folder_of, read_results
from train.studies.study_file import StudyFile, read_study_file
from train.studies.study_folder import StudyFolder
from train.studies.work_queue import WorkQueue


def train_study(arguments: argparse.Namespace) -> int:
    """Return the exit status. Raises UserError for a study that can't be trained as it is asked for."""
    study = read_study_file(arguments.study)
    folder, planner = StudyFolder(folder_of(arguments.study, arguments.out)), Planner(study)
    folder.check(study)
    results, failed = read_results(planner, folder)
    runs, waiting = plan(planner, results, failed)
    if arguments.slurm is not None:
        return _submit(arguments, study, planner, folder)
    gpus = [] if study.base.get("run.device") == "cpu" else find_gpus()
    slots = make_slots(arguments.jobs, arguments.threads, gpus)
    if arguments.dry_run:
        print(describe_plan(runs, waiting, results, len(slots)))
        return 0
    _fix(folder, study)
    view = ProgressView()
    queue = WorkQueue(planner, folder, slots, view, keep_checkpoints=arguments.keep_checkpoints)
    status = queue.work()
    for name, why in sorted(queue.failed.items()):
        print(f"failed: {name}: {why}")
    if not status:
        print(f"all {len(queue.runs)} runs are done: python train/study.py {arguments.study} --report")
    return status


def _submit(arguments: argparse.Namespace, study: StudyFile, planner: Planner, folder: StudyFolder) -> int:
    if not arguments.dry_run:
        _fix(folder, study)
    return submit_missing(
        planner,
        folder,
        arguments.slurm,
        again=arguments.again,
        dry_run=arguments.dry_run,
        keep_checkpoints=arguments.keep_checkpoints,
    )


def _fix(folder: StudyFolder, study: StudyFile) -> None:
    try:
        folder.fix(study)
    except OSError as error:
        raise UserError(f"{folder.path} can't be written ({error.strerror}): name another --out") from None
