"""The last validation of a run, beside what token frequencies alone reach on the same targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import Finite
from common.measured import causality
from common.metrics_file import record_kind
from common.run_folder import RunFolder
from data_prep.token_sets.manifest import COUNTED
from data_prep.token_sets.token_set import TokenSet, TokenStream, find_token_set

CHUNK_TOKENS = 1 << 24  # read at once while counting


class MixPart(TypedDict):
    path: str
    weight: Finite


class DataPart(TypedDict):
    path: str
    mix: NotRequired[list[MixPart]]


@dataclass(frozen=True)
class Validated:
    """Losses in nats per token."""

    val_loss: float
    val_step: int
    perplexity: float
    val_bits_per_byte: float | None  # of the validated targets' text; older runs record none
    causal: bool | None  # whether no prediction depends on later tokens; older runs have not checked
    unigram_entropy: float
    margin: float  # unigram_entropy - val_loss
    val_sha256: str  # of the validation split
    val_tokens: int | None  # of it, from its start: losses on equal ones compare
    of_answers: bool  # of conversations only the answers' tokens are learned from and validated


def last_validation(folder: RunFolder, records: Sequence[dict[str, Any]], data: DataPart) -> Validated | None:
    """None where there was none. Args: records: of the run. data: where its token sets are.

    Raises UserError where the loss is not finite, or the data it was measured on are no longer there.
    """
    validation = [record for record in records if record_kind(record) == "validation" and "val_loss" in record]
    if not validation:
        return None
    last = validation[-1]
    val_loss = last["val_loss"]
    if val_loss is None:
        raise UserError(f"the last validation loss in {folder.metrics} is not finite: lower optim.lr and train again")
    sources = [(TokenSet.open(find_token_set(s["path"])), s["weight"]) for s in data.get("mix", [])]
    measured_on = str(last.get("val_sha256", ""))
    if not sources:
        tokens = TokenSet.open(find_token_set(data["path"]))
        measured_on = measured_on or tokens.manifest.val_sha256  # an old record has none
        if measured_on != tokens.manifest.val_sha256:
            raise UserError(
                f"the last validation loss in {folder.metrics} was measured on a validation set of SHA-256 "
                f"{measured_on[:12]}…, but {tokens.folder} has another one: put the data back, or train a step on these"
            )
        sources = [(tokens, 1.0)]
    entropy = unigram_entropy([(found.split("val"), found.marks("val"), weight) for found, weight in sources])
    return Validated(
        val_loss=val_loss,
        val_step=last["step"],
        perplexity=math.exp(min(val_loss, 700.0)),  # beyond it a float overflows
        val_bits_per_byte=last.get("val_bits_per_byte"),
        causal=causality(validation),
        unigram_entropy=entropy,
        margin=entropy - val_loss,
        val_sha256=measured_on,
        val_tokens=last.get("val_tokens"),
        of_answers=any(found.has_conversations for found, _ in sources),
    )


def unigram_entropy(sources: Sequence[tuple[TokenStream, TokenStream | None, float]]) -> float:
    """Entropy in nats of the distribution of targets in several streams, each with its marks and its weight."""
    mean, total = np.zeros(0), sum(weight for *_, weight in sources)  # (V,)
    for stream, marks, weight in sources:
        counts = token_counts(stream, marks)
        added = np.zeros(max(len(mean), len(counts)))
        added[: len(mean)] = mean
        added[: len(counts)] += counts / counts.sum() * (weight / total)
        mean = added
    frequencies = mean[mean > 0]
    return float(-(frequencies * np.log(frequencies)).sum())


def token_counts(stream: TokenStream, marks: TokenStream | None = None) -> npt.NDArray[np.int64]:
    """How often each id is in a stream, of conversations among the targets: (V,), up to the largest."""
    counts = np.zeros(0, dtype=np.int64)  # (V,)
    for start in range(0, len(stream), CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(stream))
        ids = stream.read(start, stop)
        if marks is not None:
            ids = ids[marks.read(start, stop) == COUNTED]
        chunk = np.bincount(ids, minlength=len(counts))
        chunk[: len(counts)] += counts
        counts = chunk
    return counts
