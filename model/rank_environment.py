"""Which process of how many this is, by its launcher's variables: torchrun, `srun` with one task a rank, or none."""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from common.environment import whole_number
from common.errors import UserError

OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(65536)
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
TO_TRAIN_ALONE = f"for one process: unset {' '.join(OF_A_RANK)}; for several, start them with train/launch.py"
TO_START_ANEW = "leave Slurm's variables as srun sets them, or unset SLURM_STEP_ID for one process"


@dataclass(frozen=True)
class Place:
    """One process among those that were started together; rank 0 of 1 without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def find_place(environment: Mapping[str, str]) -> Place:
    """This process's place.

    torchrun's variables win: its workers also have the SLURM_* of the task that torchrun is. Those count only in a step
    of several tasks, which a batch script or an interactive shell is not.

    Raises UserError where the variables contradict each other, or the nodes of a Slurm allocation would each train a
    model of their own.
    """
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        place = Place(*(_count(environment, name, default) for name, default in zip(names, (0, 1, 0, 1), strict=True)))
        if not 0 <= place.rank < place.world_size:
            raise UserError(
                f"RANK is {place.rank} and WORLD_SIZE {environment.get('WORLD_SIZE', 'not set')}, which no launcher "
                f"sets: {TO_TRAIN_ALONE}"
            )
    elif "SLURM_STEP_ID" in environment and _of_slurm(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        place = Place(
            rank=_of_slurm(environment, "SLURM_PROCID"),
            world_size=_of_slurm(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_of_slurm(environment, "SLURM_LOCALID"),
            local_world_size=_tasks_here(environment),
        )
        if not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
            raise UserError(
                "srun started this with one task a rank, but MASTER_ADDR and MASTER_PORT, where the ranks meet, "
                "are not set: LONGHAUL_LAUNCH=srun sbatch --ntasks-per-node=N slurm/124m.sh sets them"
            )
    else:
        place = Place()
    _refuse_lonely_nodes(environment, place)
    return place


def export_place(environment: MutableMapping[str, str], place: Place) -> None:
    """Set torchrun's variables where another launcher left them out: libraries look for them."""
    if place.world_size > 1:
        environment.setdefault("RANK", str(place.rank))
        environment.setdefault("WORLD_SIZE", str(place.world_size))
        environment.setdefault("LOCAL_RANK", str(place.local_rank))
        environment.setdefault("LOCAL_WORLD_SIZE", str(place.local_world_size))


def meeting_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks meet: host and port.

    Raises UserError where the variables set several ranks but no address.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"RANK is {environment.get('RANK')} and WORLD_SIZE {environment.get('WORLD_SIZE')}, as under a launcher, "
            f"but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: {TO_TRAIN_ALONE}"
        )
    return environment["MASTER_ADDR"], _count(environment, "MASTER_PORT", highest=PORTS[-1])


