"""The study's table and figures out of its recorded runs: results.json, curves.png, positions.png and bars.png.

python records/2026-11-22-tiny-shakespeare/draw.py [FOLDER]
"""

import io
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(HERE.parents[1])

import yaml

from common.errors import UserError, exit_on_user_error
from common.metrics_file import read_metrics, record_kind
from common.publish import write_json_whole, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORTED = 1.02  # LLM-Explorations' validation loss
BLUES, GREY = ("#1f4e8c", "#3b6fb6", "#7fa6d9"), "#888888"
COLOURS = {  # red: sees the future
    "positions-norm-seed1": "#e58a96",
    "reported-positions-seed1": "#c0303f",
    "reported-token-seed1": "#8a6fb0",
    "best": "#3a8f5c",
}


def main() -> int:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    runs = {path.parent.name: recorded(path.parent) for path in sorted((out / "runs").glob("*/measured.json"))}
    if not runs:
        raise UserError(f"{out} has no measured runs: start regenerate.py")
    write_json_whole(out / "results.json", {"runs": runs, "causal_seeds": over_seeds(runs)})
    validations = {name: validation_curve(out / "runs" / name) for name in runs}
    write_whole(out / "curves.png", curves(runs, validations))
    write_whole(out / "positions.png", positions(runs))
    write_whole(out / "bars.png", bars(runs))
    print_table(runs)
    return 0


def recorded(folder: Path) -> dict[str, Any]:
    """A run's measurements beside what its configuration and record say."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    figures: dict[str, Any] = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    validations = validation_curve(folder)
    best_step, best = min(validations, key=lambda point: point[1])
    return figures | {
        "of_steps": config["run"]["max_steps"],
        "characters": figures["step"] * config["batch"]["tokens_per_step"],
        "validation_in_training": validations[-1][1],
        "lowest_validation_in_training": best,
        "lowest_validation_step": best_step,
    }


def over_seeds(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of the causal model that ran to the end."""
    done = [run for name, run in runs.items() if name.startswith("causal-") and run["step"] == run["of_steps"]]
    summary: dict[str, Any] = {"complete": len(done)}
    for key in ("loss", "last_position_loss"):
        values = [run[key] for run in done]
        if values:
            summary[f"{key}_mean"] = statistics.mean(values)
            summary[f"{key}_standard_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return summary


def validation_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every validation."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(item["step"], item["val_loss"]) for item in records if record_kind(item) == "validation"]


def colour(name: str) -> str:
    if name.startswith("causal-seed"):
        return BLUES[(int(name.removeprefix("causal-seed")) - 1) % len(BLUES)]
    return COLOURS[name]


def curves(runs: dict[str, dict[str, Any]], validations: dict[str, list[tuple[int, float]]]) -> bytes:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in validations.items():
        steps, losses = zip(*points[1:] or points, strict=True)  # the first is before training
        step_characters = runs[name]["characters"] / runs[name]["step"]
        millions = [step * step_characters / 1e6 for step in steps]
        axes.plot(millions, losses, "o-", markersize=3, linewidth=1.5, color=colour(name), label=name)
    axes.axhline(REPORTED, color=GREY, linestyle="--", linewidth=1, label=f"reported: {REPORTED}")
    axes.set_ylim(0.95, 2.2)
    axes.set_xlabel("characters read (millions; the text has 1.0)")
    axes.set_ylabel("validation loss, all positions (nats per character)")
    return finished(figure, axes, "Tiny Shakespeare: a norm over positions sees the future")


def positions(runs: dict[str, dict[str, Any]]) -> bytes:
    """Loss at each position of the windows, for the runs of the most common context."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    length = statistics.mode(run["context"] for run in runs.values())
    for name, run in runs.items():
        if run["context"] == length:
            places = range(1, length + 1)
            axes.plot(
                places, run["loss_by_position"], "o-", markersize=3, linewidth=1.5, color=colour(name), label=name
            )
    axes.set_xlabel("position in the window (characters of context)")
    axes.set_ylabel("validation loss (nats per character)")
    axes.set_ylim(bottom=0.7)
    return finished(figure, axes, "A model that sees the window's rest is good until nothing is left to see")


def bars(runs: dict[str, dict[str, Any]]) -> bytes:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    ends = [f"{name.replace('-', chr(10))}\n{run['step']:,} steps" for name, run in runs.items()]
    for shift, key, label, alpha in (
        (-0.2, "loss", "all positions", 1.0),
        (0.2, "last_position_loss", "only the last position", 0.55),
    ):
        places = [index + shift for index in range(len(runs))]
        heights = [run[key] for run in runs.values()]
        drawn = axes.bar(places, heights, 0.38, color=[colour(name) for name in runs], alpha=alpha, label=label)
        axes.bar_label(drawn, fmt="%.3f", fontsize=8)
    axes.bar([len(runs)], [REPORTED], 0.38, color=GREY)
    axes.annotate(f"{REPORTED}", (len(runs), REPORTED), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(runs) + 1), [*ends, "reported"], fontsize=8)
    axes.set_ylabel("validation loss (nats per character)")
    axes.set_ylim(0, 2.15)  # room for the legend
    return finished(figure, axes, "All positions, and the last one, which has no future to see")


def finished(figure: "Figure", axes: "Axes", title: str) -> bytes:
    from matplotlib import pyplot

    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    pyplot.close(figure)
    return picture.getvalue()


def print_table(runs: dict[str, dict[str, Any]]) -> None:
    print("| run | parameters | steps | all positions | last position | lowest on the way | earlier logits moved by |")
    print("|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        last = f"{run['last_position_loss']:.4f} ± {run['last_position_standard_error']:.3f}"
        lowest = f"{run['lowest_validation_in_training']:.4f} at {run['lowest_validation_step']:,}"
        print(
            f"| {name} | {run['parameters']:,} | {run['step']:,} of {run['of_steps']:,} | {run['loss']:.4f} "
            f"| {last} | {lowest} | {run['earlier_logits_moved_most']:.3g} |"
        )


if __name__ == "__main__":
    exit_on_user_error(main)
