"""Upload to Weights & Biases whatever a run's wandb run is missing; safe to repeat.

    python train/sync_wandb.py runs/gpt2-124m
    WANDB_MODE=online python train/sync_wandb.py runs/gpt2-124m

metrics.jsonl is the record; lines that a resume has overwritten are left out. wandb-mirror.json in the run's folder has
the wandb run's id and its last step. Offline (the default) this writes a folder for `wandb sync` below RUN/wandb.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.curves import KnownCurves
from common.errors import UserError, exit_on_user_error
from common.metrics_file import holding, read_records
from common.os_errors import refusal
from common.processes import ProcessIdentity
from common.progress import format_count
from common.rewritten_file import read_record
from common.run_files import read_configuration, unreadable
from common.run_folder import RunFolder
from train.run.wandb_mirror import is_mirrored, new_place, open_run, read_place, send, write_place


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--again", action="store_true", help="everything once more, into a new wandb run")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    try:
        written = read_records(folder.metrics)
    except OSError as error:
        raise UserError(unreadable(folder.metrics, error)) from None
    known = KnownCurves.of(written)
    if complaint := known.complaint_about(folder.metrics):
        print(f"left out: {complaint}", file=sys.stderr)
    records = [record for record in holding(written) if is_mirrored(record, known)]
    if not records:
        raise UserError(f"{folder.metrics} holds no record: give the folder of a run that has started")
    config = read_configuration(folder)
    log = config.get("log")
    log = log if isinstance(log, dict) else {}
    if log.get("wandb") and is_being_trained(folder):
        raise UserError(f"{folder.path} is being trained and mirrors itself: sync it when it has ended")
    place = new_place() if arguments.again else read_place(folder)
    try:
        run = open_run(folder, str(log.get("wandb_project", "longhaul")), config, place["id"])
        sent = sum(send(run, record, place) for record in records)
        run.finish()
    except Exception as error:  # any exception of a library that talks to a network
        raise UserError(
            f"wandb has refused it ({type(error).__name__}: {error}): nothing is lost, run the same command again"
        ) from None
    try:
        write_place(folder, place)  # only now: what was interrupted is sent once more
    except OSError as error:
        raise UserError(refusal("written", error, folder.path, otherwise="sync again")) from None
    print(f"{format_count(sent)} of {format_count(len(records))} records added to wandb run {place['id']}")
    return 0


def is_being_trained(folder: RunFolder) -> bool:
    """Whether the run's lock is there, and its owner not certainly gone."""
    owner = read_record(folder.lock)
    if owner is None:
        return False
    try:
        return not ProcessIdentity.from_record(owner).is_gone()
    except KeyError:
        return True


if __name__ == "__main__":
    exit_on_user_error(main)
