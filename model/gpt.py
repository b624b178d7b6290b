"""The GPT: embeddings, blocks, head and loss. B batch, T sequence, C width, V padded vocabulary."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from model.attention import Attention, AttentionContext
from model.attention_kinds import ATTENTION_KINDS
from model.attention_masks import kernels_for, see_before
from model.cache import CacheStep, KVCache
from model.chunk_kernel import ChunkKernel
from model.config import ModelConfig
from model.flex import flex_works
from model.loss import IGNORE_INDEX, Reduction, head_entropies, head_loss, head_losses, soft_capped
from model.mlp import MLP
from model.new_rows import TableWithNewRows, matrix_of
from model.norms import RMSNorm, build_norm
from model.positions import document_positions, rotary_angles, rotary_frequencies
from model.precision import matmul_dtype
from model.roles import Role
from model.shared_table import embed_with_shared_table

__all__ = ["GPT", "IGNORE_INDEX", "Block"]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection ("pre-norm")."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn: Attention = ATTENTION_KINDS[config.attention].implementation()(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, context: AttentionContext, recompute_norms: bool = False, *values: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, T, C) to (B, T, C); from the first block of a model with value_residual also its values, (B, T, K, D).

        Args: values: (B, T, K, D) each, what attention mixes into its own.
        """
        added, own = self.attn(x, self.ln_1, context, recompute_norms, *values)
        x = x + added
        x = x + self.mlp(x, self.ln_2, recompute_norms)
        return (x, own) if self.attn.hands_values else x


