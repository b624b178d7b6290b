"""Make a report of a run, or of several in the same plots: one HTML file and its pictures.

    python eval/report.py runs/demo
    python eval/report.py runs/short runs/long --out reports/lengths --json lengths.json

Works on a run that is still running. The page needs no network and no JavaScript.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.os_errors import refusal
from common.progress import format_duration
from common.publish import LEFT_SECONDS, sweep_temporaries, write_json_output, write_output
from common.regular_file import what_stands_at
from eval.reporting import figures
from eval.reporting.comparison import run_row
from eval.reporting.drawing import Picture
from eval.reporting.evaluation_pictures import evaluation_pictures
from eval.reporting.key_figures import differences, key_figures
from eval.reporting.layer_pictures import layer_pictures
from eval.reporting.page import page
from eval.reporting.rank_pictures import rank_pictures
from eval.reporting.run_data import RunData, load_runs, tell_complaints
from eval.reporting.source_pictures import source_pictures
from eval.reporting.step_profiles import profile_picture
from eval.shared.arguments import add_json


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Make a report of runs: one HTML file and its pictures.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, running or done")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes (default: the first run's report/)")
    add_json(parser, "key figures")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    runs = load_runs(arguments.runs)
    out: Path = arguments.out or runs[0].folder.report
    pictures = draw_all(runs)
    path = out / "report.html"
    for file in (path, *(out / name for name in pictures)):
        if (what := what_stands_at(file)) not in ("", "a file", "a link to nothing"):
            raise UserError(f"{file} is {what}, not a file: move it away, or give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(out, {*pictures, path.name}, older_than_seconds=LEFT_SECONDS)
        for name, picture in pictures.items():
            write_output(out / name, picture.png)
        write_output(path, page(runs, pictures, time.time()))
    except OSError as error:
        raise UserError(refusal("written", error, out, otherwise="give another folder with --out")) from None
    tell_complaints(runs)
    if arguments.json:
        write_json_output(arguments.json, as_json(runs))
    steps = sum(len(run.table) for run in runs)
    print(f"{path}: {steps:,} steps, {len(pictures)} pictures, in {format_duration(time.monotonic() - started)}")
    return 0


def draw_all(runs: Sequence[RunData]) -> dict[str, Picture]:
    """Every picture that the runs have figures for, by file name, in the order of the page."""
    pictures = figures.loss_pictures(runs)
    pictures |= figures.quantity_pictures(runs)
    pictures |= source_pictures(runs)
    pictures |= evaluation_pictures(runs)
    pictures |= layer_pictures(runs)
    pictures |= rank_pictures(runs)
    pictures["time.png"] = figures.time_picture(runs)
    if (profiles := profile_picture(runs)) is not None:
        pictures["profile.png"] = profiles
    return pictures


def as_json(runs: Sequence[RunData]) -> dict[str, object]:
    return {
        "runs": [
            key_figures(run).as_json()
            | {
                "alive": run.liveness.verdict,
                "data": run_row(run).data,
                "profiles": run.profiles,
                "bad_batches": run.bad_batches,
            }
            for run in runs
        ],
        "differences": dict(differences(runs)),
    }


if __name__ == "__main__":
    exit_on_user_error(main)
