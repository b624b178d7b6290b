"""What was found wrong with a run's nodes, remembered in `slurm.jsonl`: a line of kind `finding` for each.

One finding may be chance. A node with two independent ones, of different starts or of different kinds, is left out at
the next requeues, for a while: somebody may mend it.
"""

import time
from collections.abc import Iterable
from typing import Any, Literal

from common.errors import UserError
from common.metrics_file import read_records
from common.run_files import unreadable
from common.run_folder import RunFolder
from slurm.history import StartId, append_finding, read_starts

What = Literal["sniff_test", "hung", "lost_gpu"]
NODE_AT_FAULT: tuple[What, ...] = ("hung", "lost_gpu")  # of a run's failures
INDEPENDENT = 2  # findings, after which a node is left out
EXPIRY_SECONDS = 7 * 24 * 3600.0  # after which a finding is forgotten


def culprits(state: dict[str, Any], nodes: list[str]) -> list[str]:
    """The node on account of which the run has failed, if it is one of the job's.

    Where the trainers did not know Slurm's name for it they have written its host name.
    """
    name = str(state.get("culprit_node", "")) if state.get("failure") in NODE_AT_FAULT else ""
    return [node for node in nodes if node in (name, name.split(".")[0])][:1]


def remember(folder: RunFolder, start: StartId, state: dict[str, Any], nodes: list[str]) -> list[str]:
    """Write down what this start, and sniff tests of all, have found; return the nodes to leave out, worst first.

    Args: state: of this start. nodes: the job's.

    Raises UserError where the run's records can't be read, OSError where nothing can be written.
    """
    records = read_starts(folder)
    known = {_key(record) for record in records if _is_finding(record)}
    at_fault = culprits(state, nodes)
    new = _of_sniff_tests(folder)
    new += [
        {**_of(start), "node": node, "what": state["failure"], "detail": state.get("reason", "")} for node in at_fault
    ]
    for finding in new:
        if _key(finding) not in known:
            known.add(_key(finding))
            append_finding(
                folder, StartId(finding["job_id"], finding["restart_count"]), finding["node"], finding["what"],
                str(finding["detail"]), at=finding.get("time"),
            )  # fmt: skip
    return list(dict.fromkeys([*at_fault, *sick_nodes(read_starts(folder), time.time())]))


def sick_nodes(records: Iterable[dict[str, Any]], now: float) -> list[str]:
    """The nodes with independent findings that are not too old, the latest first. Args: records: slurm.jsonl."""
    latest: dict[str, float] = {}
    count: dict[str, set[tuple[Any, ...]]] = {}
    for record in records:
        if _is_finding(record) and now - record["time"] < EXPIRY_SECONDS:
            node = record["node"]
            latest[node] = max(record["time"], latest.get(node, 0.0))
            count.setdefault(node, set()).add(_key(record))
    sick = [node for node, found in count.items() if len(found) >= INDEPENDENT]
    return sorted(sick, key=lambda node: -latest[node])


def _of(start: StartId) -> dict[str, Any]:
    return {"job_id": start.job_id, "restart_count": start.restart_count}


def _key(finding: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a finding another one: several GPUs of a node in one sniff test are one."""
    return tuple(finding.get(name) for name in ("job_id", "restart_count", "node", "what"))


def _is_finding(record: dict[str, Any]) -> bool:
    texts = all(isinstance(record.get(name), str) for name in ("node", "what"))
    return record.get("kind") == "finding" and texts and isinstance(record.get("restart_count"), int)


def _of_sniff_tests(folder: RunFolder) -> list[dict[str, Any]]:
    """What the trainers' sniff tests have found (`train/run/sniff_test.py`), of all starts: some had no end."""
    try:
        records = read_records(folder.metrics)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(unreadable(folder.metrics, error)) from None
    found = []
    for record in records:
        sick, job_id, count = record.get("sick"), record.get("job_id"), record.get("restart_count")
        if (
            record.get("kind") != "sniff_test"
            or not isinstance(sick, list)
            or not isinstance(record.get("time"), float)
        ):
            continue
        if not isinstance(job_id, str) or not isinstance(count, int):
            continue
        for one in sick:
            if isinstance(one, dict) and isinstance(one.get("node"), str):
                detail = f"{one.get('check')} {one.get('rate')} of {one.get('median')} on rank {one.get('rank')}"
                found.append(
                    {**_of(StartId(job_id, count)), "node": one["node"], "what": "sniff_test", "detail": detail}
                    | {"time": record["time"]}
                )
    return found
