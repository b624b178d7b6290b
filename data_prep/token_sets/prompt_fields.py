"""The further fields of a set's prompts: lines of JSON beside its tokens, every byte stored as a token is.

So they are cut into shards, hashed, verified, copied to nodes' disks and part of the set's identity as the tokens are.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.token_sets.manifest import fields_of
from data_prep.token_sets.sequences import Tokens
from data_prep.token_sets.shard_writer import ShardWriter

NEWLINE = 10
BLOCK_TOKENS = 1 << 22


class _Bytes:
    """What a `ShardWriter` asks of a tokenizer, of bytes: their shards' documents are lines."""

    piece_bytes = np.ones(256, dtype=np.int32)
    begin_of_text_id: int | None = NEWLINE

    def __init__(self, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.dtype = dtype


class FieldsWriter(ShardWriter):
    """A `ShardWriter` of a split's fields."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[np.unsignedinteger], shard_tokens: int) -> None:
        super().__init__(folder, fields_of(split), _Bytes(dtype), shard_tokens)

    def add(self, fields: dict[str, Any]) -> None:
        """Append a prompt's fields."""
        line = json.dumps(fields, ensure_ascii=False) + "\n"
        self.write(np.frombuffer(line.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(self.dtype))


class Fields:
    """The fields of a split's prompts by their numbers."""

    def __init__(self, stream: Tokens) -> None:
        self._stream = stream
        ends = [np.zeros(0, dtype=np.int64)]
        for place in range(0, len(stream), BLOCK_TOKENS):
            block = stream.read(place, min(len(stream), place + BLOCK_TOKENS))
            ends.append(np.flatnonzero(block == NEWLINE) + place)
        self._ends = np.concatenate(ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, Any]:
        start = int(self._ends[number - 1]) + 1 if number else 0
        line = self._stream.read(start, int(self._ends[number])).astype(np.uint8).tobytes()
        found: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        return found
