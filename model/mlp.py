"""The feed-forward half of a block. B batch, T sequence, C width, F hidden width."""

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig


class MLP(nn.Module):
    """Two matrices and a non-linearity between, or three with a gate (SwiGLU).

    `project` and `finish` are apart so that a block can recompute the norm together with the projection after it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        if self.kind == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, C) to the hidden width: (B, T, F), twice for SwiGLU (values, then gates)."""
        return (self.c_fc(x), self.c_gate(x)) if self.kind == "swiglu" else (self.c_fc(x),)

    def finish(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        """The non-linearity and the projection back: (B, T, C)."""
        if gate is not None:
            activated = F.silu(gate) * hidden
        elif self.kind == "relu2":
            activated = F.relu(hidden).square()
        else:
            activated = F.gelu(hidden, approximate="tanh" if self.kind == "gelu" else "none")
        return F.dropout(self.c_proj(activated), self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.finish(*self.project(x))
