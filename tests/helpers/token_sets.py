"""Tiny token sets for tests, made through the real writer."""

from pathlib import Path

import numpy as np

from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.shard_writer import ShardWriter
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

MEAN_DOCUMENT_TOKENS = 40


def make_token_set(
    folder: Path,
    *,
    train_tokens: int = 20_000,
    val_tokens: int = 2_000,
    shard_tokens: int = 8_000,
    vocab_size: int = 257,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> TokenSet:
    """A set of random but learnable tokens (a skewed Markov chain, end of text now and then) in `folder`.

    The tokenizer is the byte one for `vocab_size` 257, else a character one with that many ids.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tokenizer = ByteTokenizer() if vocab_size == 257 else char_tokenizer(vocab_size)
    generator = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        with ShardWriter(folder, split, tokenizer, shard_tokens) as writer:
            writer.write(markov_tokens(generator, count, tokenizer))
        splits[split] = tuple(writer.shards)
    finish_set(folder, tokenizer, {"name": "test", "seed": seed}, [], splits)
    return TokenSet.open(folder)


def char_tokenizer(vocab_size: int) -> CharTokenizer:
    """A character tokenizer with `vocab_size` ids, the last of them end of text."""
    symbols = "".join(chr(0x100 + i) for i in range(vocab_size - 1))
    return CharTokenizer(symbols, end_of_text=True)


def markov_tokens(generator: np.random.Generator, count: int, tokenizer: Tokenizer) -> np.ndarray:
    """`count` ids: each token mostly decides the next one (a step of 1 … 4), documents begin with end of text."""
    end = tokenizer.end_of_text_id
    ordinary = tokenizer.vocab_size - (end is not None)
    steps = generator.choice(np.arange(1, 5), size=count, p=[0.7, 0.15, 0.1, 0.05])
    tokens = (np.cumsum(steps) + generator.integers(ordinary)) % ordinary
    if end is not None:
        tokens[generator.random(count) < 1 / MEAN_DOCUMENT_TOKENS] = end
        tokens[:1] = end
    return tokens.astype(tokenizer.dtype)
