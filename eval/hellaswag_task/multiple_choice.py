"""How likely a model finds each of several endings of a context.

The context is computed once for all of its endings; the output layer sees only tokens that are scored. Questions of
similar length go together, and so do endings, so that little is padding. Which questions share a batch depends only on
the questions, and ranks take turns at whole batches: any number of ranks gives the same bits.

B contexts, R endings, T tokens, C width, V padded vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from model.cache import KVCache
from model.devices import without_compiling
from model.gpt import GPT
from model.loss import head_loss
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """Token ids of a context (one at least) and of its endings (one at least each)."""

    context: Ids
    endings: tuple[Ids, ...]


@dataclass(frozen=True)
class BatchSize:
    """How many contexts are computed at once, and how many endings. Small batches waste little on padding, large ones
    keep a GPU busy."""

    contexts: int
    endings: int

    @classmethod
    def for_device(cls, device: torch.device) -> "BatchSize":
        return cls(16, 8) if device.type == "cpu" else cls(128, 128)


@dataclass(frozen=True)
class _Trunk:
    """A context with the endings that continue it: (which choice, its tokens)."""

    question: int
    context: Ids
    endings: tuple[tuple[int, Ids], ...]


@torch.no_grad()
def log_likelihoods(
    model: GPT,
    questions: Sequence[Question],
    ranks: Ranks,
    *,
    dtype: Dtype = "fp32",
    batch_size: BatchSize | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> npt.NDArray[np.float64]:
    """Summed log-probability of every ending's tokens after its context, (questions, endings) in nats.

    All ranks call and all get everything. A context too long for the model loses its oldest tokens. The model is left
    in the mode, training or evaluation, in which it came.

    Args:
        dtype: of matrix products; the log-probabilities are in float32 and their sums in float64.
        done: called after every batch of this rank's share with the number of trunks of `trunk_share` it has finished.

    Raises UserError where an ending by itself is longer than the model's context.
    """
    with_room([questions], model.config.block_size)
    size = batch_size or BatchSize.for_device(ranks.device)
    batches = _batches(questions, model.config.block_size, size.contexts)
    scores = np.zeros((len(questions), max((len(question.endings) for question in questions), default=0)))
    was_training = model.training
    model.eval()
    # every batch has other lengths: compiled blocks would be compiled again and again
    with without_compiling(), autocast(dtype, ranks.device):
        for batch in batches[ranks.rank :: ranks.world_size]:
            for question, choice, score in _score(model, batch, size.endings, ranks.device):
                scores[question, choice] = score
            done(len(batch))
    model.train(was_training)
    return np.sum(ranks.gather_array(scores), axis=0)


def with_room(examples: Sequence[Sequence[Question]], block_size: int) -> list[int]:
    """The numbers of the examples (each the questions that are made of it) whose endings all fit the model's context.

    Raises UserError where none does.
    """
    longest = [max((len(e) for question in questions for e in question.endings), default=0) for questions in examples]
    numbers = [number for number, length in enumerate(longest) if length <= block_size]
    if examples and not numbers:
        raise UserError(
            f"an ending has {min(longest)} tokens, more than the model's context of {block_size}"
            f"{', in every example' if len(examples) > 1 else ''}: use a model with a longer one"
        )
    return numbers


def left_out_note(left_out: int, examples: int, block_size: int) -> str:
    """In words, how many of the examples are not among `with_room`'s."""
    return (
        f"{left_out:,} of {examples:,} examples ({100 * left_out / examples:.1f} %) are left out: "
        f"an ending of theirs is longer than the model's context of {block_size} tokens"
    )


def trunk_share(questions: Sequence[Question], block_size: int, ranks: Ranks, batch_size: BatchSize) -> int:
    """How many trunks this rank will finish, for its progress."""
    batches = _batches(questions, block_size, batch_size.contexts)
    return sum(map(len, batches[ranks.rank :: ranks.world_size]))


def _batches(questions: Sequence[Question], block_size: int, contexts: int) -> list[list[_Trunk]]:
    """All trunks by length, the longest first, so that a guess of the time left is rather too high than too low."""
    trunks = [trunk for number, question in enumerate(questions) for trunk in _trunks(number, question, block_size)]
    trunks.sort(key=lambda trunk: (-len(trunk.context), trunk.question))
    return [trunks[start : start + contexts] for start in range(0, len(trunks), contexts)]


