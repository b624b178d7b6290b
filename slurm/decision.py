"""What to do with a job whose trainers have ended: finished, requeued, left to Slurm, or failed for good.

The run's `state` decides, not an exit code: torchrun ends with 1 after a clean stop too.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from common.run_folder import RunFolder
from slurm.controller import fields
from slurm.findings import culprits, remember
from slurm.history import (
    FRUITLESS_LIMIT,
    StartId,
    append_end,
    fruitless_limit,
    fruitless_starts,
    nodes_left_out,
    read_starts,
    saved_step,
    starts_file,
    steps_trained,
)
from slurm.host_list import expand
from slurm.spare_nodes import LeftOut, choose, parse_nodes

Action = Literal["finished", "stopped", "requeue", "leave", "failed"]
RECOVERABLE = ("lost_rank", "lost_gpu", "storage", "hung")
EXIT_STATUS: dict[Action, int] = {"finished": 0, "stopped": 0, "requeue": 75, "leave": 143, "failed": 1}


@dataclass(frozen=True)
class Facts:
    """What is known when the trainers have ended.

    Args:
        state: the run's `state`; None where there is none.
        own: the `state` was written by the start of the job that ends here.
        steps_trained: by this start.
        fruitless: starts in a row, this one included, that started where the run's newest checkpoint still is.
        asked: Slurm (or a person, through it) requested that the job save and exit.
        pre_empted: because another job needs its nodes.
        ended_by_slurm: the job's own shell got SIGTERM, or Slurm does not list it as running any more: `scancel`, the
            time limit, a lost node, or the end of the grace period.
        exit_status: of the launcher.
    """

    state: dict[str, Any] | None
    own: bool
    steps_trained: int
    fruitless: int
    asked: bool
    pre_empted: bool
    ended_by_slurm: bool
    exit_status: int
    fruitless_limit: int = FRUITLESS_LIMIT


@dataclass(frozen=True)
class Decision:
    """left_out: the nodes that a requeued job's next start does without."""

    action: Action
    reason: str
    left_out: LeftOut = field(default_factory=LeftOut)


def decide(facts: Facts) -> Decision:
    """What to do with the job now."""
    state = facts.state or {}
    status = state.get("status")
    if facts.own:
        if status == "done":
            return Decision("finished", "all steps are done")
        if status == "preempted" and state.get("stop") == "file":
            return Decision("stopped", "requested by the STOP file")
        if status == "failed" and state.get("failure") not in RECOVERABLE:
            return Decision("failed", f"not requeued, as the same would happen again: {state.get('reason')}")
    elif status == "done" and facts.exit_status == 0:
        return Decision("finished", "all steps were done before")
    if facts.ended_by_slurm:
        return Decision("leave", "Slurm ended the job, and requeues it if it decides to")
    if facts.fruitless >= facts.fruitless_limit and not facts.pre_empted:
        return Decision(
            "failed", f"given up: {facts.fruitless} starts in a row saved nothing new (last: {_last(state)})"
        )
    if not facts.own:
        if facts.asked or facts.pre_empted:
            return Decision("requeue", "pre-empted before the first step")
        return Decision("failed", f"the trainers ended with status {facts.exit_status} before the first step")
    if status == "preempted" and state.get("stop") in ("signal", "deadline", None):
        if str(state.get("reason")).startswith("SIGINT"):
            return Decision("stopped", "interrupted by a person (SIGINT)")
        return Decision("requeue", f"pre-empted at step {state.get('step')}: {state.get('reason')}")
    return _after_a_loss(facts, str(state.get("reason")) if status == "failed" else "no rank was left to record why")


def _last(state: dict[str, Any]) -> str:
    return f"{state.get('status', 'no step was done')} at step {state.get('step', 0)}, {state.get('reason')}"


def _after_a_loss(facts: Facts, reason: str) -> Decision:
    """A rank, a node or a file system was lost: resume only if that makes progress."""
    if facts.steps_trained == 0 and not (facts.asked or facts.pre_empted):
        return Decision("failed", f"lost before a single step was done, so it would be lost again: {reason}")
    return Decision("requeue", f"lost after {facts.steps_trained} steps: {reason}")


def is_newer_than_start(folder: RunFolder, start: StartId) -> bool:
    """Whether `state` was written since the start. On Slurm its job id and restart count decide; clocks may differ."""
    begun = [line["time"] for line in read_starts(folder) if line["kind"] == "start"]
    return bool(start.job_id) or not begun or folder.state.stat().st_mtime >= begun[-1]


def decide_for(
    folder: RunFolder, job_record: str, *, asked: bool, told: bool, exit_status: int, cluster: str = ""
) -> Decision:
    """Gather the facts about this process's job, decide, and write the decision into the run's folder.

    Args:
        job_record: `scontrol -o show job`.
        asked: a user signal has come. told: SIGTERM has come to the job's own shell.
        cluster: the nodes of the job's partition, as `sinfo` prints them (`spare_nodes.NODES_FORMAT`).
    """
    job = fields(job_record)
    start = StartId.of_environment()
    pre_empted = job.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    state = folder.read_state()
    own = state is not None and start.names(state) and is_newer_than_start(folder, start)
    decision = decide(
        Facts(
            state=state,
            own=own,
            steps_trained=steps_trained(folder, start),
            fruitless=fruitless_starts(read_starts(folder), start, saved_step(folder)),
            asked=asked,
            pre_empted=pre_empted,
            ended_by_slurm=told or job.get("JobState", "RUNNING") != "RUNNING",
            exit_status=exit_status,
            fruitless_limit=fruitless_limit(),
        )
    )
    wanted = _remember(folder, start, state if own and state else {}, expand(job.get("NodeList", "")))
    if decision.action == "requeue":
        before = nodes_left_out(read_starts(folder), start.job_id)
        decision = replace(decision, left_out=choose(wanted, before, job, parse_nodes(cluster)))
    left_out = list(decision.left_out.nodes)
    try:
        append_end(folder, start, decision.action, decision.reason, pre_empted=pre_empted, left_out=left_out)
    except OSError as error:  # a full disk must not cost the job its next start, which may find space
        _warn(folder, error)
    return decision


def _remember(folder: RunFolder, start: StartId, state: dict[str, Any], nodes: list[str]) -> list[str]:
    """As `findings.remember`, also on a full disk: then what this start has found is not forgotten for this once."""
    try:
        return remember(folder, start, state, nodes)
    except OSError as error:
        _warn(folder, error)
        return culprits(state, nodes)


def _warn(folder: RunFolder, error: OSError) -> None:
    print(f"warning: {starts_file(folder)} can't be written: {error.strerror}", file=sys.stderr)
