"""Longhaul and the usual loop answer HellaSwag in turns: `bench_hellaswag.py` without its command line."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.progress import progress_bar
from common.publish import write_json_output
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Tokenizer
from eval.hellaswag_task.examples import evenly_spaced, read_hellaswag
from eval.hellaswag_task.metrics import plain_question
from eval.hellaswag_task.multiple_choice import Question, log_likelihoods
from eval.shared.loading import load_checkpoint, start_evaluation
from model.config import preset_config
from model.gpt import GPT
from model.initialisation import initialise
from model.number_formats import Dtype
from model.precision import autocast

LONGHAUL, ONE_AT_A_TIME = "longhaul", "one at a time"
Scores = npt.NDArray[np.float64]


def compare_answering(arguments: argparse.Namespace) -> None:
    if min(arguments.limit, arguments.threads, arguments.turns) < 1:
        raise UserError("--limit, --threads and --turns take 1 or more: give such")
    data = read_hellaswag(arguments.data)
    ranks = start_evaluation(arguments.device)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = build_model(arguments, ranks.device)
    questions = [plain_question(example, tokenizer) for example in evenly_spaced(data.examples, arguments.limit)]
    contestants: dict[str, Callable[[Sequence[Question]], Scores]] = {
        LONGHAUL: lambda asked: log_likelihoods(model, asked, ranks, dtype=arguments.dtype),
        ONE_AT_A_TIME: lambda asked: one_at_a_time(model, asked, ranks.device, arguments.dtype),
    }
    seconds = dict.fromkeys(contestants, float("inf"))  # wall-clock
    processor_seconds = dict.fromkeys(contestants, float("inf"))
    flops, scores = {}, {}
    with progress_bar((arguments.turns + 1) * len(contestants), "turn", "benchmark") as bar:
        for name, answer in contestants.items():
            with FlopCounterMode(display=False) as counter:  # warms up as well
                scores[name] = answer(questions)
            flops[name] = counter.get_total_flops()
            bar.update(1)
        for _ in range(arguments.turns):
            for name, answer in contestants.items():
                started, processor_started = time.perf_counter(), time.process_time()
                answer(questions)  # ends with the scores on the CPU, so a GPU has finished too
                seconds[name] = min(seconds[name], time.perf_counter() - started)
                spent = time.process_time() - processor_started
                processor_seconds[name] = min(processor_seconds[name], spent)
                bar.update(1)
    speed = {name: len(questions) / value for name, value in seconds.items()}
    same = float(np.mean(scores[LONGHAUL].argmax(axis=1) == scores[ONE_AT_A_TIME].argmax(axis=1)))
    report = {
        "examples": len(questions),
        "examples_per_second": speed,
        "times_faster": speed[LONGHAUL] / speed[ONE_AT_A_TIME],
        "processor_seconds": processor_seconds,
        "times_less_processor_time": processor_seconds[ONE_AT_A_TIME] / processor_seconds[LONGHAUL],
        "flops": flops,
        "flop_ratio": flops[ONE_AT_A_TIME] / flops[LONGHAUL],
        "same_predictions": same,
        "largest_difference_nats": float(np.abs(scores[LONGHAUL] - scores[ONE_AT_A_TIME]).max()),
        "model": asdict(model.config),
        "data_sha256": data.sha256,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "device": str(ranks.device),
        "torch": torch.__version__,
    }
    for name in contestants:
        print(f"{name:14} {speed[name]:8.2f} examples/s   {flops[name] / len(questions) / 1e9:8.1f} GFLOP an example")
    print(
        f"{report['times_faster']:.2f} times as fast by wall-clock time, {report['times_less_processor_time']:.2f} by "
        f"processor time, with {report['flop_ratio']:.2f} times fewer FLOPs"
    )
    print(f"{same:.1%} of the predictions are the same ({len(questions)} examples)")
    if arguments.json:
        write_json_output(arguments.json, report)


def build_model(arguments: argparse.Namespace, device: torch.device) -> tuple[GPT, Tokenizer]:
    if arguments.run:
        loaded = load_checkpoint(arguments.run, device)
        return loaded.model, loaded.tokenizer
    try:
        model = GPT(preset_config(arguments.preset))
    except ValueError as error:
        raise UserError(str(error)) from None
    initialise(model, 0)
    return model.to(device).eval(), load_tokenizer("gpt2")


@torch.no_grad()
def one_at_a_time(model: GPT, questions: Sequence[Question], device: torch.device, dtype: Dtype) -> Scores:
    """build-nanogpt's way, (questions, 4): summed log-probability of each ending's tokens."""
    scores = np.zeros((len(questions), len(questions[0].endings)))
    for number, question in enumerate(questions):
        longest = len(question.context) + max(map(len, question.endings))
        tokens = torch.zeros(len(question.endings), longest, dtype=torch.int64)  # (4, T)
        mask = torch.zeros(len(question.endings), longest)
        for row, ending in enumerate(question.endings):
            text = [*question.context, *ending]
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, len(question.context) : len(text)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with autocast(dtype, device):
            logits = model(tokens)  # (4, T, V)
        shifted, targets = logits[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses = F.cross_entropy(shifted.view(-1, shifted.size(-1)), targets.view(-1), reduction="none")
        losses = losses.view(len(question.endings), -1) * mask[:, 1:].contiguous()
        scores[number] = -losses.sum(dim=1).cpu().double().numpy()
    return scores
