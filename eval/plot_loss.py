"""Draw a run's training and validation loss, with the learning rate below: RUN/report/loss.png.

    python eval/plot_loss.py runs/demo

Works on a run that is still going.
"""

import argparse
import io
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError, exit_on_user_error
from common.metrics_file import read_metrics, record_kind
from common.progress import format_count
from common.publish import write_whole
from common.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

TRAINING, VALIDATION, GREY = "#3b6fb6", "#d1495b", "#666666"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a run's training and validation loss and its learning rate.")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/demo; still going or done")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the PNG goes (default: RUN/report/loss.png)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    folder = RunFolder(arguments.run)
    records = read_metrics(folder.metrics)
    if not any("loss" in record for record in records):
        raise UserError(f"{folder.metrics} has no training steps: is this a run's folder, and has the run begun?")
    path: Path = arguments.out or folder.report / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, draw(records, arguments.run.resolve().name))
    print(f"{path}: loss and learning rate up to step {records[-1]['step']:,}")
    return 0


def draw(records: list[dict[str, Any]], title: str) -> bytes:
    """The figure as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    train = [record for record in records if record_kind(record) == "train"]
    validation = [record for record in records if record_kind(record) == "validation"]
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    draw_loss(above, train, validation)
    mark_resumes(above, records, tokens_per_step(train))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    below.plot(column(train, "tokens"), column(train, "lr"), color=GREY, linewidth=1.4)
    below.set_ylabel("learning rate")
    below.set_xlabel("training tokens")
    finish_axes(figure, above, below, tokens_per_step(train))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    return picture.getvalue()


def draw_loss(axes: "Axes", train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    tokens, loss = column(train, "tokens"), column(train, "loss")
    axes.plot(tokens, loss, color=TRAINING, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(loss, max(1, len(loss) // 40)), color=TRAINING, linewidth=1.8, label="training, smoothed")
    if validation:
        tokens, loss = column(validation, "tokens"), column(validation, "val_loss")
        axes.plot(tokens, loss, "o-", color=VALIDATION, linewidth=1.4, markersize=4, label="validation")
        axes.annotate(
            f"{loss[-1]:.3f}", (tokens[-1], loss[-1]), (0, 8), textcoords="offset points", ha="right", color=VALIDATION
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def mark_resumes(axes: "Axes", records: list[dict[str, Any]], step_tokens: float) -> None:
    """A tick at the foot of the axes wherever the run went on after a stop."""
    resumed = [record["step"] * step_tokens for record in records if record_kind(record) == "start" and record["step"]]
    if resumed:
        foot = np.zeros(len(resumed))
        axes.plot(
            resumed, foot, "|", color="black", markersize=14, label="resumed", transform=axes.get_xaxis_transform()
        )
        axes.legend(frameon=False)


def finish_axes(figure: "Figure", above: "Axes", below: "Axes", step_tokens: float) -> None:
    from matplotlib.ticker import FuncFormatter

    below.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    to_steps, to_tokens = partial(np.multiply, 1 / step_tokens), partial(np.multiply, step_tokens)
    steps = above.secondary_xaxis("top", functions=(to_steps, to_tokens))
    steps.set_xlabel("steps")
    steps.xaxis.set_major_formatter(FuncFormatter(lambda step, _: format_count(step)))
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["right"]].set_visible(False)
        axes.margins(x=0.01)
    below.spines[["top"]].set_visible(False)
    below.set_ylim(bottom=0)
    figure.align_ylabels()


def column(records: list[dict[str, Any]], key: str) -> Values:
    """One value a record as float64, NaN where it is missing or was not finite (null)."""
    return np.array([record.get(key) for record in records], dtype=np.float64)


def tokens_per_step(train: list[dict[str, Any]]) -> float:
    return float(train[-1]["tokens"] / train[-1]["step"])


def smooth(values: Values, radius: int) -> Values:
    """The mean over `radius` values to each side: it does not lag. NaN values count for nothing.

    At the start, where loss falls fast, it reaches no further ahead than back.
    """
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    index = np.arange(len(values))
    reach = np.minimum(radius, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    count = counts[high] - counts[low]
    return np.divide(sums[high] - sums[low], count, out=np.full(len(values), np.nan), where=count > 0)


if __name__ == "__main__":
    exit_on_user_error(main)
