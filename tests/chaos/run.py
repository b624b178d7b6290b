"""Kill, signal, starve and corrupt the real trainer, and compare what is left with an undisturbed run.

    python tests/chaos/run.py --faults 220 --seed 1 --json chaos.json

Each fault hits a run of gloo ranks (two by default) under the real launcher; the same command then goes on. A run that
is done is compared with an undisturbed one, step by step and tensor by tensor, to the bit. Exit status 1 if anything
differs, a run is lost, a process is left over, or a fault is met otherwise than promised. Linux only.

With several `--ranks` each start has another number of them. What such a run reads is compared exactly with an
undisturbed run of one rank, its losses within a tolerance.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.progress import format_duration
from common.publish import write_json_whole
from tests.chaos import plan, preloaded
from tests.chaos.campaign import Campaign
from tests.chaos.disk import mount_memory, own_mounts
from tests.chaos.kind import Kind
from tests.chaos.marks import OwnMark
from tests.chaos.phases import MARK_VARIABLE, NO_MARK
from tests.chaos.rows import describe, table

DISK_MIB = 64


def main() -> int:
    arguments = _arguments()
    if os.environ.get(MARK_VARIABLE) != NO_MARK:  # forks write their mark over this one: it must be there from exec on
        environment = {**os.environ, MARK_VARIABLE: NO_MARK, "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    kind = Kind(arguments.spikes, arguments.mix, arguments.branches, arguments.adapters, tuple(arguments.ranks))
    without = set(arguments.without)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="chaos-")).resolve()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    notes = []
    if not (own_mounts() and mount_memory(folder / "runs", DISK_MIB)):
        notes.append("no disk of its own may be mounted here: no fault fills it")
        without.add(plan.DISK_FULL)
    forks = arguments.executed_share < 1
    if forks:
        preloaded.preload()
    faults = plan.draw(
        arguments.faults,
        arguments.seed,
        only=arguments.only,
        without=without,
        executed_share=arguments.executed_share,
        ranks=kind.ranks,
    )
    report = Report(arguments.json, len(faults), notes, {"seed": arguments.seed})
    campaign = Campaign(
        folder, folder / "runs", faults, OwnMark() if forks else None, report.update, arguments.option, kind
    )
    report.campaign = campaign
    campaign.proceed()
    return report.finish()


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--faults", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn (default 1)")
    parser.add_argument("--json", type=Path, help="the report, rewritten after each fault")
    parser.add_argument("--folder", help="where logs, data and bad runs stay (default: a new temporary one)")
    kinds = sorted({kind for kind, _ in plan.WEIGHTS})
    parser.add_argument("--only", action="append", default=[], choices=kinds, help="only this kind; repeatable")
    parser.add_argument("--without", action="append", default=[], choices=kinds, help="not this kind; repeatable")
    parser.add_argument("--spikes", action="store_true", help="every run has loss spikes, and is rolled back past them")
    parser.add_argument("--mix", action="store_true", help="every run reads a staged mix of three sets, packed whole")
    parser.add_argument("--branches", action="store_true", help="with --mix: every run is a branch of one on one set")
    parser.add_argument(
        "--adapters", action="store_true", help="every run tunes adapters and the rows of new ids on conversations"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[2],
        help="of a start; of several numbers each has another, and losses are compared within a tolerance (default 2)",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of every trainer; repeatable"
    )
    parser.add_argument(
        "--executed-share",
        type=float,
        default=0.25,
        help="of starts by exec; the others are forks of a process that has imported everything (default 0.25)",
    )
    arguments = parser.parse_args()
    if arguments.branches and not arguments.mix:
        raise UserError("--branches needs --mix")
    if arguments.adapters and (arguments.mix or arguments.spikes):
        raise UserError("--adapters is for runs on one set of conversations: leave out --mix and --spikes")
    if arguments.spikes and len(arguments.ranks) > 1:
        raise UserError("--spikes is compared to the bit: use one number of --ranks")
    return arguments


class Report:
    """Progress lines, the JSON file, the table at the end."""

    def __init__(self, file: Path | None, total: int, notes: list[str], facts: dict[str, object]) -> None:
        self.campaign: Campaign | None = None
        self._file = file
        self._total = total
        self._facts = {**facts, "notes": notes}
        self._told = 0
        self._started = time.monotonic()
        for note in notes:
            print(note, flush=True)

    def update(self) -> None:
        """Tell of new rows and write the report so far."""
        if self.campaign is None:
            return
        for row in self.campaign.rows[self._told :]:
            self._told += 1
            left = (time.monotonic() - self._started) / self._told * (self._total - self._told)
            print(f"[{self._told:3}/{self._total}] {describe(row)} | ETA {format_duration(left)}", flush=True)
        if self._file is not None:
            seconds = round(time.monotonic() - self._started, 1)
            write_json_whole(self._file, {**self.campaign.summary(), **self._facts, "seconds": seconds})

    def finish(self) -> int:
        """Write everything; return the exit status."""
        assert self.campaign is not None
        self.update()
        summary = self.campaign.summary()
        print("\n" + table(self.campaign.rows))
        for row in self.campaign.rows:
            if not row.ok:
                print(f"FAILED {describe(row)}")
        for complaint in [*self.campaign.complaints, *self.campaign.lost_runs]:
            print(f"FAILED {complaint}")
        differing = defaultdict(list)
        for name, step in self.campaign.differing_steps:
            differing[name].append(step)
        for name, steps in differing.items():
            print(f"FAILED {name}: steps {steps} differ")
        print(
            f"{summary['faults']} faults on {summary['runs']} runs: {summary['differing_steps']} differing steps, "
            f"{summary['lost_runs']} lost runs, {summary['failed_rows']} met otherwise than promised"
        )
        counts = ("differing_steps", "lost_runs", "failed_rows")
        return int(any(summary[name] for name in counts) or bool(summary["complaints"]))


if __name__ == "__main__":
    exit_on_user_error(main)
