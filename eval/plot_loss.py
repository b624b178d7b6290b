"""Draw a run's training and validation loss, with the learning rate below: RUN/report/loss.png.

    python eval/plot_loss.py runs/demo

Works on a run that is still running. `eval/report.py` shows much more.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.measured import NOT_CAUSAL
from common.publish import file_to_write, write_output
from common.regular_file import what_stands_at
from eval.reporting import drawing, figures
from eval.reporting.key_figures import key_figures
from eval.reporting.run_data import RunData, load_run, tell_complaints


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Draw a run's training and validation loss and its learning rate.")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/demo; running or done")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the PNG goes (default: RUN/report/loss.png)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    run = load_run(arguments.run)
    path = file_to_write(arguments.out or run.folder.report / "loss.png")
    if arguments.out is None and (what := what_stands_at(path)) not in ("", "a file", "a link to nothing"):
        raise UserError(f"{path} is {what}, not a file: move it away, or give --out")
    write_output(path, draw(run))
    tell_complaints([run])
    left_out = len(run.table.of_kind("val_loss")) - len(run.table.comparable("val_loss"))
    others = f"; {left_out:,} earlier validations of another measure left out" if left_out else ""
    told = "".join(f", {fact}" for fact in facts(run))
    print(f"{path}: loss and learning rate up to step {run.newest('step'):,}{told}{others}")
    return 0


def facts(run: RunData) -> list[str]:
    """What the curves don't show."""
    figures = key_figures(run)
    flops = [] if figures.flops is None else [f"{figures.flops:.3g} training FLOPs"]
    bits = [] if figures.val_bits_per_byte is None else [f"{figures.val_bits_per_byte:.4f} bits per byte of text"]
    return [*flops, *bits, *([NOT_CAUSAL] if run.leaks else [])]


def draw(run: RunData) -> bytes:
    """The figure as a PNG."""
    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(8, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        figures.loss_panel(above, [run], drawing.TOKENS)
        figures.mark_restarts(above, [run], drawing.TOKENS)
        above.set_xlabel("")
        above.legend(loc="upper center", bbox_to_anchor=(0.55, 1.0))
        figure.suptitle(drawing.short(run.name, 80), x=0.01, ha="left", fontweight="bold")
        figure.supxlabel(", ".join(facts(run)), fontsize=8, color=drawing.GREY)
        below.plot(*drawing.thinned(run.table.column("tokens"), run.table.column("lr"), drawing.TOKENS),
                   color=drawing.GREY, linewidth=1.4)  # fmt: skip
        below.set_ylabel("learning rate")
        drawing.set_x(below, drawing.TOKENS)
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.set_ylim(bottom=0)
        steps = above.secondary_xaxis("top", functions=(run.steps_at, run.tokens_at))
        steps.set_xlabel("steps")
        steps.xaxis.set_major_formatter(FuncFormatter(lambda step, _: drawing.plain(step)))
        figure.align_ylabels()
        return drawing.to_png(figure)


if __name__ == "__main__":
    exit_on_user_error(main)