def _trunks(number: int, question: Question, block_size: int) -> list[_Trunk]:
    """One trunk where everything fits; else one for each ending, as each leaves room for another part of the context.

    The last token of an ending is predicted and never read, so context and ending may be block_size + 1 together.
    """
    room = block_size + 1
    if len(question.context) + max(map(len, question.endings)) <= room:
        return [_Trunk(number, question.context, tuple(enumerate(question.endings)))]
    return [
        _Trunk(number, question.context[-(room - len(ending)) :], ((choice, ending),))
        for choice, ending in enumerate(question.endings)
    ]


def _score(model: GPT, batch: list[_Trunk], rows: int, device: torch.device) -> list[tuple[int, int, float]]:
    """(question, choice, log-likelihood) of all endings of a batch."""
    contexts, lengths = _pad([trunk.context for trunk in batch])
    capacity = contexts.shape[1] + max(len(ending) for trunk in batch for _, ending in trunk.endings)
    cache = KVCache(model.config, len(batch), capacity)
    hidden = model.hidden(contexts.to(device), cache=cache, lengths=_unless_alike(lengths, device))  # (B, T, C)
    first = model.logits(hidden[torch.arange(len(batch)), lengths - 1]).float().log_softmax(dim=-1)  # (B, V)
    del hidden
    endings = [(row, choice, ending) for row, trunk in enumerate(batch) for choice, ending in trunk.endings]
    endings.sort(key=lambda item: -len(item[2]))
    row_ids = torch.tensor([row for row, _, _ in endings])
    # (R): the first tokens; double only on the CPU, as Apple GPUs have no float64
    begun = first[row_ids, [ending[0] for _, _, ending in endings]].cpu().double()
    scores = []
    for part in _parts([len(ending) - 1 for _, _, ending in endings], rows, model.config.block_size - len(contexts[0])):
        longer = [ending for _, _, ending in endings[part] if len(ending) > 1]
        rest = torch.zeros(len(endings[part]), dtype=torch.float64)
        if longer:  # the longest come first
            rest[: len(longer)] = _go_on(model, cache.select(row_ids[part][: len(longer)]), longer, device)
        for (row, choice, _), score in zip(endings[part], (begun[part] + rest).tolist(), strict=True):
            scores.append((batch[row].question, choice, score))
    return scores


def _parts(lengths: list[int], rows: int, room: int) -> list[slice]:
    """Slices of at most `rows` endings, longest first; one that may not fit behind the longest context is a slice of
    its own.
    """
    parts, start = [], 0
    while start < len(lengths):
        stop = start + (1 if lengths[start] > room else rows)
        parts.append(slice(start, min(stop, len(lengths))))
        start = stop
    return parts


def _go_on(model: GPT, cache: KVCache, endings: list[Ids], device: torch.device) -> Tensor:
    """Summed log-probability of every token of the endings but their first, (R) float64."""
    inputs, lengths = _pad([ending[:-1] for ending in endings])  # (R, T)
    targets, _ = _pad([ending[1:] for ending in endings])
    hidden = model.hidden(inputs.to(device), cache=cache, lengths=_unless_alike(lengths, device))  # (R, T, C)
    row, column = (torch.arange(inputs.shape[1]) < lengths[:, None]).nonzero(as_tuple=True)  # (n): no padding
    scored = hidden[row.to(device), column.to(device)]  # (n, C)
    size, cap = model.config.vocab_size, model.config.logit_softcap
    losses = head_loss(scored, model.head_weight, targets[row, column].to(device), size, "none", softcap=cap)
    table = torch.zeros(inputs.shape, dtype=torch.float64)
    table[row, column] = losses.cpu().double()
    return -table.sum(dim=1)


def _pad(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """(R, T) int64, zeros at the right, and (R) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
    return padded, lengths


def _unless_alike(lengths: Tensor, device: torch.device) -> Tensor | None:
    """The lengths (B,) for a cache, or None where rows don't differ, as it then takes a faster path."""
    return None if bool((lengths == lengths[0]).all()) else lengths.to(device)
