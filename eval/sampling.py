"""What the model writes: choosing the next token, and going on from a prompt."""

import torch
from torch import Tensor

from model.gpt import GPT


def sample_next_token(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Choose one token per row.

    Args:
        logits: (B, V) floats; ids that must not be chosen are at -inf.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens stay; 0 keeps all.
        generator: of the CPU; the only source of chance.

    Returns: (B, 1) int64 on the logits' device.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    logits = logits.float().cpu() / temperature  # (B, V)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)


@torch.no_grad()
def continue_tokens(
    model: GPT, prompt: list[int], count: int, *, temperature: float, top_k: int, seed: int, stop: int | None
) -> list[int]:
    """The `count` tokens that the model writes after `prompt`, fewer where it writes `stop`.

    The model's mode and the global random state stay as they are.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)  # (1, ≤T)
        logits = model(context)[:, -1]  # (1, V)
        token = int(sample_next_token(logits, temperature=temperature, top_k=top_k, generator=generator))
        if token == stop:
            break
        tokens.append(token)
    model.train(was_training)
    return tokens[len(prompt) :]
