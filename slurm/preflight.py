"""Check a job's nodes before its trainers start, on all of them at once; slurm/job.sh runs this.

Can all reach the head, and do all see their GPUs and the same files (`slurm/node_check.py`)?
"""

import json
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.environment import whole_number
from common.errors import UserError, exit_on_user_error
from slurm.node_check import PATIENCE_SECONDS, check_nodes
from slurm.start_info import Beginning

BEGINNING = "LONGHAUL_BEGINNING"


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("--nodes", required=True, help="the job's nodes, the first one first, with spaces between")
    parser.add_argument("--patience-seconds", type=float, default=PATIENCE_SECONDS)
    a = parser.parse_args()
    beginning = os.environ.get(BEGINNING)
    if beginning is None:
        raise UserError(f"{BEGINNING} is not set: let slurm/job.sh start this, which sets it")
    number = whole_number("SLURM_PROCID", 0)
    check_nodes(Beginning(**json.loads(beginning)), a.nodes.split(), number, a.patience_seconds)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
