"""Which documents are in both splits of a token set: their ids are compared, by their hashes."""

import hashlib
from pathlib import Path

import numpy as np

from common.progress import progress_bar
from data_prep.token_sets.documents import conversations_of, documents_of
from data_prep.token_sets.manifest import Manifest, document_start
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import Ids

CUT_TOKENS = 64  # of validation's last document, which may be cut off: with fewer left, others may start like it
SHORTEST_TOKENS = 8  # an empty document, or a word, is no text of its own


def shared_documents(folder: Path, manifest: Manifest) -> tuple[int, int | None]:
    """How many training documents are in the validation split, too, and the number of the first of them.

    Validation's last document counts as far as it is there. Documents of fewer than SHORTEST_TOKENS tokens don't count,
    nor does a set in which documents are not marked. Of conversations all count, however short.

    Raises UserError where a shard can't be read.
    """
    begin = document_start(manifest.tokenizer)
    tokens, dtype = TokenSet(folder, manifest), manifest.numpy_dtype
    train, val = (tokens.split(name) for name in ("train", "val"))
    train_marks, val_marks = (tokens.marks(name) for name in ("train", "val"))
    if train_marks is not None and val_marks is not None:
        held_out = set(map(_hash, conversations_of(val, val_marks)))
        shared = [n for n, ids in enumerate(conversations_of(train, train_marks)) if _hash(ids) in held_out]
        return len(shared), shared[0] if shared else None
    if begin is None or not len(val):
        return 0, None
    hashes: set[bytes] = set()
    last = np.zeros(0, dtype=dtype)
    for last in documents_of(val, begin):
        hashes.add(_hash(last))
    count, first = 0, None
    with progress_bar(len(train), "tok", "comparing splits", scale=True) as bar:
        for number, ids in enumerate(documents_of(train, begin)):
            starts_alike = CUT_TOKENS <= len(last) <= len(ids) and np.array_equal(ids[: len(last)], last)
            if len(ids) >= SHORTEST_TOKENS and (starts_alike or _hash(ids) in hashes):
                count, first = count + 1, number if first is None else first
            bar.update(len(ids))
    return count, first


def _hash(ids: Ids) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=16).digest()
