"""Compare runs with GPT-2, GPT-3 and Arcane: model, data, tokens, RoPE, losses, HellaSwag.

    python eval/compare.py
    python eval/compare.py runs/gpt2-124m runs/llama-124m --markdown

Without runs, those committed under records are shown whose tokens are GPT-2's. Of a run only what was
measured in it is shown, as far as it has come.
"""

import argparse
import contextlib
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT
from common.publish import write_json_output
from eval.reporting.comparison import as_markdown, as_text, rows_with
from eval.reporting.references import GPT2_VOCABULARY, NOTES
from eval.reporting.run_data import RunData, load_run, load_runs, tell_complaints
from eval.shared.arguments import add_json

RECORDS = PROJECT / "records"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Compare runs with GPT-2, GPT-3 and Arcane.")
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="folders of runs (default: the committed ones)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_json(parser, "rows")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    runs = load_runs(arguments.runs) if arguments.runs else committed_runs()
    tell_complaints(runs)
    rows = rows_with(runs)
    print(as_markdown(rows) if arguments.markdown else as_text(rows))
    print()
    for note in NOTES:
        print(note + ("\n" if arguments.markdown else ""))
    if arguments.json:
        write_json_output(arguments.json, {"models": [row.as_json() for row in rows], "notes": NOTES})
    return 0


def committed_runs() -> list[RunData]:
    """The runs in this project's records whose losses are per token of GPT-2's vocabulary."""
    runs = []
    for path in sorted(RECORDS.rglob("metrics.jsonl")):
        with contextlib.suppress(UserError):  # no run's own metrics
            runs.append(load_run(path.parent, path.parent.relative_to(RECORDS).as_posix()))
    return [run for run in runs if run.model is not None and run.model.vocab_size == GPT2_VOCABULARY]


if __name__ == "__main__":
    exit_on_user_error(main)
