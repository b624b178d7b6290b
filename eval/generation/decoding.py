"""The cached decoding engine: prompts go in side by side, tokens come out one per row and step.

    decoding = Decoding(model, [prompt, other_prompt], Sampling(top_k=40), count=100, samples=3, seed=0, end_ids=[0])
    for step in decoding:             # [(row, token), …] of one step
        decoding.finish(row)          # ends a row early, as a stop string does

A prompt is computed once (prefill) and its keys and values cloned for its samples; then every step computes one token
per row. Sample j of a prompt draws from a generator of its own, so it is the same text whatever else is generated
beside it. B rows, T sequence, V padded vocabulary.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import UserError
from eval.generation.options import Sampling
from eval.generation.sampling import choose_tokens
from model.cache import KVCache
from model.config import ModelConfig
from model.gpt import GPT

COUNT, END, STOPPED, FULL = "count", "end of text", "stop string", "context full"  # why a row ended


@dataclass
class Row:
    """A text being generated.

    Attributes:
        prompt, sample: which prompt it continues, and which sample of it this is.
        tokens: prompt and continuation.
        generated: tokens of the continuation, an end of text not counted.
        ended: why it ended, or None while it continues.
    """

    prompt: int
    sample: int
    tokens: list[int]
    generator: torch.Generator = field(repr=False)
    generated: int = 0
    ended: str | None = None

    @property
    def continuation(self) -> list[int]:
        return self.tokens[len(self.tokens) - self.generated :]


def goes_on(config: ModelConfig) -> bool:
    """Whether texts may outgrow block_size: rotary positions, and no layer that looks farther back than its window."""
    return config.position == "rope" and all(w is not None and w <= config.block_size for w in config.windows)


def context_start(length: int, block_size: int, slide: int) -> int:
    """The first token that a text of `length` tokens still sees: a full context forgets its `slide` oldest tokens."""
    return -(-max(0, length - block_size) // slide) * slide


class Decoding:
    """Continuations of prompts, each of `count` tokens or until it ends.

    Args:
        model: in evaluation mode; its device and dtype are used.
        prompts: token ids, at least one each; lengths may differ.
        count: most tokens to generate for each row.
        samples: continuations per prompt, side by side.
        seed: sample j of every prompt depends only on (seed, j).
        end_ids: the tokens that end a text, kept out of it; empty: there are none, or they should be ignored.
        slide: tokens to forget at once where a model that can't go past block_size has a full context; None: the row
            ends there. 1 gives the most context and recomputes it for every token.

    Raises UserError for an empty prompt, or one that fills the context of a model that can neither continue nor slide;
    and during generation where the logits are NaN or inf.
    """

    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        count: int,
        samples: int = 1,
        seed: int = 0,
        end_ids: Collection[int] = (),
        slide: int | None = None,
    ) -> None:
        assert not model.training, "decoding needs a model in evaluation mode"
        assert slide is None or 1 <= slide <= model.config.block_size
        self._model = model
        self._sampling = sampling
        self._count = count
        self._end_ids = frozenset(end_ids)
        self._slide = slide
        self._endless = goes_on(model.config)
        self._device = next(model.parameters()).device
        self._check(prompts)
        self.rows = [
            Row(prompt, sample, list(tokens), torch.Generator().manual_seed(_seed_of(seed, sample)))
            for prompt, tokens in enumerate(prompts)
            for sample in range(samples)
        ]
        self._prompts = prompts
        self._live = list(range(len(self.rows)))  # rows of the cache and of the logits, in their order
        self._cache: KVCache | None = None

    def finish(self, row: int, why: str = STOPPED) -> None:
        """End a row; to be called between steps."""
        self.rows[row].ended = self.rows[row].ended or why

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self._count == 0:
            for row in self.rows:
                row.ended = COUNT
            return
        logits = self._begin()
        seen = self._seen() if self._sampling.repetition_penalty != 1 else None
        while True:
            generators = [self.rows[index].generator for index in self._live]
            tokens = choose_tokens(logits, self._sampling, generators, seen)  # (B, 1)
            if seen is not None:
                seen.scatter_(1, tokens, True)
            yield self._take(tokens)
            kept = [place for place, index in enumerate(self._live) if self.rows[index].ended is None]
            if not kept:
                return
            if len(kept) < len(self._live):
                tokens, seen = self._keep(kept, tokens, seen)
            logits = self._advance(tokens)

    def _check(self, prompts: list[list[int]]) -> None:
        block_size = self._model.config.block_size
        for tokens in prompts:
            if not tokens:
                raise UserError("the prompt is empty, and there is nothing to continue: give it some text")
            if len(tokens) > block_size and not self._endless and self._slide is None:
                raise UserError(
                    f"the prompt has {len(tokens)} tokens, and the model's context holds {block_size}: shorten it, or "
                    "let the context slide (--slide)"
                )

    def _take(self, tokens: Tensor) -> list[tuple[int, int]]:
        """Give every live row its token of (B, 1); return (row, token) of those that belong to texts."""
        texts = []
        for index, token in zip(self._live, tokens[:, 0].tolist(), strict=True):
            row = self.rows[index]
            if token in self._end_ids:
                row.ended = END
                continue
            row.tokens.append(token)
            row.generated += 1
            texts.append((index, token))
            if row.generated == self._count:
                row.ended = COUNT
            elif len(row.tokens) > self._model.config.block_size and not self._endless and self._slide is None:
                row.ended = FULL
        return texts

    def _begin(self) -> Tensor:
        """Prefill each prompt once and clone it for its samples: (B, V) logits."""
        logits = self._prefill(self._prompts)
        assert self._cache is not None
        if len(self.rows) > len(self._prompts):
            rows = torch.tensor([row.prompt for row in self.rows], device=self._device)
            self._cache = self._cache.select(rows)
            logits = logits[rows]
        return logits

    def _advance(self, tokens: Tensor) -> Tensor:
        """The live rows' next (B, V) logits after the (B, 1) tokens they just chose."""
        assert self._cache is not None
        if self._cache.has_room(1) and (self._endless or self._cache.longest < self._model.config.block_size):
            return self._model.next_logits(tokens, self._cache)
        # full: a text slides, or the longest row has ended and a new cache has room for the others
        return self._prefill([self.rows[index].tokens for index in self._live])

    def _prefill(self, texts: list[list[int]]) -> Tensor:
        """Fill a new cache with what these texts still see: (B, V) logits."""
        contexts = [text[self._start_of(text) :] for text in texts]
        lengths = torch.tensor([len(context) for context in contexts], device=self._device)  # (B)
        longest = max(map(len, contexts))
        padded = torch.zeros(len(contexts), longest, dtype=torch.int64, device=self._device)  # (B, T)
        for place, context in enumerate(contexts):
            padded[place, : len(context)] = torch.tensor(context, device=self._device)
        block_size = self._model.config.block_size
        capacity = block_size if self._endless else min(block_size, longest + self._count)
        self._cache = KVCache(self._model.config, len(contexts), capacity)
        uniform = all(len(context) == longest for context in contexts)
        return self._model.next_logits(padded, self._cache, None if uniform else lengths)

    def _start_of(self, text: list[int]) -> int:
        if self._endless:
            return 0
        return context_start(len(text), self._model.config.block_size, self._slide or 1)

    def _keep(self, kept: list[int], tokens: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Continue only with these B' places: tokens (B, 1) to (B', 1), `seen` (B, V) to (B', V)."""
        assert self._cache is not None
        places = torch.tensor(kept, device=self._device)
        self._live = [self._live[place] for place in kept]
        self._cache = self._cache.select(places)
        return tokens[places], None if seen is None else seen[places]

    def _seen(self) -> Tensor:
        """(B, V) bool: which tokens each row's text has."""
        seen = torch.zeros(len(self.rows), self._model.config.padded_vocab_size, dtype=torch.bool)  # (B, V)
        for place, row in enumerate(self.rows):
            seen[place, row.tokens] = True
        return seen.to(self._device)


def _seed_of(seed: int, sample: int) -> int:
    """A generator's seed for each sample; neighbouring seeds share no texts."""
    mixed = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, 2**62, (sample + 1,), generator=mixed)[sample])
