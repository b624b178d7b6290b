"""A byte-level BPE vocabulary learned from text, by the package `tokenizers`: its tokenizer.json.

Merges are those of the most frequent pairs (Sennrich et al. 2016), on the bytes of UTF-8 (Radford et al. 2019). Of
equally frequent pairs the one with the lower ids is merged first, so the same text gives the same file, whatever its
order and the number of threads.
"""

import os
from collections.abc import Iterable
from typing import Any

from common.errors import UserError
from data_prep.token_sets.manifest import UINT16_VOCABULARY, padded_size
from data_prep.tokenization.tokenizer import END_OF_TEXT

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# Where a text is split before merging; no token covers two pieces. gpt4 is cl100k_base's, as Llama 3 has it.
PATTERNS = {
    "gpt4": (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt2": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
}
SMALLEST = 257  # the bytes and the end of a text
PIECE_CHARACTERS = 64  # longer pieces are learned from in parts: text without spaces would be one piece
MEMORY_PER_BYTE = 150  # of distinct pieces while merges are learned; 130 were measured
MOST_SAMPLE_BYTES = (1 << 31) - 1  # the package counts pairs in 32 bits: there are no more of a pair than bytes
LEAST_COUNT = 2  # a pair that occurs once is not worth an id


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str, threads: int) -> str:
    """The tokenizer.json of a vocabulary with at most `vocab_size` ids: 256 bytes, merges, the end of a text last.

    There are fewer where no pair occurs twice any more. All `texts` together have at most MOST_SAMPLE_BYTES.

    Raises UserError where the package is missing or too old.
    """
    # the first is read when the package first starts threads, the second at every call
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        in_parts = pre_tokenizers.FixedLength(length=PIECE_CHARACTERS)
    except (ImportError, AttributeError):
        raise UserError("training a tokenizer needs tokenizers 0.22 or newer: pip install -U tokenizers") from None
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built: Any = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence([split, in_parts, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=LEAST_COUNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(iter(texts), trainer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    built.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    text: str = built.to_str(pretty=True)
    return text + "\n"


def describe_size(vocab_size: int) -> str:
    """In words whether a vocabulary fills the table that a model makes for it, and which sizes near it would."""
    padded, below = padded_size(vocab_size), padded_size(vocab_size) - padded_size(1)
    words = f"{vocab_size:,} ids, the largest {vocab_size - 1:,}; a model's table has {padded:,} rows"
    if padded != vocab_size:
        words += f" (--vocab-size {below} or {padded} leaves none of them unused)"
    if vocab_size > UINT16_VOCABULARY:
        words += f"; more than {UINT16_VOCABULARY:,} take 4 bytes a token on disk instead of 2"
    return words
