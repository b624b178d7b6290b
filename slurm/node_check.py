"""Before the trainers start, on every node at once: can all reach the head, and do all see GPUs and the same files?

The head listens where the ranks will meet. Every other node connects to it and reports what it finds in the run's
folder and in the data's. A node that stays silent is named. Other callers are rejected: the head starts with a number
that it has drawn, and each node proves with it, and with its report, that it knows the start's secret.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from common.addresses import listen_at
from common.errors import UserError
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from model.rank_environment import given_gpus
from slurm.history import StartId, append_finding
from slurm.start_info import Beginning, read_mark

PATIENCE_SECONDS = 30.0  # a network file system may show a new file this late
LOOK_SECONDS = 0.2
TALK_SECONDS = 5.0  # for one side to send to the other
CHALLENGE_BYTES = 32
NO_GPU = "can't train: "


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


def wait_for_all(beginning: Beginning, nodes: list[str], patience_seconds: float, wrong: str = "") -> None:
    """The head's part: wait for every other node's report.

    Args: wrong: what is wrong with the head itself.

    Raises UserError naming the nodes that did not connect, or a node's complaint.
    """
    missing = set(nodes[1:])
    complaints = {nodes[0]: wrong} if wrong else {}
    until = time.monotonic() + patience_seconds
    with listen_at(beginning.head, beginning.port, backlog=len(nodes)) as server:
        while missing and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                node, wrong = _hear(connection, beginning.secret)
            except OSError:
                continue
            if node not in missing:
                continue  # from someone else
            missing.discard(node)
            if wrong:
                complaints[node] = wrong
    if missing and not complaints:
        names = ",".join(sorted(missing))
        raise UserError(
            f"{names} did not reach the first node {nodes[0]} at {beginning.head}:{beginning.port} within "
            f"{patience_seconds:.0f} s: check the network between them, or submit with --exclude={names}"
        )
    if complaints:
        note_lost_gpus(RunFolder(Path(beginning.run_folder)), complaints, nodes)
        raise UserError("; ".join(f"{node} {wrong}" for node, wrong in complaints.items()))


def note_lost_gpus(folder: RunFolder, complaints: Mapping[str, str], nodes: list[str]) -> None:
    """Remember the nodes whose GPUs are missing, unless that is so on all of them: then PyTorch is a build without."""
    lost = {node: wrong for node, wrong in complaints.items() if wrong.startswith(NO_GPU)}
    if len(lost) < len(nodes):
        for node, wrong in lost.items():
            with contextlib.suppress(OSError):  # the job ends all the same, with the line
                append_finding(folder, StartId.of_environment(), node, "lost_gpu", wrong)


def call_head(beginning: Beginning, node: str, patience_seconds: float, wrong: str = "") -> None:
    """Another node's part. Raises UserError where the head can't be reached, or something is wrong here.

    Args: wrong: what is already known to be.
    """
    wrong = wrong or complaint(beginning, patience_seconds / 2)  # the head waits no longer than this node does
    until = time.monotonic() + patience_seconds
    while True:
        try:
            _report(beginning, node, wrong)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{node} can't reach the first node at {beginning.head}:{beginning.port}: {error}"
                ) from None
            time.sleep(LOOK_SECONDS)
    if wrong:
        raise UserError(f"{node} {wrong}")


def _hear(connection: socket.socket, secret: str) -> tuple[str, str]:
    """A node's report to the head: its name and its complaint. ("", "") from one that does not know the secret.

    Raises OSError where it breaks off or takes too long.
    """
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    with connection:
        connection.settimeout(TALK_SECONDS)
        connection.sendall(challenge)
        received, until = b"", time.monotonic() + TALK_SECONDS
        while len(received) < 100_000 and time.monotonic() < until and (part := connection.recv(4096)):
            received += part
    proof, _, message = received.partition(b"\n")
    if not hmac.compare_digest(proof, _proof(secret, challenge, message)):
        return "", ""
    node, wrong = json.loads(message)
    return node, wrong


def _report(beginning: Beginning, node: str, wrong: str) -> None:
    """Send a node's complaint to the head. Raises OSError where nobody listens."""
    with socket.create_connection((beginning.head, beginning.port), timeout=TALK_SECONDS) as connection:
        challenge = b""
        while len(challenge) < CHALLENGE_BYTES:
            part = connection.recv(CHALLENGE_BYTES - len(challenge))
            if not part:
                raise ConnectionError("the first node closed the connection")
            challenge += part
        message = json.dumps([node, wrong]).encode()
        connection.sendall(_proof(beginning.secret, challenge, message) + b"\n" + message)


def _proof(secret: str, challenge: bytes, message: bytes) -> bytes:
    """That a message is of one who knows the secret, and answers this challenge; the secret is not given away."""
    return hmac.new(secret.encode(), challenge + message, hashlib.sha256).hexdigest().encode()


def check_nodes(beginning: Beginning, nodes: list[str], number: int, patience_seconds: float) -> None:
    """One node's part of the check. All nodes call at once; `number` is this node's place among `nodes`.

    Raises UserError on the first node, and on the node that is wrong.
    """
    without = missing_gpus(beginning, os.environ)
    if number == 0:
        wait_for_all(beginning, nodes, patience_seconds, without)
    else:
        call_head(beginning, nodes[number], patience_seconds, without)


def missing_gpus(beginning: Beginning, environment: Mapping[str, str]) -> str:
    """What is wrong with this node's GPUs; "" where all is well, or none are wanted.

    Only where Slurm has given some is PyTorch asked, which takes seconds to load.
    """
    if beginning.device == "cpu" or not given_gpus(environment)[0]:
        return ""
    from model.devices import lost_gpus

    lost = lost_gpus(environment)
    return f"{NO_GPU}{lost}" if lost else ""
