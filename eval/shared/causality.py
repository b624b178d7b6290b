"""Whether a model is causal: what comes last in a sequence must not move any earlier prediction."""

import numpy as np
import numpy.typing as npt
import torch

from data_prep.token_sets.sequences import document_ids
from model.devices import without_compiling
from model.gpt import GPT

TOLERANCE = 1e-5  # of logits in float32
POSITIONS = 64  # whose logits are in memory at once


@torch.no_grad()
def future_moves(
    model: GPT, tokens: npt.NDArray[np.int64], device: torch.device, *, split_documents_at: int | None = None
) -> float:
    """By how much at most the logits of earlier positions change with a sequence's last token; NaN where any is NaN.

    In float32 and without compiled code. The two sequences are computed one after the other, in equal shapes: what
    does not depend on the last token comes out the same to the bit, or nearly.

    Args:
        tokens: (T,) ids, T of 2 or more.
        split_documents_at: the id that starts a document, where attention is to stay inside documents.
    """
    changed = tokens.copy()
    changed[-1] = (changed[-1] + 1) % model.config.vocab_size
    was_training = model.training
    model.eval()
    with without_compiling():  # of a shape of its own
        hidden = []  # (1, T, C) each
        for row in (tokens, changed):
            documents = None
            if split_documents_at is not None:
                documents = torch.from_numpy(document_ids(row[None], split_documents_at)).to(device)
            hidden.append(model.hidden(torch.from_numpy(row[None]).to(device), document_ids=documents))
        moved = 0.0
        for start in range(0, len(tokens) - 1, POSITIONS):
            part = slice(start, min(start + POSITIONS, len(tokens) - 1))
            logits = [model.logits(each[:, part])[..., : model.config.vocab_size].float() for each in hidden]
            moved = max(moved, float((logits[0] - logits[1]).abs().max()))
            if moved != moved or not all(bool(torch.isfinite(each).all()) for each in logits):
                moved = float("nan")
                break
    model.train(was_training)
    return moved