def launcher_is_known(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or srun has started this rank. Without either its variables may be a shell's leftovers."""
    return "TORCHELASTIC_RUN_ID" in environment or _of_slurm(environment, "SLURM_STEP_NUM_TASKS", 1) > 1


def given_gpus(environment: Mapping[str, str]) -> tuple[int, str]:
    """How many GPUs of this node Slurm has given to the job, and the variable that tells; (0, "") where it gave none.

    No more count than CUDA_VISIBLE_DEVICES and its like list, which Slurm sets, for each task where it binds them.
    """
    if not environment.get("SLURM_JOB_ID"):
        return 0, ""
    listed = [number for name in VISIBLE_DEVICES if (number := _devices_listed(environment.get(name, "")))]
    for name, count in (
        ("SLURM_GPUS_ON_NODE", _devices_counted),
        ("SLURM_GPUS_PER_NODE", _devices_counted),
        ("SLURM_STEP_GPUS", _devices_listed),
        ("SLURM_JOB_GPUS", _devices_listed),
        ("CUDA_VISIBLE_DEVICES", _devices_listed),
    ):
        value = environment.get(name, "").strip()
        if value:
            found = min([count(value), *listed])
            return (found, f"{name}={value}") if found else (0, "")
    return 0, ""


def _devices_counted(value: str) -> int:
    """Of `8`, `a100:8` or `a100:4,v100:2`; 0 of anything else."""
    parts = [part.rpartition(":")[2] for part in value.split(",")]
    return sum(int(part) for part in parts if re.fullmatch(r"\d{1,4}", part, re.ASCII))


def _devices_listed(value: str) -> int:
    """Of `0,1`, `0-3` or names; 0 of what Slurm and people write for none (`NoDevFiles`, `-1`).

    Of a card's slices (MIG) a process sees one, whatever it is given.
    """
    if "MIG-" in value:
        return 1
    count = 0
    for part in value.split(","):
        span = re.fullmatch(r"(\d{1,4})-(\d{1,4})", part.strip(), re.ASCII)
        if span:
            count += max(0, int(span[2]) - int(span[1]) + 1)
        elif re.match(r"\d|GPU-", part.strip()):
            count += 1
    return count


def _count(environment: Mapping[str, str], name: str, default: int | None = None, **bounds: int) -> int:
    """A variable of torchrun's, whose default is for one that is not set; an empty one is a mistake."""
    if default is not None and name not in environment:
        return default
    return whole_number(name, advice=TO_TRAIN_ALONE, environment=environment, **bounds)


def _of_slurm(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    return whole_number(name, default, advice=TO_START_ANEW, environment=environment)


def _refuse_lonely_nodes(environment: Mapping[str, str], place: Place) -> None:
    """Raises UserError where an allocation of several nodes would train several models, or one of them twice."""
    step = "SLURM_STEP_ID" in environment
    nodes = _of_slurm(environment, "SLURM_STEP_NUM_NODES" if step else "SLURM_JOB_NUM_NODES", 1)
    if nodes == 1:
        return
    here = socket.gethostname()
    if place.world_size == 1:
        raise UserError(
            f"this process on {here} would train alone in an allocation of {nodes} nodes: start it with "
            "slurm/124m.sh or the like, or with srun on one node (srun --nodes=1 --ntasks=1 …)"
        )
    if "TORCHELASTIC_RUN_ID" not in environment:
        return
    tasks = _of_slurm(environment, "SLURM_STEP_NUM_TASKS", nodes)
    if tasks != nodes:
        raise UserError(
            f"{tasks} tasks on {nodes} nodes each started torchrun, which needs one task a node: "
            "--ntasks-per-node=1 (torchrun starts a rank for each GPU by itself)"
        )
    launchers = _count(environment, "GROUP_WORLD_SIZE", nodes)
    if launchers < nodes:
        raise UserError(
            f"torchrun on {here} knows of {launchers} of {nodes} nodes, so each would train alone: give it --nnodes="
            f"{nodes} and a meeting point, as slurm/node.sh does"
        )


def _tasks_here(environment: Mapping[str, str]) -> int:
    """This node's number in a list such as `2(x3),1`, which Slurm writes for tasks by node."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    node, passed = _of_slurm(environment, "SLURM_NODEID", 0), 0
    for part in (environment.get(name) or "1").split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,9})\))?", part, re.ASCII)
        if match is None:
            raise UserError(f"{name} is {environment[name]!r} in the environment, not a list of tasks: {TO_START_ANEW}")
        passed += int(match[2] or 1)
        if node < passed:
            return int(match[1])
    raise UserError(f"{name} has {passed} nodes and SLURM_NODEID is {node}, which Slurm never sets: {TO_START_ANEW}")


def place_of_this_process() -> Place:
    """Find the place from the process's own environment, and export it. Raises UserError as `find_place`."""
    place = find_place(os.environ)
    export_place(os.environ, place)
    return place
