"""What is kept of a run to compare it: plain data, read from its folder, or from its result file when that is gone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.curves import BUILT_IN, VALIDATION, Curve
from common.errors import UserError
from common.publish import finite_or_null
from common.run_files import read_configuration
from eval.reporting.key_figures import flatten
from eval.reporting.run_data import RunData, load_run

BITS = "val_bits_per_byte"
SECONDS_AN_HOUR = 3600.0
UNKNOWN_DEVICE = "unknown"
MOST_RECORDS = 200  # of validations, and of all other evaluations together
MOST_CHARACTERS = 200  # of a record's text
LEFT_OUT = ("time",)  # of records: hours are counted in steps
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """One run. Its records are whole, but for what is not a number, a flag or a short text.

    Attributes:
        config: by field, such as `optim.lr`; without `run.root`, as where a run lies says nothing about it.
        validations: those that were measured as the newest was; of many the last, the best, and others evenly.
        hours: in steps up to each of these, without validation, saving and pauses.
        evaluations: the records of the other curves, in the order of steps, thinned in the same way.
        curves: those of the run that are not built in.
        machine: the device of every rank that has trained it, sorted; empty where it is unknown or was not the same.
        step: the newest one.
        leaks: whether a validation found that earlier predictions depend on later tokens.
        memory_gib: the largest peak of a step. tokens_per_second: the median over steps.
        provenance: `version` and `revision` of the project, `changed` (whether the sources differed from it),
            `python`, `torch`, `started`, `starts` (how many).
    """

    config: dict[str, Any]
    validations: list[Record]
    hours: list[float]
    evaluations: list[Record]
    curves: list[Curve]
    machine: tuple[str, ...]
    max_steps: int | None
    step: int
    leaks: bool
    flops_per_token: int | None
    parameters: int | None
    memory_gib: float | None
    tokens_per_second: float | None
    provenance: dict[str, Any]


def read_folder(path: Path) -> RunFacts:
    """Raises UserError for a folder that is not a run, has no training step yet, or no configuration."""
    data = load_run(path)
    if not read_configuration(data.folder):  # which raises where it can't be read
        raise UserError(f"{data.folder.config} is missing: a comparison has to know what differs")
    validations = _thinned(data.table.comparable(VALIDATION.figure), (VALIDATION.figure, BITS), MOST_RECORDS)
    return RunFacts(
        config={name: value for name, value in finite_or_null(flatten(data.config)).items() if name != "run.root"},
        validations=[_kept(record) for record in validations],
        hours=_hours(data, [record["step"] for record in validations]),
        evaluations=_evaluations(data),
        curves=[curve for curve in data.table.curves if curve not in BUILT_IN],
        machine=_machine(data),
        max_steps=data.max_steps,
        step=data.newest("step"),
        leaks=data.leaks,
        flops_per_token=data.flops_per_token,
        parameters=data.parameters,
        memory_gib=_over_steps(data, "memory_gib", np.max),
        tokens_per_second=_over_steps(data, "tokens_per_second", np.median),
        provenance=_provenance(data.starts),
    )


def _evaluations(data: RunData) -> list[Record]:
    curves = [curve for curve in data.table.curves if curve != VALIDATION and data.table.of_kind(curve.figure)]
    most = MOST_RECORDS // max(1, len(curves))
    kept = {id(record) for curve in curves for record in
            _thinned(data.table.of_kind(curve.figure), (curve.figure,), most)}  # fmt: skip
    others = (record for record in data.table.events if VALIDATION.figure not in record)
    return [_kept(record) for record in others if id(record) in kept]


def _thinned(records: Sequence[Record], figures: Sequence[str], most: int) -> list[Record]:
    """About `most` of the records: evenly, with the last one and those of the lowest and the highest figures."""
    if len(records) <= most:
        return list(records)
    places = set(np.linspace(0, len(records) - 1, max(2, most)).round().astype(int).tolist())
    for figure in figures:
        values = [(record[figure], place) for place, record in enumerate(records) if record.get(figure) is not None]
        places |= {min(values)[1], max(values)[1]} if values else set()
    return [records[place] for place in sorted(places)]


def _kept(record: Record) -> Record:
    plain = {key: value for key, value in record.items() if key not in LEFT_OUT and _is_plain(value)}
    return dict(finite_or_null(plain))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MOST_CHARACTERS)


def _hours(data: RunData, steps: Sequence[int]) -> list[float]:
    seconds = np.cumsum(np.nan_to_num(data.table.column("step_seconds")))
    done = np.searchsorted(data.table.column("step"), np.array(steps, dtype=np.float64), side="right")
    return [float(seconds[count - 1]) / SECONDS_AN_HOUR if count else 0.0 for count in done.tolist()]


def _machine(data: RunData) -> tuple[str, ...]:
    found = {tuple(sorted(map(_device, start.get("ranks") or ()))) for start in data.starts}
    ranks = {life.world_size for life in data.table.lives}
    if len(found) != 1 or len(ranks) != 1 or not (machine := found.pop()) or len(machine) != ranks.pop():
        return ()
    return () if UNKNOWN_DEVICE in machine else machine


def _device(rank: Any) -> str:
    """A rank's GPU, or its processor with the number of threads."""
    if not isinstance(rank, dict):
        return UNKNOWN_DEVICE
    if rank.get("device", "cpu") == "cpu":
        return f"{rank['cpu']}, {rank.get('threads')} threads" if rank.get("cpu") else UNKNOWN_DEVICE
    return str(rank.get("gpu") or rank["device"])


def _over_steps(data: RunData, key: str, reduce: Callable[..., Any]) -> float | None:
    values = data.table.column(key)
    values = values[np.isfinite(values)]
    return float(reduce(values)) if len(values) else None


def _provenance(starts: Sequence[Record]) -> Record:
    if not starts:
        return {"starts": 0}
    last, packages = starts[-1], starts[-1].get("packages")
    return {
        "version": last.get("version"),
        "revision": last.get("revision"),
        "changed": bool(last.get("diff") or last.get("diff_lacks")),
        "python": last.get("python"),
        "torch": packages.get("torch") if isinstance(packages, dict) else None,
        "started": starts[0].get("time"),
        "starts": len(starts),
    }