class GPT(nn.Module):
    """A decoder-only transformer whose parts its configuration chooses.

    The constructor leaves torch's default weights; `model.initialisation.initialise` fills them. There are no buffers,
    so what `initialisation.empty_gpt` builds lacks nothing but its weights.

    Attributes:
        config: what it was built from.
        recompute_every: activation checkpointing while training: 0 none, 1 every block, k every k-th block. A block
            that is recomputed keeps only its input for backward. Losses and gradients stay the same to the bit.
        recompute_norms: while training, recompute each norm together with the projection after it, which then keeps
            no input of its own: two (B, T, C) tensors a block less, for little work.
        stream_dtype: of the residual stream, which every block adds to, under autocast; None, and without
            autocast: that of the weights.
        chunk_kernel: the compiled middle of the head's loss (`chunk_kernel.compiled_kernel`); None: torch's own.
        packed_head: the output layer laid out for a CPU's kernels by `model.cpu_inference`, used for generation on a
            CPU.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_every = 0
        self.recompute_norms = False
        self.stream_dtype: torch.dtype | None = None
        self.chunk_kernel: ChunkKernel | None = None
        self.packed_head: nn.Module | None = None
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.embedding == "normed":
            self.embedding_norm = RMSNorm(config.n_embd, config.norm_eps, weight=False)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.value_embeddings:
            values = config.kv_heads * config.head_size
            self.wve = nn.ModuleList(nn.Embedding(config.vocab_size, values) for _ in range(config.value_embeddings))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config)
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.scalar_head:
            self.scalar_head = nn.Linear(config.n_embd, 1, bias=False)

    def roles(self) -> dict[str, Role]:
        """What `model.roles` asks for: of its own parameters, the blocks' and norms' being theirs."""
        tables = {"wte.weight": Role("embedding"), "wpe.weight": Role("embedding"), "lm_head.weight": Role("head")}
        tables |= {"scalar_head.weight": Role("head")}
        tables |= {f"wve.{index}.weight": Role("embedding") for index in range(self.config.value_embeddings)}
        return {name: role for name, role in tables.items() if hasattr(self, name.split(".")[0])}

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output layer's matrix, which tied models share with the token embedding."""
        return matrix_of(self.wte if self.config.tie_weights else self.lm_head)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Reduction = "sum",
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        scale: Tensor | None = None,
        z_loss: float | None = None,
        by_sequence: bool = False,
        temperature: float | None = None,
        values: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits, or the loss where targets are given, or the scalar head's values.

        Args:
            tokens: (B, T) int64 ids.
            targets: (B, T) int64, the id that follows each token; `loss.IGNORE_INDEX` counts for nothing.
            reduction: sum: a float32 scalar, the summed cross-entropy; none: (B, T) float32 per token,
                the targets' negative log-probabilities.
            positions: (T,) or (B, T) int64; None: from 0, restarting with every document.
            document_ids: (B, T) integers; attention stays inside runs of equal ids. None: one document.
            cache: the tokens continue what it holds, and are added to it.
            lengths: (B,) with a cache: real tokens of each row, the rest being padding at the right.
            scale: with targets, as `loss.head_loss` takes it.
            z_loss: with targets, as `loss.head_losses` takes it.
            by_sequence: with targets, tell also each sequence's part of the summed cross-entropy.
            temperature: with targets, return the losses of each and the entropies of the distributions that they are
                chosen from, logits divided by it; None: as `reduction` says.
            values: of a model with a scalar head: without targets return its values instead of logits; with targets
                and no z_loss or by_sequence return them beside the loss.

        Returns:
            Without targets (B, T, V) logits, the padding ids at -inf; else the loss, with z_loss also its part (), and
            with by_sequence (B,) float32, both detached; with a temperature losses and entropies, (B, T) float32 each,
            the latter detached. Values are (B, T) float32.

        Raises UserError where the learned positions end before the last token, ValueError where the cache has no room.
        """
        if targets is None:
            hidden = self.hidden(tokens, positions=positions, document_ids=document_ids, cache=cache, lengths=lengths)
            return self.values(hidden, without_loss=True) if values else self.logits(hidden)
        if self.config.tie_weights and not isinstance(self.wte, TableWithNewRows):
            embedded, head = embed_with_shared_table(tokens, self.wte.weight)  # (B, T, C), (V, C)
        else:
            embedded, head = self.wte(tokens), self.head_weight
        hidden = self._hidden(embedded, tokens, positions, document_ids, cache, lengths)
        size, cap = self.config.vocab_size, self.config.logit_softcap
        kernel = self.chunk_kernel
        if z_loss is not None or by_sequence:
            total, z, each = head_losses(hidden, head, targets, size, z_loss, scale=scale, kernel=kernel, softcap=cap)
            parts = () if z_loss is None else (z,)
            return (total, *parts, each.sum(dim=-1)) if by_sequence else (total, *parts)
        if temperature is not None:
            found = head_entropies(hidden, head, targets, size, temperature, kernel=kernel, softcap=cap)
            return (*found, self.values(hidden)) if values else found
        loss = head_loss(hidden, head, targets, size, reduction, scale=scale, kernel=kernel, softcap=cap)
        return (loss, self.values(hidden)) if values else loss

    def values(self, hidden: Tensor, *, without_loss: bool = False) -> Tensor:
        """The scalar head's values, (..., C) to (...) float32, whatever autocast multiplies in.

        Args:
            without_loss: no loss is computed beside them. DDP waits for a gradient of every trained parameter: an
                output layer of its own gets one of 0.
        """
        weight = matrix_of(self.scalar_head)[0]  # (C)
        with torch.autocast(hidden.device.type, enabled=False):
            found = hidden.float() @ weight.float()  # (...)
            if without_loss and self._keeps_activations() and not self.config.tie_weights:
                found = found + 0.0 * self.head_weight[0, 0]
        return found

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The last norm's output, (B, T, C), from which `logits` computes (B, T, V). Arguments as in `forward`."""
        return self._hidden(self.wte(tokens), tokens, positions, document_ids, cache, lengths)

    def _hidden(
        self,
        x: Tensor,
        tokens: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """`hidden` for embedded tokens x, (B, T, C)."""
        step = None
        if cache is not None:
            assert positions is None, "with a cache, positions follow from its contents: leave them out"
            assert document_ids is None, "with a cache, every row is one document: leave document_ids out"
            step = CacheStep(cache, tokens.shape[1], lengths, tokens.device)
            positions = step.positions
        elif positions is None:
            positions = self._positions(tokens, document_ids)
        if self.config.embedding == "scaled":
            x = x * self.config.n_embd**0.5
        elif self.config.embedding == "normed":
            x = self.embedding_norm(x)
        if self.config.position == "learned":
            self._check_length(tokens, cache)
            x = x + self.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        if self.stream_dtype is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.stream_dtype)  # blocks add outputs of the same dtype, so it stays
        context = self._context(tokens, positions, document_ids, step)
        with kernels_for(x.device):
            x = self._blocks(x, context, self._embedded_values(tokens))
        if step is not None:
            step.finish()
        return self.ln_f(x)

    def next_logits(self, tokens: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Logits for the token after each row's last: (B, V), the padding ids at -inf.

        Args:
            tokens: (B, T) int64: prompts, or (B, 1) the tokens just chosen.
            cache: what came before; the tokens are added to it.
            lengths: (B,) where prompts differ in length and are padded at the right.
        """
        hidden = self.hidden(tokens, cache=cache, lengths=lengths)
        if lengths is None:
            return self.logits(hidden[:, -1])
        return self.logits(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1])

    def _blocks(self, x: Tensor, context: AttentionContext, embedded: list[Tensor]) -> Tensor:
        """(B, T, C) to (B, T, C). Args: embedded: (B, T, K, D) each, of every table of value embeddings."""
        first: list[Tensor] = []  # the first block's values, which later ones mix into theirs
        for layer, block in enumerate(self.h):
            table = self.config.value_table(layer)
            values = first if table is None else [*first, embedded[table]]
            if self._recomputes(layer):
                out = checkpoint(block, x, context, False, *values, use_reentrant=False)
            else:
                out = block(x, context, self.recompute_norms and self._keeps_activations(), *values)
            if isinstance(out, tuple):
                x, own = out
                first = [own]
            else:
                x = out
        return x

    def _embedded_values(self, tokens: Tensor) -> list[Tensor]:
        """(B, T, K, D) of every table, in the dtype of the matrix products, as values are."""
        looked_up = [table(tokens) for table in self.wve] if self.config.value_embeddings else []
        return [each.to(matmul_dtype(each)).unflatten(-1, (-1, self.config.head_size)) for each in looked_up]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V), the padding ids at -inf."""
        logits = F.linear(hidden, self.head_weight) if self.packed_head is None else self.packed_head(hidden)
        if self.config.logit_softcap is not None:
            logits = soft_capped(logits, self.config.logit_softcap)
        if self.config.padded_vocab_size > self.config.vocab_size:
            padding = torch.arange(self.config.padded_vocab_size, device=logits.device) >= self.config.vocab_size
            logits = logits.masked_fill(padding, float("-inf"))
        return logits

    def _recomputes(self, layer: int) -> bool:
        every = self.recompute_every
        return every > 0 and layer % every == 0 and self._keeps_activations()

    def _keeps_activations(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _positions(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """(T) or, with documents, (B, T) int64."""
        if document_ids is not None:
            return document_positions(document_ids)  # (B, T)
        return torch.arange(tokens.shape[1], device=tokens.device)  # (T)

    def _check_length(self, tokens: Tensor, cache: KVCache | None) -> None:
        end = tokens.shape[1] + (0 if cache is None else cache.longest)
        if end > self.config.block_size:
            raise UserError(
                f"the text has {end} tokens, more than the {self.config.block_size} learned positions of this model: "
                "shorten it, or slide the context"
            )

    def _context(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None, step: CacheStep | None
    ) -> AttentionContext:
        config = self.config
        length, device = tokens.shape[1], tokens.device
        rotary = None
        if config.position == "rope":
            rotary = rotary_angles(positions, rotary_frequencies(config, device))
        masked = document_ids is not None or any(window and window < length for window in config.windows)
        drops = self.training and config.dropout > 0
        flex = step is None and masked and not drops
        flex = flex and flex_works(device, matmul_dtype(self.head_weight), config.head_size)
        visibility = {
            window: step.visibility(window) if step else see_before(length, window, document_ids, device, flex=flex)
            for window in set(config.windows)
        }
        return AttentionContext(rotary, visibility, step)
