"""Write a run's record for TensorBoard, of any run, old ones too; safe to repeat.

    python train/sync_tensorboard.py runs/gpt2-124m
    tensorboard --logdir runs

metrics.jsonl and samples.jsonl are the record. RUN/tensorboard is written anew, with the curves over steps and over
tokens; lines that a resume has overwritten are left out. `log.tensorboard` does the same while a run is trained.
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
from common.run_folder import RunFolder
from train.run.mirror import feed
from train.run.record_of_run import is_being_trained, mirrored_records
from train.run.tensorboard_mirror import TensorboardWriter, forget


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    records = mirrored_records(folder)
    if (folder.tensorboard / "steps").is_dir() and is_being_trained(folder):
        raise UserError(f"{folder.path} is being trained and writes {folder.tensorboard} itself: try when it has ended")
    writer = TensorboardWriter(folder, 0, 0)
    try:
        forget(folder)
        where = writer.open()
        feed(writer, records)
        writer.finish()
    except OSError as error:
        raise UserError(refusal("written", error, folder.tensorboard, otherwise="move it away")) from None
    except UserError as error:
        raise UserError(f"TensorBoard: {error}") from None
    program = Path(sys.executable).with_name("tensorboard")  # PATH may lack it, or have another one
    shown_by = program if program.is_file() else "tensorboard"
    print(f"{format_count(len(records))} records in {where}: {shown_by} --logdir {folder.path.parent}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
