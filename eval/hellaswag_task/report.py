"""HellaSwag's questions answered by a checkpoint, and reported with the published scores that compare."""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np

from common.progress import format_duration, progress_bar
from common.publish import write_json_output
from eval.hellaswag_task.contamination import Contamination, Side
from eval.hellaswag_task.examples import FULL_SIZE, HellaSwag
from eval.hellaswag_task.metrics import Accuracy, Choices, Metric, accuracy, build_questions, choose_all
from eval.hellaswag_task.multiple_choice import BatchSize, left_out_note, trunk_share, with_room
from eval.shared.loading import Loaded, evaluation_dtype, load_checkpoint, start_evaluation
from model.ranks import Ranks

COMPARABLE = {
    "acc": "build-nanogpt's acc; not lm-eval's, whose prompt differs",
    "acc_norm": "GPT-2 124M 0.2945, nanoGPT and its kin, GPT-3's paper",
    "acc_norm_chars": "lm-eval's acc_norm",
}
NOT_COMPARABLE = "nothing published: the text form's contexts are used as they are"


def evaluate(arguments: argparse.Namespace, data: HellaSwag, contamination: Contamination | None = None) -> None:
    """Evaluate as eval/hellaswag.py's arguments ask, and print the scores. Raises UserError. All ranks call."""
    ranks = start_evaluation(arguments.device)
    arguments.dtype = evaluation_dtype(arguments.dtype, ranks.device)
    loaded = load_checkpoint(arguments.run, ranks.device, ranks, weights=arguments.weights)
    started = time.monotonic()
    questions = build_questions(data.examples, loaded.tokenizer)
    pairs = list(zip(questions.plain, questions.harness, strict=True))
    numbers = with_room(pairs, loaded.model.config.block_size)
    asked = replace(data, examples=tuple(data.examples[number] for number in numbers))
    choices = answer(loaded, asked, ranks, arguments)
    seconds = time.monotonic() - started
    if ranks.is_first:
        accuracies = {metric: accuracy(chosen, asked.examples) for metric, chosen in choices.items()}
        show(loaded, asked, accuracies, seconds, left_out=len(data.examples) - len(numbers))
        sides = {} if contamination is None else accuracies_by_side(contamination, choices, data, numbers)
        if contamination is not None:
            show_sides(sides, contamination.note(loaded.manifest))
        if arguments.json:
            setting = {"dtype": arguments.dtype, "device": str(ranks.device), "world_size": ranks.world_size}
            report = describe(loaded, asked, accuracies) | setting | {"seconds": seconds}
            report["examples_left_out"] = len(data.examples) - len(numbers)
            if contamination is not None:
                names = ("file_sha256", "data_identity")
                reports = [dict(zip(names, found, strict=True)) for found in contamination.reports]
                report["contamination"] = {**describe_sides(sides), "reports": reports}
            write_json_output(arguments.json, report | {"predictions": predictions(data, choices, numbers)})
    ranks.close()


def answer(loaded: Loaded, data: HellaSwag, ranks: Ranks, arguments: argparse.Namespace) -> dict[Metric, Choices]:
    size = BatchSize.for_device(ranks.device)
    if arguments.batch:
        size = BatchSize(arguments.batch, max(1, arguments.batch * size.endings // size.contexts))
    questions = build_questions(data.examples, loaded.tokenizer).distinct()
    total = trunk_share(questions, loaded.model.config.block_size, ranks, size)
    with progress_bar(total, "context", "HellaSwag", disable=not ranks.is_first) as bar:
        return choose_all(
            loaded.model,
            data.examples,
            loaded.tokenizer,
            ranks,
            dtype=arguments.dtype,
            batch_size=size,
            done=bar.update,
        )


def show(
    loaded: Loaded, data: HellaSwag, accuracies: dict[Metric, Accuracy], seconds: float, *, left_out: int = 0
) -> None:
    """Args: data: the examples that were answered."""
    count = len(data.examples)
    which = f"all {count:,} examples" if count == FULL_SIZE else f"{count:,} of {FULL_SIZE:,} examples"
    print(f"{loaded.checkpoint}: {which} of {data.path} in {format_duration(seconds)}")
    for metric, result in accuracies.items():
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
        compare = f"   compare with {COMPARABLE[metric]}" if data.official and not left_out else ""
        print(f"  {metric:14} {result.value:.4f}{error}{compare}")
    if not data.official:
        print(f"  comparable with {NOT_COMPARABLE}")
    if left_out:
        print(f"  {left_out_note(left_out, count + left_out, loaded.model.config.block_size)}")
        print("  The scores are of the others, and no published score is of these.")


def accuracies_by_side(
    contamination: Contamination, choices: dict[Metric, Choices], data: HellaSwag, answered: list[int]
) -> dict[Side, tuple[int, dict[Metric, Accuracy]]]:
    """How many examples are clean, found in the training text, or unchecked, and the accuracies on each.

    Args: answered: the numbers (n,) of the examples of `data` that were, in the order of `choices`.
    """
    found: dict[Side, tuple[int, dict[Metric, Accuracy]]] = {}
    for side, numbers in contamination.sides(len(data.examples)).items():
        here = np.flatnonzero(np.isin(answered, numbers))
        examples = [data.examples[answered[place]] for place in here]
        scores = {metric: accuracy(chosen[here], examples) for metric, chosen in choices.items()} if examples else {}
        found[side] = len(examples), scores
    return found


def show_sides(sides: dict[Side, tuple[int, dict[Metric, Accuracy]]], note: str | None) -> None:
    for side, (count, scores) in sides.items():
        words = "   ".join(f"{metric} {result.value:.4f}" for metric, result in scores.items())
        print(f"  {side:10} {count:>6,} examples   {words}")
    if note:
        print(f"  note: {note}")


def describe_sides(sides: dict[Side, tuple[int, dict[Metric, Accuracy]]]) -> dict[str, Any]:
    """The same as JSON."""
    return {
        side: {"examples": count} | {metric: result.value for metric, result in scores.items()}
        for side, (count, scores) in sides.items()
    }


def describe(loaded: Loaded, data: HellaSwag, accuracies: dict[Metric, Accuracy]) -> dict[str, Any]:
    """The figures as JSON."""
    report: dict[str, Any] = {metric: result.value for metric, result in accuracies.items()}
    report |= {f"{metric}_stderr": result.standard_error for metric, result in accuracies.items()}
    return report | {
        "examples": len(data.examples),
        "all_examples": len(data.examples) == FULL_SIZE,
        "comparable_with": COMPARABLE if data.official else NOT_COMPARABLE,
        "data": {"file": data.path.name, "sha256": data.sha256, "form": "official" if data.official else "text"},
        **loaded.facts,
        "tokens": loaded.manifest["tokens"],
    }


def predictions(data: HellaSwag, choices: dict[Metric, Choices], answered: list[int]) -> list[dict[str, int | None]]:
    """By example, in the file's order: the right ending and the one chosen by each definition; null: left out."""
    places = {number: place for place, number in enumerate(answered)}
    found: list[dict[str, int | None]] = []
    for number, example in enumerate(data.examples):
        place = places.get(number)
        found.append({"label": example.label})
        for metric, chosen in choices.items():
            found[-1][metric] = None if place is None else int(chosen[place])
    return found
