"""Decide what to do with a job whose trainers have ended (`slurm/decision.py`), and write it into the run's folder.

slurm/job.sh runs this at the end of every job and acts on its exit status. Where the next start should do without some
nodes, it gets them as a named value (`slurm/shell_values.py`).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.plain_text import one_line
from common.run_folder import RunFolder
from slurm.decision import EXIT_STATUS, decide_for
from slurm.shell_values import print_values


def main() -> int:
    parser = CommandParser(
        f"{__doc__}\nExit status: " + ", ".join(f"{status} {action}" for action, status in EXIT_STATUS.items())
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--job", default="", help="what `scontrol -o show job` prints of the job")
    parser.add_argument("--exit-status", type=int, default=1, help="the launcher's")
    parser.add_argument("--asked", action="store_true", help="a user signal has come")
    parser.add_argument("--told", action="store_true", help="SIGTERM has come to the job's shell")
    parser.add_argument(
        "--nodes", action="store_true", help="standard input has the partition's nodes, as sinfo prints them"
    )
    a = parser.parse_args()
    cluster = sys.stdin.read() if a.nodes else ""
    decision = decide_for(
        RunFolder(a.run), a.job, asked=a.asked, told=a.told, exit_status=a.exit_status, cluster=cluster
    )
    print(one_line(f"{decision.action}: {decision.reason}"), flush=True)
    if decision.left_out.complaint:
        print(one_line(decision.left_out.complaint), flush=True)
    if decision.left_out.excluded is not None:
        print_values({"excluded": decision.left_out.excluded})
    return EXIT_STATUS[decision.action]


if __name__ == "__main__":
    exit_on_user_error(main)
