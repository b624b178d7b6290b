"""A run's result file: small JSON that stands for its folder in comparisons and studies, without its checkpoints.

Records are kept as tables: what is the same in all of them once, the rest by column.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.curves import Curve, read_curve
from common.errors import UserError
from common.json_file import BadJson, Count, Finite, Positive, read_json_for_user
from common.metric_fields import mended
from common.metrics_file import to_line
from common.publish import canonical_json, write_whole
from eval.comparison.run_facts import Record, RunFacts

FORMAT = 1
Scalar = int | float | str | bool | None
ADVICE = "name the run's folder, or train it again"


@dataclass(frozen=True)
class Table:
    """Consecutive records of the same keys, as many as `count`."""

    count: Positive
    same: dict[str, Scalar]
    columns: dict[str, list[Scalar]]


@dataclass(frozen=True)
class ResultFile:
    """The contents of such a file; see `RunFacts`."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    config: dict[str, Any]
    validations: list[Table]
    hours: list[Finite]
    evaluations: list[Table]
    curves: list[Curve]
    machine: tuple[str, ...]
    max_steps: Count | None
    step: Count
    leaks: bool
    flops_per_token: Count | None
    parameters: Count | None
    memory_gib: Finite | None
    tokens_per_second: Finite | None
    provenance: dict[str, Scalar]


def write_facts(path: Path, facts: RunFacts) -> None:
    """Publish a result file, a line for each of its keys. Raises OSError."""
    found = {field.name: getattr(facts, field.name) for field in fields(facts) if field.name in _NAMES}
    found |= {name: [asdict(table) for table in _tables(found[name])] for name in ("validations", "evaluations")}
    found |= {"curves": [curve.as_json() for curve in facts.curves]}
    lines = [to_line({key: value}).decode().strip()[1:-1] for key, value in ({"format": FORMAT} | found).items()]
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


_NAMES = {field.name for field in fields(RunFacts)}  # what a class derived from it has besides is not kept


def read_facts(path: Path) -> RunFacts:
    """Raises UserError for a file that can't be read or is none, and FileNotFoundError."""
    found = read_json_for_user(path, ResultFile, ADVICE)
    try:
        curves = [read_curve(curve.as_json()) for curve in found.curves]
        validations, evaluations = (_records(tables) for tables in (found.validations, found.evaluations))
        if len(found.hours) != len(validations):
            raise BadJson(f"hours: there are {len(found.hours)} of {len(validations)} validations")
    except BadJson as error:
        raise UserError(f"{path} is damaged ({error}): {ADVICE}") from None
    others = {name: getattr(found, name) for name in _NAMES}
    return RunFacts(**others | {"curves": curves, "validations": validations, "evaluations": evaluations})


def _tables(records: Sequence[Record]) -> list[Table]:
    groups: list[list[Record]] = []
    for record in records:
        if groups and list(groups[-1][0]) == list(record):
            groups[-1].append(record)
        else:
            groups.append([record])
    return [_table(group) for group in groups]


def _table(records: Sequence[Record]) -> Table:
    same, columns = {}, {}
    for key in records[0]:
        values = [record[key] for record in records]
        if len(set(map(canonical_json, values))) == 1:
            same[key] = values[0]
        else:
            columns[key] = values
    return Table(len(records), same, columns)


def _records(tables: Sequence[Table]) -> list[Record]:
    """Raises BadJson for tables that are no records of a run."""
    records = []
    for table in tables:
        if wrong := [key for key, values in table.columns.items() if len(values) != table.count]:
            raise BadJson(f"columns.{wrong[0]}: there are not {table.count} values")
        for row in range(table.count if table.columns else min(table.count, 1)):
            record = mended(table.same | {key: values[row] for key, values in table.columns.items()})
            if record is None:
                raise BadJson("a record has no step")
            records.append(record)
    return records
