"""Models of the study that are not in the product: with a norm over all positions together, which leaks the future.

    python records/2026-11-22-tiny-shakespeare/leak.py MODEL --config …/configs/causal.yaml --run.name NAME

takes the options of train/pretrain.py and trains the same way on the same data. MODEL is one of
    positions           the study's causal model, its blocks' norms over positions
    reported-positions  the reported model as its parameter count tells it, 1,112,781
    reported-token      the same with a norm per token, 1,096,909
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, exit_on_user_error
from model.config import ModelConfig
from model.gpt import GPT, IGNORE_INDEX
from model.norms import RMSNorm

REPORTED_HIDDEN = 341  # two thirds of four times the width


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


class ChainedSwiGLU(nn.Module):
    """The reported feed-forward half: the gate and the values both come out of one hidden layer, all with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module, recompute_norm: bool = False) -> Tensor:
        """As MLP's: (B, T, C) to (B, T, C)."""
        hidden = self.c_fc(norm(x))  # (B, T, F)
        out: Tensor = self.c_proj(F.silu(hidden) * self.inner(hidden))
        return out


class ReportedGPT(GPT):
    """The reported model: one norm a block for both its halves, none at the end, a head with a bias.

    Of its code's several versions this is the one whose count is the published one: 8,320 embedding, 4 x (65,536
    attention + 204,387 feed-forward + 4,096 norm), 8,385 head. That both halves of a block share its norm is inferred.
    """

    positions = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.n_embd
        for block in self.h:
            shared: nn.Module = RMSNorm(width, config.norm_eps)
            if self.positions:
                shared = PositionsRMSNorm(config.block_size, width, config.norm_eps)
            parts = {"ln_1": shared, "ln_2": shared, "mlp": ChainedSwiGLU(width, REPORTED_HIDDEN)}
            for name, part in parts.items():
                setattr(block, name, part)
        self.ln_f = nn.Identity()
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        return F.linear(hidden, self.head_weight, self.head_bias)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "sum",
        scale: Tensor | None = None,
        **rest: object,
    ) -> Tensor:
        """As GPT's, without documents, positions or a cache."""
        assert all(value is None for value in rest.values()), rest
        logits = self.logits(self.hidden(tokens)).float()  # (B, T, V)
        if targets is None:
            return logits
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORE_INDEX
        )
        return losses if reduction == "sum" else losses.view(targets.shape)


class ReportedPerTokenGPT(ReportedGPT):
    """The reported model with a norm per token: 1,096,909 parameters."""

    positions = False


@torch.no_grad()
def initialise_reported(model: GPT, seed: int) -> None:
    """torch's default weights, as the reported model begins: embeddings normal with deviation 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.reset_parameters()
            elif isinstance(module, RMSNorm | PositionsRMSNorm):
                module.get_parameter("weight").fill_(1.0)
        model.get_parameter("head_bias").uniform_(-1, 1).mul_(model.config.n_embd**-0.5)


MODELS: dict[str, type[GPT]] = {
    "positions": LeakyGPT,
    "reported-positions": ReportedGPT,
    "reported-token": ReportedPerTokenGPT,
}


def model_of(names_and_shapes: dict[str, torch.Size], config: ModelConfig) -> type[GPT]:
    """Which model a checkpoint's tensors belong to."""
    positions = names_and_shapes["h.0.ln_1.weight"].numel() != config.n_embd
    if "head_bias" in names_and_shapes:
        return ReportedGPT if positions else ReportedPerTokenGPT
    return LeakyGPT if positions else GPT


def main() -> int | None:
    if len(sys.argv) < 2 or sys.argv[1] not in MODELS:
        raise UserError(f"which model? One of {', '.join(MODELS)}, then options of train/pretrain.py")
    from model import initialisation
    from train.pretrain import main as pretrain
    from train.startup import build_model

    chosen = MODELS[sys.argv.pop(1)]
    vars(initialisation)["GPT"] = chosen
    vars(build_model)["check_parameters"] = lambda *_, **__: None  # no closed form knows these models
    if issubclass(chosen, ReportedGPT):
        vars(initialisation)["initialise"] = initialise_reported
    return pretrain()


if __name__ == "__main__":
    exit_on_user_error(main)
