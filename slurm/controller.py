"""Queries to Slurm's controller, through its own commands."""

import re
import subprocess
import time

from common.plain_text import one_line
from slurm.spare_nodes import NODES_FORMAT

ANSWER_SECONDS = 60.0
JOB_ID = re.compile(r"[0-9][0-9_+.]*")  # of an array or a heterogeneous job, too


def ask(*command: str) -> str:
    """The output of a Slurm command; "" where it fails or Slurm is not there."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def node_addresses(names: list[str]) -> list[str]:
    """The addresses Slurm uses for the nodes, in the same order; a node's own name where it has none."""
    return [fields(ask("scontrol", "-o", "show", "node", name)).get("NodeAddr", name) for name in names]


def job_record(job_id: str) -> dict[str, str]:
    """The controller's record of a job; {} where it has forgotten it, or that is not a job's id."""
    if not JOB_ID.fullmatch(job_id):
        return {}
    return fields(ask("scontrol", "-o", "show", "job", job_id))


def partition_nodes(partition: str) -> str:
    """What `sinfo` prints of a partition's nodes, for `spare_nodes.parse_nodes`; "" where it does not answer."""
    if not partition:
        return ""
    return ask("sinfo", "--noheader", "--Node", f"--partition={partition}", f"--format={NODES_FORMAT}")


def leave_out(job_id: str, excluded: str) -> str:
    """Have a requeued job's next start do without these nodes, and only these; return why Slurm refused, or ""."""
    command = ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={excluded}"]
    refused = ""
    for pause in (1.0, 2.0, 3.0, 0.0):  # it may not be pending yet
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0:
            return ""
        refused = one_line(done.stderr.strip())
        time.sleep(pause)
    return refused


def fields(record: str) -> dict[str, str]:
    """`scontrol -o show …` as a mapping. The first word of a name counts: a job's own options come later."""
    return dict(word.split("=", 1) for word in reversed(record.split()) if "=" in word)
