"""Hostile inputs in numbers: mutated command lines, configurations and files, each given to an entry of the project.

    python tests/fuzz/campaign.py --inputs 2000 --seed 1 --json fuzz.json

Counts tracebacks, hangs, memory beyond 2 GiB, exit statuses other than 0, 2 and 130, and leftovers (temporary files,
processes, files changed by a command that refused). A case is made by its kind, the seed and its number: the failing
ones are printed with those, and run again by --only KIND:NUMBER, which keeps their folder.
"""

import importlib
import importlib.util
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.progress import progress_bar
from tests.fuzz.cases import Case
from tests.fuzz.judge import Verdict, run_case

KINDS = ("checkpoints", "command_lines", "yaml_files", "run_folders", "token_sets", "hugging_face")


def cases_of(kind: str, seed: int, count: int, bases: Path) -> Iterator[Case]:
    """The first `count` cases of a kind, the same for the same seed."""
    module = importlib.import_module(f"tests.fuzz.{kind}")
    bases = bases / kind
    if not bases.exists():
        bases.mkdir(parents=True)
        module.prepare(bases)
    yield from module.cases(random.Random(f"{kind}-{seed}"), count, bases)


def run_cases(numbered: list[tuple[str, Case]], folder: Path, jobs: int) -> Iterator[tuple[str, Verdict]]:
    """Run cases side by side; yields (number, verdict) in the order of the cases."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(
            (number for number, _ in numbered),
            pool.map(lambda item: run_case(item[1], folder / item[0].replace(":", "-")), numbered),
            strict=True,
        )


def counts(verdicts: list[Verdict]) -> dict[str, dict[str, int]]:
    """By kind: inputs, how they ended, and faults."""
    found: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        row = found.setdefault(verdict.case.kind, Counter())
        row["inputs"] += 1
        row[f"status {verdict.status}"] += 1
        for fault in ("traceback", "hang", "memory", "status", "leftovers"):
            row[fault] += verdict.fault == fault
    return {kind: dict(row) for kind, row in found.items()}


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("--inputs", type=int, default=600, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--jobs", type=int, default=3, help="at once")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="run this one, and keep its folder")
    parser.add_argument("--json", type=Path, help="write counts and faults here")
    a = parser.parse_args()
    if a.inputs < 1 or a.jobs < 1:
        raise UserError("--inputs and --jobs must be 1 or more")
    if importlib.util.find_spec("transformers") is None:  # makes what some kinds begin with
        raise UserError("the test tools are not here: 'make dev-environment' adds them to .venv")
    kinds = [a.only.partition(":")[0]] if a.only else list(a.kinds)
    folder = Path(tempfile.mkdtemp(prefix="longhaul-fuzz-"))
    numbered = [
        (f"{kind}:{number}", case)
        for kind in kinds
        for number, case in enumerate(cases_of(kind, a.seed, -(-a.inputs // len(kinds)), folder / "bases"))
    ]
    if a.only:
        numbered = [item for item in numbered if item[0] == a.only]
    verdicts, faults = [], []
    bar = progress_bar(len(numbered), "input", "fuzzing")
    for number, verdict in run_cases(numbered, folder, a.jobs):
        bar.update(1)
        verdicts.append(verdict)
        if verdict.fault or a.only:
            faults.append(_row(number, verdict))
            bar.clear()
            print(f"{number} {verdict.fault or 'well'} ({verdict.seconds:.0f} s): {verdict.case.label}\n"
                      f"  {' '.join(verdict.case.arguments)[:300]}\n  {verdict.detail}", flush=True)  # fmt: skip
    bar.close()
    result = {"seed": a.seed, "inputs": len(verdicts), "counts": counts(verdicts), "faults": faults}
    print(json.dumps(result["counts"], indent=1))
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(bool(verdict.fault) for verdict in verdicts)} of {len(verdicts)} inputs fell; their folders: {folder}")
    return int(any(verdict.fault for verdict in verdicts))


def _row(number: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "number": number,
        "label": verdict.case.label,
        "arguments": verdict.case.arguments,
        "fault": verdict.fault,
        "status": verdict.status,
        "detail": verdict.detail,
        "seconds": round(verdict.seconds, 1),
    }


if __name__ == "__main__":
    exit_on_user_error(main)
