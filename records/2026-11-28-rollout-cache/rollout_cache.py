"""Answers of a rollout with the key-value cache and without one, by turns in one process.

    python records/2026-11-28-rollout-cache/rollout_cache.py [--case demo …] [--turns 3] [--json FILE]

With the cache: `train.objectives.sampling.sample_answers`, what a rollout does. Without: for every token the whole rows
go through the model again, all of a block at once, and the head is asked for each row's last place only; the choice of
a token is the very same function. No answer ends early, so both give the same number of tokens. Weights are random.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import numpy.typing as npt
import torch

from common.publish import write_json_output
from model.config import ModelConfig, preset_config
from model.gpt import GPT
from model.initialisation import initialise
from model.number_formats import Dtype
from model.precision import autocast
from train.objectives.sampling import _choose, random_numbers, sample_answers

DEMO = ModelConfig(
    vocab_size=8192, block_size=256, n_layer=4, n_head=4, n_embd=128, norm="rmsnorm", position="rope", mlp="swiglu",
    bias=False,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """prompts: of a block. lengths: the shortest and the longest prompt, in tokens. count: tokens of an answer."""

    model: ModelConfig
    dtype: Dtype
    prompts: int
    samples: int
    lengths: tuple[int, int]
    count: int

    @property
    def rows(self) -> int:
        return self.prompts * self.samples


CASES = {
    "demo": Case(DEMO, "fp32", 8, 8, (16, 32), 128),  # a block as rollouts have it by default
    "demo-bf16": Case(DEMO, "bf16", 8, 8, (16, 32), 128),
    "demo-small-block": Case(DEMO, "fp32", 2, 4, (16, 32), 128),
    "llama-124m": Case(preset_config("llama-124m"), "bf16", 2, 4, (16, 32), 128),
}


def without_cache(
    model: GPT, prompts: list[npt.NDArray[np.int64]], numbers: npt.NDArray[np.float64], dtype: Dtype
) -> npt.NDArray[np.int64]:
    """(B, N) tokens of answers, every token by a forward of all that stands before it."""
    rows, count = numbers.shape
    asked = [prompt for prompt in prompts for _ in range(rows // len(prompts))]
    lengths = torch.tensor([len(prompt) for prompt in asked])  # (B)
    whole = torch.zeros(rows, int(lengths.max()) + count, dtype=torch.int64)  # (B, L + N)
    for row, prompt in zip(whole, asked, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    drawn, every = torch.from_numpy(numbers), torch.arange(rows)
    found = torch.zeros(rows, count, dtype=torch.int64)
    with torch.no_grad(), autocast(dtype, torch.device("cpu")):
        for place in range(count):
            ends = lengths + place
            hidden = model.hidden(whole[:, : int(ends.max())])  # (B, T, C)
            logits = model.logits(hidden[every, ends - 1])  # (B, V)
            chosen = _choose(logits, drawn[:, place : place + 1], 1.0, torch.float64)  # (B, 1)
            found[:, place : place + 1] = chosen
            whole[every, ends] = chosen.squeeze(1)
    return found.numpy()


def measure(case: Case, turns: int) -> dict[str, object]:
    """Seconds of each turn by contestant, the median's tokens a second of the processor, and how many tokens agree."""
    model = GPT(case.model)
    initialise(model, 0)
    model.eval()
    generator = np.random.default_rng(1)
    sizes = np.linspace(*case.lengths, case.prompts).round().astype(int).tolist()
    prompts = [generator.integers(0, case.model.vocab_size, size) for size in sizes]
    numbers = np.stack([random_numbers(1, 1, row, 0, case.count) for row in range(case.rows)])

    def with_cache() -> npt.NDArray[np.int64]:
        return sample_answers(model, prompts, numbers, temperature=1.0, end_ids=[], dtype=case.dtype).tokens

    contestants: dict[str, Callable[[], npt.NDArray[np.int64]]] = {
        "with_cache": with_cache,
        "without_cache": lambda: without_cache(model, prompts, numbers, case.dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}  # of the processor, as other work is beside
    clock: dict[str, list[float]] = {name: [] for name in contestants}
    texts = {}
    with_cache()  # warm up
    for _ in range(turns):
        for name, run in contestants.items():
            started, worked = time.perf_counter(), time.process_time()
            texts[name] = run()
            seconds[name].append(time.process_time() - worked)
            clock[name].append(time.perf_counter() - started)
    tokens = case.rows * case.count
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    ratios = [slow / fast for fast, slow in zip(*seconds.values(), strict=True)]
    return {
        "setting": asdict(case),
        "processor_seconds": seconds,
        "clock_seconds": clock,
        "tokens_per_second": {name: tokens / each for name, each in medians.items()},
        "times_faster": medians["without_cache"] / medians["with_cache"],
        "times_faster_by_turn": ratios,
        "same_tokens": float((texts["with_cache"] == texts["without_cache"]).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, object] = {"torch": torch.__version__, "threads": arguments.threads}
    for name in arguments.case:
        found[name] = figures = measure(CASES[name], arguments.turns)
        print(name, json.dumps({key: figures[key] for key in list(figures)[1:]}), flush=True)
        if arguments.json:
            write_json_output(arguments.json, found)


if __name__ == "__main__":
    main()
