"""The study's model with a norm over all positions together, which leaks the future; for the study alone.

    python eval/records/2026-11-22-tiny-shakespeare/leak.py --config …/configs/causal.yaml --run.name leak

takes the options of train/pretrain.py and trains the same way on the same data. Nothing of it is in the product.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor, nn

from common.errors import exit_on_user_error
from model.config import ModelConfig
from model.gpt import GPT


class PositionsRMSNorm(nn.Module):
    """x / rms(x) · weight with one root mean square over positions and width together, as LLM-Explorations has it.

    Every position is divided by a number that depends on all of them: on those to come as well. The weight is
    (positions, width), kept flat so that it begins at 1 and does not decay, as norms do here.
    """

    def __init__(self, positions: int, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(positions * width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        scale = torch.rsqrt(x.float().square().mean(dim=(1, 2), keepdim=True) + self.eps)  # (B, 1, 1)
        return x * scale * self.weight.view(-1, self.width)[: x.shape[1]]


class LeakyGPT(GPT):
    """A GPT whose blocks normalise over positions. The last norm stays one per token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for block in self.h:
            for name in ("ln_1", "ln_2"):
                setattr(block, name, PositionsRMSNorm(config.block_size, config.n_embd, config.norm_eps))


def main() -> int | None:
    from train import pretrain

    vars(pretrain)["GPT"] = LeakyGPT
    return pretrain.main()


if __name__ == "__main__":
    exit_on_user_error(main)
