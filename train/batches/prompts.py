"""The prompts of a set of conversations: what stands before the last answer of each, given several times for samples.

Of a step of P prompts with G samples each, row i·G + j is sample j of the step's i-th prompt. So a batch stays a pure
function of (data, seed, sequences consumed), and micro-batches and ranks only slice it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data_prep.token_sets.documents import documents_of
from data_prep.token_sets.manifest import COUNTED, STARTS
from data_prep.token_sets.packing import IGNORE
from data_prep.token_sets.prompt_fields import Fields
from data_prep.token_sets.sequences import Rows
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Ids
from train.batches.shuffle import EpochOrder

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    ids: (n,) up to where the answer starts. text: of these. fields: what a reward may judge an answer by: those of the
    set of prompts; of a conversation `answer`, the text of its own answer.
    """

    ids: Ids
    text: str
    fields: dict[str, Any]


class Prompts:
    """The prompts of a split that leave room for an answer, by their numbers 0 … count - 1.

    Attributes:
        left_out: how many are too long for that.
    """

    def __init__(self, tokens: TokenSet, split: str, longest: int) -> None:
        """Args: longest: tokens of a prompt. Raises UserError where no prompt is as short."""
        marks = tokens.marks(split)
        assert marks is not None, "fit_to_data has refused it"
        self._stream, fields = tokens.split(split), tokens.fields(split)
        self._fields = None if fields is None else Fields(fields)
        self.tokenizer = load_tokenizer(tokens.tokenizer_spec)
        places, place = [], 0
        for number, marked in enumerate(documents_of(marks, STARTS)):
            begin, end = _last_answer(marked)
            places.append((place, place + begin, place + end, number))
            place += len(marked)
        found = np.array(places, dtype=np.int64).reshape(-1, 4)  # (p, 4): start, the answer's start and end, number
        self._places = found[found[:, 1] - found[:, 0] <= longest]
        self.count, self.left_out = len(self._places), len(found) - len(self._places)
        if not self.count:
            raise UserError(
                f"all {len(found):,} prompts of the {split} split of {tokens.folder} have more than {longest} tokens, "
                "which model.block_size leaves beside rollout.max_tokens: use a longer one, or shorter prompts"
            )

    def __getitem__(self, number: int) -> Prompt:
        start, begin, end, of_all = self._places[number].tolist()
        ids = self._stream.read(start, begin)
        if self._fields is not None:
            return Prompt(ids, self.tokenizer.decode(ids), self._fields[of_all])
        answer = self._stream.read(begin, end)
        ends = np.isin(answer, self.tokenizer.end_ids)
        text = self.tokenizer.decode(answer[~ends], continues=True)
        return Prompt(ids, self.tokenizer.decode(ids), {"answer": text})


def _last_answer(marked: Ids) -> tuple[int, int]:
    """Where the last answer of a conversation starts and ends, by its marks (n,); both n where it has none."""
    counted = np.flatnonzero(marked == COUNTED)
    if not len(counted):
        return len(marked), len(marked)
    gaps = np.flatnonzero(np.diff(counted) > 1)
    first = counted[gaps[-1] + 1] if len(gaps) else counted[0]
    return int(first), int(counted[-1]) + 1


class PromptSequences:
    """Every prompt as `samples` sequences: number n is sample n mod G of prompt n div G. Their targets come later."""

    def __init__(self, prompts: Prompts, block_size: int, samples: int) -> None:
        self.prompts, self.block_size, self.samples = prompts, block_size, samples
        self.count = prompts.count * samples

    def rows(self, numbers: Ints) -> Rows:
        """Sequences (n,): the prompt's ids, padded with 0, and no targets."""
        inputs = np.zeros((len(numbers), self.block_size), dtype=np.int64)
        for row, number in zip(inputs, numbers.tolist(), strict=True):
            ids = self.prompts[number // self.samples].ids
            row[: len(ids)] = ids
        return Rows(inputs, np.full_like(inputs, IGNORE), None)

    def target_count(self, numbers: Ints) -> int:
        """None before there are answers."""
        return 0


class PromptOrder:
    """The order of the prompts, each with all its samples, one after another."""

    def __init__(self, prompts: int, samples: int, seed: int) -> None:
        self._order, self._samples = EpochOrder(prompts, seed), samples

    def numbers(self, first: int, count: int) -> Ints:
        """The sequence numbers (count,) at positions first … first+count-1, which are whole prompts."""
        assert first % self._samples == count % self._samples == 0, (first, count)
        prompts = self._order.numbers(first // self._samples, count // self._samples)  # (p,)
        return (prompts[:, None] * self._samples + np.arange(self._samples)).ravel()

    def named(self, number: int) -> int:
        """A sequence as it is recorded: its prompt's number."""
        return number // self._samples

    def read_by_source(self, position: int) -> dict[str, int]:
        """Nothing: there is one source."""
        return {}


def prompt_sequences(tokens: TokenSet, block_size: int, *, samples: int, max_tokens: int) -> PromptSequences:
    """What a run that samples answers reads.

    Args: samples: of a prompt. max_tokens: of an answer.

    Raises UserError where no prompt leaves room for an answer.
    """
    return PromptSequences(Prompts(tokens, "train", block_size - max_tokens), block_size, samples)
