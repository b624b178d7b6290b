"""Token sets with garbage planted where chosen steps of a run read: what makes a loss spike."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.shard_writer import ShardWriter
from tests.helpers.token_sets import char_tokenizer, markov_tokens
from train.batches.shuffle import windows_at

VOCABULARY = 33


def make_planted_set(
    folder: Path,
    steps: Collection[int],
    *,
    run_steps: int,
    sequences: int,
    block_size: int,
    seed: int,
    spoilt: int | None = None,
) -> Path:
    """A learnable set of which these steps of a run with this seed read random tokens; return its folder.

    Args:
        run_steps: steps that one epoch suffices for. sequences: of a step. spoilt: of them, those that are random; all.
    """
    folder.mkdir(parents=True)
    tokenizer, generator = char_tokenizer(VOCABULARY), np.random.default_rng(seed)
    garbage = np.random.default_rng(seed + 1)  # all else is the same with any of it
    count = run_steps * sequences * block_size + 1
    tokens = markov_tokens(generator, count, tokenizer)
    for step in steps:
        for number in windows_at((step - 1) * sequences, sequences, run_steps * sequences, seed)[:spoilt]:
            start = number * block_size + 1
            tokens[start : start + block_size] = garbage.integers(VOCABULARY - 1, size=block_size)
    splits = {}
    for split, values in (("train", tokens), ("val", markov_tokens(generator, 2_000, tokenizer))):
        with ShardWriter(folder, split, tokenizer, 50_000) as writer:
            writer.write(values)
        splits[split] = tuple(writer.shards)
    finish_set(folder, tokenizer, {"name": "planted", "seed": seed}, [], splits)
    return folder
