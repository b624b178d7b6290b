"""Try everything on one GPU in three calls of under ten minutes, with what was predicted beside what came.

    python train/benchmarks/gpu_campaign.py --part 1 --out campaign --seconds 560
    python train/benchmarks/gpu_campaign.py --part 1 --out campaign --tiny

Part 1 asks whether all of it is right, part 2 where the time of 124M goes, part 3 that of 1.3B. Each check is a process
with its own limit. DIR/part-N.json is rewritten after each; what fails has its last lines there, and the other
checks run all the same. It needs no network and no git.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.os_errors import refusal
from common.paths import PROJECT
from train.benchmarks.campaign.checks import CHECKS
from train.benchmarks.campaign.running import Campaign
from train.benchmarks.campaign.summary import line_of, table

MADE = PROJECT / "data" / "docstrings"  # by data_prep/docstrings.py, and carried along


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--part", type=int, choices=[1, 2, 3], required=True, help="which checks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where part-N.json and traces go")
    parser.add_argument(
        "--seconds", type=float, default=560.0, metavar="N", help="for all of the part's checks (default: 560)"
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks of the part, and facts and data")
    parser.add_argument(
        "--tiny", action="store_true", help="every check with tiny sizes, on the CPU, in a minute or two"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a token set, made if missing (default: data/docstrings, if there)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="a local disk with 40 GB for runs and caches, which are deleted at "
        "the end (default: where temporary files go)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    names = [check.name for check in CHECKS if check.part == arguments.part]
    if unknown := sorted(set(arguments.only or ()) - set(names)):
        raise UserError(f"--only {unknown[0]}: part {arguments.part} has {', '.join(names)}")
    if arguments.seconds <= 0:
        raise UserError(f"--seconds is {arguments.seconds:g}: give more than 0")
    if not arguments.tiny:
        refuse_without_gpu()
    try:
        for folder in filter(None, (arguments.out, arguments.work)):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(refusal("made", error, folder)) from None
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=arguments.work, ignore_cleanup_errors=True) as work:
        return run(arguments, Path(work).resolve())


def refuse_without_gpu() -> None:
    """Raises UserError: a CPU would be at such sizes for hours."""
    from model.devices import visible_gpus  # here, as it imports torch

    if visible_gpus() == 0:
        raise UserError("PyTorch sees no GPU here: --tiny runs the checks on the CPU, with tiny sizes")


def run(arguments: argparse.Namespace, work: Path) -> int:
    """0 where nothing failed and nothing is beyond its limits."""
    only = arguments.only and {"facts", "data", *arguments.only}
    data = work / "tokens" if arguments.tiny or not (MADE / "manifest.json").exists() else MADE
    campaign = Campaign(
        part=arguments.part,
        checks=[check for check in CHECKS if not only or check.name in only],
        out=arguments.out.resolve(),
        work=work,
        data=data if arguments.data is None else arguments.data.resolve(),
        seconds=arguments.seconds,
        tiny=arguments.tiny,
        on_change=show,
    )
    record = campaign.run()
    print(table(record))
    return int(any(row["status"] in ("failed", "off", "out of time") for row in record["checks"]))


def show(row: dict[str, Any]) -> None:
    print(line_of(row), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
