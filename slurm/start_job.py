"""Start a job, on its first node, before any trainer is started: slurm/job.sh runs this.

Checks what can be checked there (`slurm/job_start.py`), and prints what the job's shell needs as named values
(`slurm/shell_values.py`).
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from slurm.job_start import begin
from slurm.shell_values import print_values
from slurm.start_info import leave_mark


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("--nodes", required=True, help="the job's nodes, the first one first, with spaces between")
    parser.add_argument("--addresses", default="", help="the addresses Slurm uses for them, in the same order")
    parser.add_argument("--launch", choices=["torchrun", "srun"], default="torchrun")
    parser.add_argument("options", nargs="*", help="after --: the trainer's options")
    a = parser.parse_args()
    beginning = begin(a.options, a.nodes.split(), a.addresses.split(), a.launch)
    print_values({**asdict(beginning), "beginning": json.dumps(asdict(beginning))})
    leave_mark(beginning)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
