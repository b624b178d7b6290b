"""The SHA-256 of a split's text, which is the same whatever tokenizer the split was made with."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.regular_file import open_regular
from data_prep.token_sets.manifest import Shard
from data_prep.tokenization.tokenizer import Tokenizer

BLOCK_BYTES = 1 << 16  # of ids; their text takes some thirty times as much memory


def split_text_sha256(folder: Path, shards: Sequence[Shard], tokenizer: Tokenizer) -> str:
    """Of the documents' bytes one after the other, without what frames them, read in blocks.

    Raises OSError where a shard can't be read.
    """
    digest = hashlib.sha256()
    for shard in shards:
        with open_regular(folder / shard.file) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(tokenizer.text_bytes(np.frombuffer(block, dtype=tokenizer.dtype)))
    return digest.hexdigest()
