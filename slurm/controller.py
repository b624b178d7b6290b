"""Queries to Slurm's controller, through its own commands."""

import re
import subprocess

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


def fields(record: str) -> dict[str, str]:
    """`scontrol -o show …` as a mapping. The first word of a name counts: a job's own options come later."""
    return dict(word.split("=", 1) for word in reversed(record.split()) if "=" in word)
