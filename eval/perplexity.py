"""Loss, perplexity and bits per byte on fixed tokens.

    python eval/perplexity.py runs/demo --data data/docstrings
    python eval/perplexity.py runs/demo --data data/docstrings --stride 64 --json perplexity.json
    python train/launch.py --nproc_per_node=8 eval/perplexity.py runs/gpt2-124m --data data/fineweb-edu

Each target token counts once. Without a stride, windows of the model's length lie side by side and a window's first
tokens see little; with --stride S a window begins at every S-th token and only what is new in it is counted, so that
every token but the first ones sees at least T - S others. Both count the same targets.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from common.command_line import CommandParser
from common.errors import UserError, advising_on_memory, exit_on_user_error
from common.progress import format_duration, progress_bar
from common.publish import write_json_output
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.sequences import Tokens, document_ids
from data_prep.token_sets.token_set import TokenSet, find_token_set
from eval.shared.arguments import add_device, add_dtype, add_json, add_run
from eval.shared.loading import Loaded, load_checkpoint, start_evaluation
from model.gpt import GPT
from model.precision import Dtype, autocast, non_finite_predictions
from model.ranks import Ranks

LESS_MEMORY = "give a smaller --micro-batch (8 by default) or --dtype bf16, or --device cpu where that has more"
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error (None where there is but one block of tokens)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Blocks:
    """Sums over blocks of T neighbouring targets each, in float64: losses in nats, targets, bytes of their text."""

    losses: Sums
    targets: Sums
    bytes: Sums

    def loss(self) -> Estimate:
        """Nats per token."""
        return ratio(self.losses, self.targets)

    def perplexity(self) -> Estimate:
        loss = self.loss()
        value = math.exp(loss.value) if loss.value < 700 else math.inf
        return Estimate(value, None if loss.standard_error is None else value * loss.standard_error)

    def bits_per_byte(self) -> Estimate:
        return ratio(self.losses / math.log(2), self.bytes)


def ratio(numerators: Sums, denominators: Sums) -> Estimate:
    """sum / sum, and the standard error of that ratio (Cochran 1977, section 6.3), blocks taken as independent.

    Tokens of one text are hard or easy together, so an error estimated from single tokens would be too small.
    """
    count, total = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / total if total else math.nan
    if count < 2:
        return Estimate(value, None)
    residuals = numerators - value * denominators
    return Estimate(value, math.sqrt(count / (count - 1) * float(residuals @ residuals)) / total)


@torch.no_grad()
def measure(
    model: GPT,
    stream: Tokens,
    piece_bytes: npt.NDArray[np.int32],
    ranks: Ranks,
    *,
    targets: int,
    stride: int,
    micro_batch: int,
    dtype: Dtype = "fp32",
    split_documents_at: int | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> Blocks:
    """Measure tokens 1 … `targets` of the stream, shared out over all ranks (all must call).

    Args:
        piece_bytes: (V,) bytes of text that each id stands for.
        targets: how many, a multiple of the model's length T.
        stride: targets counted in each window but the first; T: windows side by side.
        micro_batch: windows at a time.
        split_documents_at: the id that begins a document, where attention is to stay inside documents.
        done: told how many windows of this rank's share are finished.
    """
    length = model.config.block_size
    assert targets % length == 0
    sums = np.zeros((3, targets // length))
    starts = window_starts(targets, length, stride)
    first_new = np.concatenate(([0], starts[:-1] + length))  # the first target that no window before has counted
    was_training = model.training
    model.eval()
    for first in range(ranks.rank * micro_batch, len(starts), ranks.world_size * micro_batch):
        chosen = starts[first : first + micro_batch]
        rows = np.stack([stream.read(int(start), int(start) + length + 1) for start in chosen]).astype(np.int64)
        losses = _losses(model, rows, ranks.device, dtype, split_documents_at)  # (≤M, T)
        place = chosen[:, None] + np.arange(length)  # (≤M, T): which target, counted from 0
        new = place >= first_new[first : first + micro_batch, None]
        blocks = place[new] // length
        figures: tuple[npt.NDArray[Any], ...] = (losses[new], np.ones(len(blocks)), piece_bytes[rows[:, 1:][new]])
        for row, weights in zip(sums, figures, strict=True):
            row += np.bincount(blocks, weights=weights, minlength=len(row))
        done(len(chosen))
    model.train(was_training)
    return Blocks(*np.sum(ranks.gather_array(sums), axis=0))


def window_starts(targets: int, length: int, stride: int) -> npt.NDArray[np.int64]:
    """Where windows of T inputs begin so that together they count each of `targets` targets; the last may overlap."""
    return np.append(np.arange(0, targets - length, stride), targets - length)


def _losses(
    model: GPT, rows: npt.NDArray[np.int64], device: torch.device, dtype: Dtype, split_documents_at: int | None
) -> Sums:
    """Cross-entropy of each target, (M, T), of windows with their targets (M, T+1)."""
    inputs, documents = rows[:, :-1], None
    if split_documents_at is not None:
        documents = torch.from_numpy(document_ids(inputs, split_documents_at)).to(device)
    tokens = torch.from_numpy(rows).to(device)
    with autocast(dtype, device):
        losses = model(tokens[:, :-1], tokens[:, 1:], reduction="none", document_ids=documents)
    return np.asarray(losses.cpu().double().numpy())  # Apple GPUs have no float64


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Loss, perplexity and bits per byte on fixed tokens.")
    add_run(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="a token set (default: the run's own)")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="of the token set (default val)")
    parser.add_argument("--tokens", type=int, metavar="N", help="targets from the split's beginning (default: all)")
    parser.add_argument("--stride", type=int, metavar="S", help="let windows overlap: S new targets in each")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="windows at a time (default 8)")
    add_device(parser)
    add_dtype(parser)
    add_json(parser)
    return parser.parse_args()


@advising_on_memory(LESS_MEMORY)
def main() -> int:
    arguments = parse_arguments()
    for name in ("tokens", "stride", "micro_batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    ranks = start_evaluation(arguments.device)
    loaded = load_checkpoint(arguments.run, ranks.device, ranks)
    settings: Mapping[str, Any] = loaded.manifest.get("config") or {}
    tokens = open_tokens(arguments.data, settings, loaded)
    length = loaded.model.config.block_size
    stride = length if arguments.stride is None else arguments.stride
    if stride > length:
        raise UserError(f"--stride is {stride}; more than the model's context of {length} would leave tokens out")
    stream = tokens.split(arguments.split)
    targets = min(len(stream) - 1, arguments.tokens or len(stream)) // length * length
    if targets < length:
        raise UserError(f"a window has {length} targets: {tokens.folder} holds fewer, or --tokens is too small")
    border = document_start(tokens.tokenizer_spec) if settings.get("data", {}).get("document_mask") else None
    started = time.monotonic()
    share = len(range(ranks.rank, len(window_starts(targets, length, stride)), ranks.world_size))  # nearly
    with progress_bar(share, "window", "perplexity", disable=not ranks.is_first) as bar:
        blocks = measure(
            loaded.model,
            stream,
            loaded.tokenizer.piece_bytes,
            ranks,
            targets=targets,
            stride=stride,
            micro_batch=arguments.micro_batch,
            dtype=arguments.dtype,
            split_documents_at=border,
            done=bar.update,
        )
    if math.isnan(blocks.loss().value):
        raise UserError(non_finite_predictions(arguments.dtype))
    if ranks.is_first:
        report = describe(loaded, tokens, blocks, arguments, stride, border is not None)
        show(report, time.monotonic() - started)
        if arguments.json:
            write_json_output(arguments.json, report | {"seconds": time.monotonic() - started})
    ranks.close()
    return 0


def open_tokens(folder: Path | None, settings: Mapping[str, Any], loaded: Loaded) -> TokenSet:
    """The token set that is asked for, or the run's own. Raises UserError where its tokenizer is not the model's."""
    named = folder or settings.get("data", {}).get("path")
    if named is None:
        raise UserError("the checkpoint doesn't say what it was trained on: give --data DIR")
    tokens = TokenSet.open(find_token_set(named))
    if tokens.tokenizer_spec["sha256"] != loaded.tokenizer.spec["sha256"]:
        raise UserError(
            f"{tokens.folder} was made with another tokenizer than the model: prepare the text with its own"
        )
    return tokens


def describe(
    loaded: Loaded, tokens: TokenSet, blocks: Blocks, arguments: argparse.Namespace, stride: int, document_mask: bool
) -> dict[str, Any]:
    """The figures as JSON."""
    shards, length = tokens.manifest.splits[arguments.split], loaded.model.config.block_size
    return {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.manifest["step"],
        "data": str(tokens.folder),
        "split": arguments.split,
        "val_sha256": tokens.manifest.val_sha256 if arguments.split == "val" else None,
        "shard_sha256": [shard.sha256 for shard in shards] if arguments.split != "val" else None,
        "targets": int(blocks.targets.sum()),
        "all_targets": int(blocks.targets.sum())
        == (len(tokens.split(arguments.split)) - 1) // loaded.model.config.block_size * loaded.model.config.block_size,
        "bytes": int(blocks.bytes.sum()),
        "block_size": length,
        "stride": stride,
        "document_mask": document_mask,
        "dtype": arguments.dtype,
        **{name: asdict(getattr(blocks, name)()) for name in ("loss", "perplexity", "bits_per_byte")},
    }


def show(report: dict[str, Any], seconds: float) -> None:
    sha256 = f", SHA-256 {report['val_sha256']}" if report["val_sha256"] else ""
    print(f"{report['checkpoint']} on the {report['split']} split of {report['data']}{sha256}")
    which = "all" if report["all_targets"] else "the first"
    sliding = f", stride {report['stride']}" if report["stride"] < report["block_size"] else ""
    print(
        f"{which} {report['targets']:,} target tokens ({report['bytes']:,} bytes), "
        f"windows of {report['block_size']}{sliding}, in {format_duration(seconds)}"
    )
    for name, unit, digits in (("loss", " nats per token", 4), ("perplexity", "", 2), ("bits_per_byte", "", 4)):
        error = report[name]["standard_error"]
        spread = "" if error is None else f" ± {error:.{digits}f}"
        print(f"  {name.replace('_', ' '):14} {report[name]['value']:.{digits}f}{spread}{unit}")


if __name__ == "__main__":
    exit_on_user_error(main)
