"""The feed-forward half of a block. B batch, T sequence, C width, F hidden width."""

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.norms import project_normed
from model.roles import Role, linear_roles


class MLP(nn.Module):
    """Two matrices and a non-linearity between, or three with a gate (SwiGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        if self.kind == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def roles(self) -> dict[str, Role]:
        layers = self.named_children()
        return {name: role for layer in layers for name, role in linear_roles(*layer).items()}

    def forward(self, x: Tensor, norm: nn.Module, recompute_norm: bool = False) -> Tensor:
        """What the MLP adds to the residual stream x: (B, T, C) to (B, T, C).

        Args:
            norm: the block's, which comes first. recompute_norm: work it out again in backward (`project_normed`).
        """
        ways_in = (self.c_fc, self.c_gate) if self.kind == "swiglu" else (self.c_fc,)
        hidden, *gates = project_normed(norm, ways_in, x, recompute_norm)  # (B, T, F) each
        if self.kind == "swiglu":
            activated = F.silu(gates[0]) * hidden
        elif self.kind == "relu2":
            activated = F.relu(hidden).square()
        else:
            activated = F.gelu(hidden, approximate="tanh" if self.kind == "gelu" else "none")
        return F.dropout(self.c_proj(activated), self.dropout, self.training)
