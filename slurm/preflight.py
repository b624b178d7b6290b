"""Before the trainers start, on every node at once: can all reach the head, and do all see the same files?

The head listens where the ranks will meet. Every other node calls it and says what it finds in the run's folder and
in the data's. A node that stays silent is named.
"""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.environment import whole_number
from common.errors import UserError, exit_on_user_error
from data_prep.token_set import TokenSet
from slurm.beginning import Beginning, read_mark

PATIENCE_SECONDS = 30.0  # a network file system may show a new file this late
LOOK_SECONDS = 0.2


def complaint(beginning: Beginning, patience_seconds: float) -> str:
    """What is wrong with this node's view of the files; "" where all is well. Waits for a slow file system."""
    run_folder, until = Path(beginning.run_folder), time.monotonic() + patience_seconds
    while read_mark(run_folder, beginning.meeting_id) != beginning:
        if time.monotonic() > until:
            return (
                f"does not see the run's folder {run_folder} as the first node does: "
                "put run.root on a file system that all nodes share"
            )
        time.sleep(LOOK_SECONDS)
    try:
        found = TokenSet.open(beginning.data_folder).identity
    except UserError as error:
        return f"does not see the data: {error}"
    if found != beginning.data_identity:
        return (
            f"finds other data in {beginning.data_folder} ({found[:12]}) than the first node does "
            f"({beginning.data_identity[:12]}): put data.path on a file system that all nodes share"
        )
    return ""


def wait_for_all(beginning: Beginning, nodes: list[str], patience_seconds: float) -> None:
    """The head's part: hear every other node.

    Raises UserError naming the nodes that did not come, or what a node complains of.
    """
    missing, complaints = set(nodes[1:]), []
    until = time.monotonic() + patience_seconds
    with socket.create_server(("", beginning.port), backlog=len(nodes)) as server:
        while missing and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                said = _receive(connection)
            except OSError:
                continue
            if said.get("meeting_id") != beginning.meeting_id or said.get("node") not in missing:
                continue  # a stranger's
            missing.discard(said["node"])
            if said["complaint"]:
                complaints.append(f"{said['node']} {said['complaint']}")
    if missing:
        names = ",".join(sorted(missing))
        raise UserError(
            f"{names} did not reach the first node {nodes[0]} at {beginning.head}:{beginning.port} within "
            f"{patience_seconds:.0f} s: check the network between them, or submit with --exclude={names}"
        )
    if complaints:
        raise UserError("; ".join(complaints))


def call_head(beginning: Beginning, node: str, patience_seconds: float) -> None:
    """Another node's part. Raises UserError where the head can't be reached, or something is wrong here."""
    wrong = complaint(beginning, patience_seconds / 2)  # the head waits no longer than this node does
    message = {"meeting_id": beginning.meeting_id, "node": node, "complaint": wrong}
    until = time.monotonic() + patience_seconds
    while True:
        try:
            with socket.create_connection((beginning.head, beginning.port), timeout=5.0) as connection:
                connection.sendall(json.dumps(message).encode())
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{node} can't reach the first node at {beginning.head}:{beginning.port}: {error}"
                ) from None
            time.sleep(LOOK_SECONDS)
    if wrong:
        raise UserError(f"{node} {wrong}")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """The JSON object that the other side sends before it hangs up; {} if it is none."""
    with connection:
        connection.settimeout(5.0)
        received = b""
        while len(received) < 100_000 and (part := connection.recv(4096)):
            received += part
    try:
        said = json.loads(received)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def check_nodes(beginning: Beginning, nodes: list[str], number: int, patience_seconds: float) -> None:
    """One node's part of the check. All call at once; `number` is this node's place among `nodes`.

    Raises UserError on the first node, and on the node that is wrong.
    """
    if number == 0:
        wait_for_all(beginning, nodes, patience_seconds)
    else:
        call_head(beginning, nodes[number], patience_seconds)


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("--nodes", required=True, help="the job's nodes, the first one first, with spaces between")
    parser.add_argument("--patience-seconds", type=float, default=PATIENCE_SECONDS)
    parser.add_argument("beginning", help="what the first node knows of this start, as JSON")
    a = parser.parse_args()
    number = whole_number("SLURM_PROCID", 0)
    check_nodes(Beginning(**json.loads(a.beginning)), a.nodes.split(), number, a.patience_seconds)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
