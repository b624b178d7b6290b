"""A reward model's scores: the scalar head's value at a sequence's last token. n sequences, T tokens of the longest."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import Message
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import autocast


def judged_ids(tokenizer: ChatTokenizer, turns: Sequence[Message]) -> list[int]:
    """A conversation's ids up to the end of its last answer, at which it is judged; what a template has after that
    belongs to the next turn. Raises BadConversation where the template can't express it.
    """
    rendered = tokenizer.render(turns)
    ids: list[int] = rendered.ids[: int(np.flatnonzero(rendered.counted)[-1]) + 1].tolist()
    return ids


@torch.no_grad()
def scores_of(
    model: GPT, sequences: Sequence[Sequence[int]], *, micro_batch: int, dtype: Dtype
) -> npt.NDArray[np.float64]:
    """(n,) of sequences of ids, each in a row of its own.

    The last token is found by a sequence's length, never by the id of padding or of an end, which texts may contain;
    padding stands at the right, where no token before it sees it. Sequences of about one length are put together.
    """
    device = model.head_weight.device
    found = np.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    for start in range(0, len(order), micro_batch):
        chosen = order[start : start + micro_batch]
        lengths = torch.tensor([len(sequences[number]) for number in chosen])  # (b,)
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)  # (b, T)
        for row, number in zip(tokens, chosen, strict=True):
            row[: len(sequences[number])] = torch.tensor(sequences[number])
        with autocast(dtype, device):
            values = model(tokens.to(device), values=True)  # (b, T)
        found[chosen] = values[torch.arange(len(chosen)), (lengths - 1).to(device)].double().cpu().numpy()
    return found
