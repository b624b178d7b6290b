"""Which of a cluster's nodes a job's next start can do without: never so many that too few are left for it.

Slurm's own answers are the facts: the job's record, and what `sinfo` prints of its partition's nodes (`NODES_FORMAT`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slurm.host_list import expand

NODES_FORMAT = "%N|%T|%c|%m|%G|%b"  # of sinfo --Node: name, state, cores, MiB, GPUs and the like, features
USABLE = {"idle", "allocated", "mixed", "completing", "reserved", "planned", "powered_down", "powering_up"}
SMALLEST_CAP = 2  # nodes that even a small job may leave out
CAP_SHARE = 8  # of its nodes a large job may leave out one in so many


@dataclass(frozen=True)
class Node:
    """A node of the job's partition. usable: it is up, and will take jobs."""

    name: str
    usable: bool
    cores: int
    memory_mib: int
    devices: str
    features: str


@dataclass(frozen=True)
class LeftOut:
    """What is left out of a job's next start.

    Attributes:
        nodes: on account of what was found, beside the user's own.
        excluded: the whole list for Slurm, in its own form; None where the job has it already.
        complaint: why others, which should be left out, are not.
    """

    nodes: tuple[str, ...] = ()
    excluded: str | None = None
    complaint: str = ""


def parse_nodes(printed: str) -> list[Node]:
    """Lines of `sinfo` in NODES_FORMAT; others are skipped."""
    found = {}
    for line in printed.splitlines():
        words = line.strip().split("|")
        if len(words) != 6 or not (words[2].isdecimal() and words[3].isdecimal()):
            continue
        name, state, cores, memory, devices, features = words
        bare = state.rstrip("~#@+-")  # of power saving and reboots; with * it doesn't respond, with $ it is maintained
        devices = re.sub(r"\(S:[^)]*\)", "", devices)  # the sockets of its GPUs
        found[name] = Node(name, bare in USABLE, int(cores), int(memory), devices, features)
    return list(found.values())


def cap(needed: int) -> int:
    """How many nodes a job of so many may leave out."""
    return max(SMALLEST_CAP, needed // CAP_SHARE)


def choose(wanted: Iterable[str], before: Iterable[str], job: Mapping[str, str], nodes: list[Node]) -> LeftOut:
    """What to leave out of the job's next start.

    Args:
        wanted: the nodes to leave out, the most urgent first.
        before: those that an earlier requeue of this job has left out, which are not the user's own.
        job: its record.
        nodes: of its partition; without them nothing is left out.
    """
    now = expand(job.get("ExcNodeList", ""))
    own = [name for name in now if name not in set(before)]
    chosen: list[str] = []
    complaints = []
    known = {node.name for node in nodes}
    for name in dict.fromkeys(wanted):
        if name in own or (nodes and name not in known):  # of another partition: Slurm might not know it any more
            continue
        if objection := _objection([*own, *chosen, name], len(chosen), job, nodes):
            complaints.append(f"{name} can't be left out: {objection}")
        else:
            chosen.append(name)
    excluded = [*own, *chosen]
    return LeftOut(tuple(chosen), None if set(excluded) == set(now) else ",".join(excluded), "; ".join(complaints))


def _objection(excluded: list[str], chosen: int, job: Mapping[str, str], nodes: list[Node]) -> str:
    """Why a job can't do without these nodes, of which `chosen` and the last one are not the user's own."""
    needed = re.match(r"\d+", job.get("NumNodes", ""))
    if needed is None or not nodes:
        return "Slurm does not answer how many nodes there are"
    if job.get("Reservation", "(null)") not in ("", "(null)"):
        return "the job is in a reservation, of which it is not known how many nodes remain"
    if excluded[-1] in expand(job.get("ReqNodeList", "")):
        return "the job asks for it (--nodelist)"
    if chosen >= cap(int(needed[0])):
        return f"{chosen} nodes are left out already"
    left = [node.name for node in nodes if node.name not in excluded and _would_do(node, job, nodes)]
    if len(left) < int(needed[0]):
        return f"the job needs {needed[0]} nodes, and only {len(left)} others would do"
    return ""


def _would_do(node: Node, job: Mapping[str, str], nodes: list[Node]) -> bool:
    """Whether the job can certainly run on a node: it is up, and has all that one of the job's present nodes has."""
    mine = set(expand(job.get("NodeList", "")))
    constrained = job.get("Features", "(null)") not in ("", "(null)")
    return node.usable and any(
        node.cores >= own.cores
        and node.memory_mib >= own.memory_mib
        and node.devices == own.devices
        and (node.features == own.features or not constrained)
        for own in nodes
        if own.name in mine
    )
