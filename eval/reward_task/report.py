"""What eval/reward.py prints: a score a line, and their summary."""

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.checkpoint_manifest import has_value_function
from common.errors import UserError
from common.os_errors import refusal
from common.publish import write_json_output
from common.regular_file import open_regular
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import ASSISTANT, BadConversation, Conversation, Problem, conversation_of, preference_of
from data_prep.corpora.fields import record_of
from eval.reward_task.scoring import judged_ids, scores_of
from eval.shared.loading import Loaded, device_for, evaluation_dtype, load_checkpoint

Judged = tuple[int, list[Conversation]]  # a line's number, its conversation or its chosen and rejected one


def report(arguments: argparse.Namespace) -> None:
    """Score a file. Raises UserError where the model is none that scores, or the file has nothing to score."""
    device = device_for(arguments.device)
    loaded = load_checkpoint(arguments.run, device, weights=arguments.weights)
    if has_value_function(loaded.manifest):
        raise UserError(f"{loaded.checkpoint} is no reward model: its scalar head is the value function of PPO")
    if not loaded.model.config.scalar_head or not isinstance(loaded.tokenizer, ChatTokenizer):
        raise UserError(f"{loaded.checkpoint} is no reward model: it has no scalar head and template to score with")
    left_out: Counter[str] = Counter()
    records = read(arguments.file, left_out)
    lines, sequences = fitting(loaded, loaded.tokenizer, records, left_out)
    if not lines:
        told = "; ".join(f"{count:,}: {why}" for why, count in left_out.items())
        raise UserError(f"{arguments.file} has no conversation to score ({told or 'it is empty'}): give another file")
    dtype = evaluation_dtype(arguments.dtype, device)
    scores = scores_of(
        loaded.model, [ids for line in sequences for ids in line], micro_batch=arguments.micro_batch, dtype=dtype
    )
    by_line, place = [], 0
    for line in sequences:
        by_line.append(scores[place : place + len(line)].tolist())
        place += len(line)
    for number, found in zip(lines, by_line, strict=True):
        print(f"line {number}: " + " chosen, ".join(f"{score:.4f}" for score in found) + " rejected" * (len(found) - 1))
    figures = {**loaded.facts, **summary(scores, by_line), "left_out": dict(left_out)}
    for why, count in left_out.most_common():
        print(f"left out {count:,} records: {why}")
    if "accuracy" in figures:
        print(f"{figures['pairs']:,} pairs, the chosen answer higher in {figures['accuracy']:.1%}")
    spread = f"standard deviation {figures['deviation']:.4f}"
    print(f"{len(scores):,} conversations, mean score {figures['mean']:.4f}, {spread}")
    if arguments.json:
        write_json_output(arguments.json, figures | {"lines": lines, "scores": by_line})


def summary(scores: npt.NDArray[np.float64], by_line: list[list[float]]) -> dict[str, Any]:
    """Mean and deviation of all scores; of pairs the share in which the chosen one is higher, equal ones by half."""
    figures: dict[str, Any] = {"mean": float(scores.mean()), "deviation": float(scores.std())}
    if pairs := [found for found in by_line if len(found) == 2]:
        right = sum(1.0 if chosen > rejected else 0.5 * (chosen == rejected) for chosen, rejected in pairs)
        figures |= {"pairs": len(pairs), "accuracy": right / len(pairs)}
    return figures


def read(path: Path, left_out: Counter[str]) -> list[Judged]:
    """The conversations of a file of JSON lines. Raises UserError where it can't be read, or a line is no JSON."""
    found: list[Judged] = []
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _read_line(line, number, path, found, left_out)
    except OSError as error:
        raise UserError(refusal("read", error, path)) from None
    return found


def _read_line(line: bytes, number: int, path: Path, found: list[Judged], left_out: Counter[str]) -> None:
    try:
        record = record_of(line)
        if isinstance(record, Mapping) and record.get("chosen") is not None:
            found.append((number, list(preference_of(record))))
            return
        turns = conversation_of(record)
        if turns[-1].role != ASSISTANT:
            raise BadConversation(Problem.NO_ANSWER)
        found.append((number, [turns]))
    except BadConversation as error:
        left_out[str(error.problem)] += 1
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: {error}: mend it, or remove it") from None


def fitting(
    loaded: Loaded, tokenizer: ChatTokenizer, records: list[Judged], left_out: Counter[str]
) -> tuple[list[int], list[list[list[int]]]]:
    """The numbers of the lines whose conversations fit the model, and the ids of each line's one or two."""
    longest = loaded.model.config.block_size
    numbers, sequences = [], []
    for number, conversations in records:
        try:
            line = [judged_ids(tokenizer, turns) for turns in conversations]
        except BadConversation as error:
            left_out[str(error.problem)] += 1
            continue
        if max(map(len, line)) > longest:
            left_out[f"more than the model's {longest:,} tokens"] += 1
            continue
        numbers.append(number)
        sequences.append(line)
    return numbers, sequences
