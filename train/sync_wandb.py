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
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.os_errors import refusal
from common.progress import format_count
from common.run_files import read_configuration
from common.run_folder import RunFolder
from train.run.mirror import feed
from train.run.record_of_run import is_being_trained, mirrored_records
from train.run.wandb_mirror import WandbWriter, write_place


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--again", action="store_true", help="everything once more, into a new wandb run")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    records = mirrored_records(folder)
    config = read_configuration(folder)
    log = config.get("log")
    log = log if isinstance(log, dict) else {}
    if log.get("wandb") and is_being_trained(folder):
        raise UserError(f"{folder.path} is being trained and mirrors itself: sync it when it has ended")
    writer = WandbWriter(folder, str(log.get("wandb_project", "longhaul")), config, again=arguments.again)
    writer.keeps_place = False
    try:
        where = writer.open()
        sent = feed(writer, records)
        writer.finish()
    except UserError:
        raise
    except Exception as error:  # any exception of a library that talks to a network
        raise UserError(
            f"wandb has refused it ({type(error).__name__}: {error}): nothing is lost, run the same command again"
        ) from None
    try:
        write_place(folder, writer.place)  # only now: what was interrupted is sent once more
    except OSError as error:
        raise UserError(refusal("written", error, folder.path, otherwise="sync again")) from None
    of = f"{format_count(sent)} of {format_count(len(records))} records"
    print(f"{of} added to wandb run {writer.place['id']} ({where})")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
