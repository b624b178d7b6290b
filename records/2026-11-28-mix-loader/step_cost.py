"""What packing adds to a whole step on a CPU: reading, forward, backward and update, by processor time.

    python data_prep/docstrings.py --tokenizer byte --out data/docstrings-byte
    python records/2026-11-28-mix-loader/step_cost.py --json records/2026-11-28-mix-loader/step-cost.json

Four loaders take turns with one model in one process with one thread: the stream and whole documents, each with
attention inside documents and without. Reading is not hidden behind the computation, as it is by the trainer's thread.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import file_to_write, write_json_output
from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import Ranks
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.batches.training_sequences import prepare_packing, training_sequences

LENGTH, SEQUENCES = 512, 8
CASES = {"stream": (False, False), "whole documents": (True, False), "stream, masked": (False, True),
         "whole documents, masked": (True, True)}  # fmt: skip


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)
    tokens, alone = TokenSet.open(arguments.data), Ranks(0, 1, 0, 1, torch.device("cpu"))
    prepare_packing(tokens, LENGTH, alone)
    config = ModelConfig(vocab_size=257, block_size=LENGTH, n_layer=4, n_head=4, n_embd=128, position="rope")
    model = GPT(config)
    initialise(model, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    plan = plan_batch(SEQUENCES * LENGTH, LENGTH, SEQUENCES, 1)
    loaders = {
        name: StepLoader(
            training_sequences(tokens, LENGTH, stride=None, packed=packed, mask_documents=masked), plan, rank=0, seed=1
        )
        for name, (packed, masked) in CASES.items()
    }
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(-1, arguments.turns):
        for name in list(CASES) if turn % 2 else list(reversed(CASES)):
            started = time.process_time()
            one_step(model, optimizer, loaders[name], (turn + 1) * SEQUENCES)
            if turn >= 0:
                times[name].append(time.process_time() - started)
    figures = {name: {"seconds_a_step": statistics.median(taken)} for name, taken in times.items()}
    for name, other in (("whole documents", "stream"), ("whole documents, masked", "stream"),
                        ("whole documents, masked", "stream, masked"), ("stream, masked", "stream")):  # fmt: skip
        ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
        deviation = statistics.stdev(ratios) / len(ratios) ** 0.5
        figures[name][f"times {other}"] = statistics.median(ratios)
        print(f"{name}: {statistics.median(ratios):.3f} times {other} (mean ± {deviation:.3f})")
    if arguments.json:
        write_json_output(arguments.json, {"turns": arguments.turns, "tokens_per_step": SEQUENCES * LENGTH, **figures})
    return 0


def one_step(model: GPT, optimizer: torch.optim.Optimizer, loader: StepLoader, position: int) -> None:
    batch = loader.step_at(position)
    for micro_batch in batch.micro_batches(torch.device("cpu")):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(micro_batch.tokens, micro_batch.targets, document_ids=micro_batch.document_ids)
        (loss / batch.target_count).backward()
    optimizer.step()
    optimizer.zero_grad()


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/docstrings-byte"), help="the token set")
    parser.add_argument("--turns", type=int, default=30, help="of each (default 30)")
    parser.add_argument("--json", type=file_to_write, help="write the figures to this file as well")
    return parser.parse_args()


if __name__ == "__main__":
    exit_on_user_error(main)
