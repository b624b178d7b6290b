"""Choosing the next token: the filters of the field as pure functions, and the plain way to continue one prompt.

The filters equal those of Hugging Face's `transformers` and come in its order: repetition penalty, temperature, top-k,
top-p, min-p. B batch, T sequence, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from common.errors import UserError
from eval.generation.options import Sampling
from model.gpt import GPT
from model.precision import non_finite_predictions

NEVER = float("-inf")
LEAST_TEMPERATURE = 1e-30  # below it logits divided by the temperature leave float32; this one is greedy already


def filtered(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """(B, V) logits after all filters; `seen` (B, V) bool: tokens that are in a row's text already."""
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    logits = logits.float() / max(sampling.temperature, LEAST_TEMPERATURE)
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return keep_min_p(logits, sampling.min_p) if sampling.min_p > 0 else logits


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens of `seen` (B, V) bool less likely in (B, V) logits."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V) with everything below the k-th largest at -inf; what ties with it stays."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) with everything outside the nucleus of probability p at -inf; the likeliest token always stays."""
    ascending, order = logits.sort(dim=-1)
    outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # (B, V)
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(1, order, outside), NEVER)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) with everything less than p times as likely as the likeliest token at -inf."""
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(probabilities < least, NEVER)


def choose_tokens(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen: Tensor | None = None
) -> Tensor:
    """Choose one token per row.

    Args:
        logits: (B, V) floats; ids that must not be chosen are at -inf.
        generators: one of the CPU per row, the only source of chance: a row's choice doesn't depend on the others.
        seen: (B, V) bool, tokens that are in a row's text already, for the repetition penalty.

    Returns: (B, 1) int64 on the logits' device.

    Raises UserError where the logits are NaN or inf: the likeliest of them would be id 0 again and again.
    """
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise UserError(non_finite_predictions(logits.dtype))
    logits = filtered(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    probabilities = logits.softmax(dim=-1).cpu()  # (B, V)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.stack(drawn).to(logits.device)  # (B, 1)


@torch.no_grad()
def continue_tokens(
    model: GPT,
    prompt: list[int],
    count: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
    stops: Collection[int],
) -> list[int]:
    """The `count` tokens that the model generates after `prompt`, fewer where it generates one of `stops`.

    The plain way, which recomputes the last block_size tokens for every token; `decoding` is the fast one.
    The model's mode and the global random state stay as they are. Raises UserError as `choose_tokens` does.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sampling, generator = Sampling(temperature=temperature, top_k=top_k), torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    try:
        for _ in range(count):
            context = torch.tensor([tokens[-model.config.block_size :]], device=device)  # (1, ≤T)
            logits = model(context)[:, -1]  # (1, V)
            token = int(choose_tokens(logits, sampling, [generator]))
            if token in stops:
                break
            tokens.append(token)
    finally:
        model.train(was_training)
    return tokens[len(prompt) :]
