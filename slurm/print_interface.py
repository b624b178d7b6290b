"""Print the network interface that gloo must be given, if it would not find it by the host name.

slurm/node.sh asks this on every node, and gets it as a named value (`slurm/shell_values.py`).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from slurm.rendezvous import interface_to, own_name_is_useless
from slurm.shell_values import print_values


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("other", help="address or name of another node of the job")
    other = parser.parse_args().other
    print_values({"interface": (interface_to(other) or "") if own_name_is_useless() else ""})
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
