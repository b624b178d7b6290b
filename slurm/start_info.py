"""What the first node of a job sends the others about a start."""

from dataclasses import asdict, dataclass
from pathlib import Path

from common.json_file import BadJson, read_json
from common.publish import write_json_whole


@dataclass(frozen=True)
class Beginning:
    """The facts of one start of a job.

    Args:
        run_folder, data_folder: absolute paths.
        data_identity: of the data that the folder must hold on every node.
        head, port: where the ranks meet.
        meeting_id: names the start, differs for every start of every job, and is easily guessed.
        secret: known only to the job's own processes. It travels in environments and in a file that only the user can
            read, never in a command line, which all users of a node can.
        resume: the value of --resume in place of the first start's; "" leaves it.
        device: the configuration's run.device.
    """

    run_folder: str
    data_folder: str
    data_identity: str
    head: str
    port: int
    meeting_id: str
    secret: str
    resume: str
    device: str = "auto"


def mark_path(run_folder: Path, meeting_id: str) -> Path:
    return run_folder / f".start-{meeting_id}"


def leave_mark(beginning: Beginning) -> None:
    """Write a file that this start's other nodes must find, and remove older ones. The head calls."""
    folder = Path(beginning.run_folder)
    for old in folder.glob(".start-*"):
        old.unlink(missing_ok=True)
    write_json_whole(mark_path(folder, beginning.meeting_id), asdict(beginning), mode=0o600)


def read_mark(run_folder: Path, meeting_id: str) -> Beginning | None:
    """What the head has written; None where it is not visible (yet)."""
    try:
        return read_json(mark_path(run_folder, meeting_id), Beginning)
    except (OSError, BadJson):
        return None
