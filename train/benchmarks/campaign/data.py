"""What the campaign's checks read, made on the spot: learnable tokens, and questions of HellaSwag's form."""

import json
import random
from pathlib import Path

import numpy as np

from common.publish import write_whole
from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.shard_writer import ShardWriter
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import ByteTokenizer, Ids, Tokenizer

TRAIN_TOKENS, VAL_TOKENS = 8_000_000, 600_000
TINY_TRAIN_TOKENS, TINY_VAL_TOKENS = 40_000, 4_000
SHARD_TOKENS = 4_000_000
MEAN_DOCUMENT_TOKENS = 500
STEPS, CHANCES = np.arange(1, 5), (0.7, 0.15, 0.1, 0.05)
WORDS = ("the", "man", "woman", "is", "on", "roof", "they", "begin", "to", "cut", "grass", "with", "water", "then")


def make_tokens(folder: Path, *, tiny: bool) -> TokenSet:
    """A token set of GPT-2's vocabulary, or of bytes: each id mostly decides the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteTokenizer() if tiny else load_tokenizer("gpt2")
    counts = (TINY_TRAIN_TOKENS, TINY_VAL_TOKENS) if tiny else (TRAIN_TOKENS, VAL_TOKENS)
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in zip(("train", "val"), counts, strict=True):
        with ShardWriter(folder, split, tokenizer, SHARD_TOKENS) as writer:
            writer.write(chain(generator, count, tokenizer))
        splits[split] = tuple(writer.shards)
    finish_set(folder, tokenizer, {"name": "made for the GPU campaign", "seed": 0}, [], splits)
    return TokenSet.open(folder)


def chain(generator: np.random.Generator, count: int, tokenizer: Tokenizer) -> Ids:
    """`count` ids, each a small step from the one before, with an end of text now and then."""
    end = tokenizer.end_of_text_id
    assert end is not None
    ordinary = tokenizer.vocab_size - 1  # the end is the last id of both vocabularies
    tokens = np.cumsum(generator.choice(STEPS, size=count, p=CHANCES)) % ordinary
    tokens[generator.random(count) < 1 / MEAN_DOCUMENT_TOKENS] = end
    tokens[:1] = end
    return tokens.astype(tokenizer.dtype)


def make_hellaswag(file: Path, count: int, *, tiny: bool) -> None:
    """Questions of the official form and, unless tiny, of about its length. What their answers are means nothing."""
    chance = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, most)))

    rows = []
    for number in range(count):
        first, second = (words(1, 2), "") if tiny else (words(10, 40), words(1, 10))
        rows.append(
            {
                "activity_label": "Cutting the grass",
                "ctx_a": first,
                "ctx_b": second,
                "ctx": f"{first} {second}",
                "endings": [f"{words(*(1, 2) if tiny else (5, 30))}." for _ in range(4)],
                "label": number % 4,
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
