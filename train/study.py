"""Train what a study lacks, report it, or compare groups of runs: is B better than A, and how sure is that.

    python train/study.py STUDY.yaml --dry-run
    python train/study.py STUDY.yaml
    python train/study.py STUDY.yaml --slurm "--gpus-per-node 1 --cpus-per-node 12 --time 4:00:00"
    python train/study.py STUDY.yaml --report [--baseline NAME]
    python train/study.py --compare A=runs/a1,runs/a2,runs/a3 B=runs/b1,runs/b2,runs/b3

A study is one file: a base configuration, variants, seeds, budgets and sizes. Each run is an ordinary one. The command
may be killed at any time; given again, it trains what is missing. A group to compare is one configuration with several
seeds; its runs' folders are read, of older runs, too, or the small result files that a study keeps. Choose the metric
and the number of seeds before you look at results: docs/studies.md explains the figures and what they can't show.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.publish import write_json_output
from eval.shared.arguments import add_json

COMPARING = ("metric", "paired", "json")
STUDYING = ("out", "report", "dry_run", "jobs", "threads", "keep_checkpoints", "slurm", "again")


def parse_arguments() -> argparse.Namespace:
    """Raises UserError for options of the one use in the other."""
    parser = CommandParser(__doc__)
    parser.add_argument("study", nargs="?", type=Path, metavar="STUDY.yaml", help="the study to train or to report")
    study = parser.add_argument_group("a study")
    study.add_argument("--out", type=Path, metavar="FOLDER", help="the study's folder; default: where STUDY.yaml is")
    study.add_argument("--dry-run", action="store_true", help="show the runs and what they cost")
    study.add_argument("--report", action="store_true", help="write the report of what is done, and train nothing")
    study.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: one for each GPU, or core")
    study.add_argument("--threads", type=int, metavar="N", help="of each run; default: 1 on CPUs")
    study.add_argument("--keep-checkpoints", action="store_true", help="of finished runs, to continue or sample from")
    study.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="submit what is missing as a job array by slurm/submit.py with these options of it, and don't wait",
    )
    study.add_argument("--again", action="store_true", help="with --slurm: also submit runs that have failed")
    compare = parser.add_argument_group("groups of runs")
    compare.add_argument(
        "--compare",
        nargs="+",
        metavar="NAME=RUN,RUN,…",
        help="the groups, each with its runs' folders or files",
    )
    compare.add_argument(
        "--baseline",
        metavar="NAME",
        help="default: baseline or base, else the first in the alphabet; with --report another variant of the study",
    )
    compare.add_argument(
        "--metric",
        help="final (default) or best validation loss, or a figure that the runs record, such as hellaswag_acc_norm",
    )
    compare.add_argument("--paired", action="store_true", help="compare runs in pairs of the same seed")
    add_json(compare)
    arguments = parser.parse_args()
    if (arguments.study is None) == (arguments.compare is None):
        raise UserError("give a STUDY.yaml, or --compare NAME=RUN,RUN,… (see --help)")
    for name in COMPARING if arguments.compare is None else STUDYING:
        if getattr(arguments, name) not in (None, False):
            owner = "--compare" if arguments.compare is None else "a STUDY.yaml"
            raise UserError(f"--{name.replace('_', '-')} is for {owner}: leave it out, or see --help")
    if arguments.study is not None and arguments.baseline is not None and not arguments.report:
        raise UserError("--baseline is for --compare and --report: name the study's own in its file")
    if arguments.slurm is not None and (arguments.jobs or arguments.threads):
        raise UserError('--jobs and --threads are for this machine: use --slurm "--at-once N --cpus-per-node N"')
    if arguments.again and arguments.slurm is None:
        raise UserError("--again is for --slurm: without it, each start tries failed runs again")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.compare is not None:
        return compare_groups(arguments)
    if arguments.report:
        return report(arguments)
    from train.studies.command import train_study

    return train_study(arguments)


def compare_groups(arguments: argparse.Namespace) -> int:
    from eval.comparison.comparing import as_text, compare  # scipy takes its time
    from eval.comparison.run_groups import parse_groups
    from train.studies.older_runs import option_defaults

    groups = parse_groups(arguments.compare)
    found = compare(
        groups,
        baseline=arguments.baseline,
        metric=arguments.metric or "final",
        in_pairs=arguments.paired,
        defaults=option_defaults(),
    )
    print(as_text(found))
    if arguments.json:
        write_json_output(arguments.json, found.as_json())
    return 0


def report(arguments: argparse.Namespace) -> int:
    from eval.comparison.study_output import as_text, write_report
    from train.studies.reading import folder_of, read_study

    folder = folder_of(arguments.study, arguments.out)
    study = read_study(arguments.study, arguments.out)
    if arguments.baseline not in (None, study.baseline):
        study = study.against(arguments.baseline)
        folder /= f"against-{study.baseline}"
    print(as_text(write_report(study, folder)))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
