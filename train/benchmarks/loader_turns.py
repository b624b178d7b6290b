"""Loaders take turns: one source against several, a stream against whole documents, and how long packing plans take.

Times are those of this process on its core, so that other work on the machine counts as little as it can.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.progress import format_count
from data_prep.token_sets.manifest import Manifest, Shard, shard_name
from data_prep.token_sets.packing import PackedSequences, framing_of, make_plan
from data_prep.token_sets.sequences import JoinedSequences, Sequences, Windows
from data_prep.token_sets.token_set import TokenSet
from train.batches.loader import StepLoader
from train.batches.mixture import Level, MixedOrder, Mixture, shares_of
from train.batches.plan import plan_batch

BASELINE = "stream"


def split_set(folder: Path, count: int) -> list[Path]:
    """The shards of a set dealt out among as many sets, as links: their folders."""
    manifest = TokenSet.open(folder).manifest
    folders = []
    for source in range(count):
        own = folder / f"source-{source}"
        own.mkdir()
        shards = []
        for index, shard in enumerate(manifest.splits["train"][source::count]):
            os.link(folder / shard.file, own / shard_name("train", index))
            shards.append(Shard(shard_name("train", index), shard.tokens, 0, shard.bytes, shard.sha256))
        splits: dict[str, tuple[Shard, ...]] = {"train": tuple(shards), "val": ()}
        Manifest(manifest.dtype, manifest.tokenizer, {"name": own.name}, {}, splits, manifest.val_sha256).write(own)
        folders.append(own)
    return folders


def packed(tokens: TokenSet, length: int) -> tuple[Sequences, dict[str, float]]:
    """A set's whole documents, and what their plan took and holds."""
    framing = framing_of(tokens.tokenizer_spec)
    assert framing is not None, "the sets of this benchmark have documents"
    folder, stream = tokens.folder / "plan", tokens.split("train")
    started, cpu = time.perf_counter(), time.process_time()
    facts = make_plan(stream, framing, length, folder, data_identity=tokens.identity)
    figures = {
        "tokens": float(len(stream)),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "pieces": float(facts.pieces),
        "padding_share": facts.padding / (facts.sequences * length),
    }
    return PackedSequences.read(stream, folder), figures


def take_turns(folder: Path, block_size: int, tokens_per_step: int, steps: int, sources: int) -> dict[str, Any]:
    """Read steps by each loader in turn; of each the median time of a step, and its speed as a share of the baseline's.

    The share is the median over turns, in each of which all loaders read one step.
    """
    whole, parts = TokenSet.open(folder), [TokenSet.open(part) for part in split_set(folder, sources)]
    one_packed, plan = packed(whole, block_size)
    of_all: dict[str, tuple[Sequences, int]] = {
        BASELINE: (Windows(whole.split("train"), block_size), 1),
        f"stream, {sources} sources": (
            JoinedSequences({part.folder.name: Windows(part.split("train"), block_size) for part in parts}),
            sources,
        ),
        "whole documents": (one_packed, 1),
        f"whole documents, {sources} sources": (
            JoinedSequences({part.folder.name: packed(part, block_size)[0] for part in parts}),
            sources,
        ),
    }
    read = {name: _reader(sequences, tokens_per_step, count) for name, (sequences, count) in of_all.items()}
    times: dict[str, list[float]] = {name: [] for name in read}
    for turn in range(-1, steps):  # the first is to warm up
        names = list(read) if turn % 2 else list(reversed(read))
        for name in names:
            started = time.process_time()
            read[name](turn + 1)
            if turn >= 0:
                times[name].append(time.process_time() - started)
    rows = []
    for name, taken in times.items():
        shares = [base / own for base, own in zip(times[BASELINE], taken, strict=True)]
        seconds = statistics.median(taken)
        rows.append({"loader": name, "seconds_a_step": seconds, "share_of_baseline": statistics.median(shares)})
    return {"tokens_per_step": tokens_per_step, "plan": plan, "rows": rows}


def _reader(sequences: Sequences, tokens_per_step: int, sources: int) -> Callable[[int], object]:
    """Reads the step of a number: a whole one, as of one rank."""
    plan, order = plan_batch(tokens_per_step, sequences.block_size, 1, 1), None
    if isinstance(sequences, JoinedSequences):
        counts = {name: part.count for name, part in sequences.parts.items()}
        weights = shares_of(list(range(1, sources + 1)))  # no two are equal, so that a period has all its length
        order = MixedOrder(Mixture([Level(0, weights)]), counts, seed=0)
    loader = StepLoader(sequences, plan, rank=0, seed=0, order=order)
    return lambda step: loader.step_at(step * plan.sequences)


def table(found: dict[str, Any]) -> str:
    """The figures as lines."""
    plan = found["plan"]
    lines = [f"{'loader':<28} {'ms of a core a step':>20} {'speed':>7}"]
    lines += [
        f"{row['loader']:<28} {1000 * row['seconds_a_step']:>20.1f} {row['share_of_baseline']:>7.3f}"
        for row in found["rows"]
    ]
    lines.append(
        f"packing plan of {format_count(plan['tokens'])} tokens: {plan['cpu_seconds']:.1f} s of a core "
        f"({plan['seconds']:.1f} s), {format_count(plan['pieces'])} pieces, {plan['padding_share']:.2%} of padding"
    )
    return "\n".join(lines)
