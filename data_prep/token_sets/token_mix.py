"""Several token sets that a run reads together. They have one tokenizer; each keeps its own order of sequences."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import UserError
from common.publish import canonical_json
from data_prep.token_sets.token_set import TokenSet


@dataclass(frozen=True)
class Source:
    """One of the sets, by its name in the mix. `share`: of validation's weighted mean; those of a mix sum to 1."""

    name: str
    tokens: TokenSet
    share: float = 1.0
    max_epochs: float | None = None


class TokenMix(TokenSet):
    """Several sets in the place of one: what is asked of one set is answered by the first, their identity by all."""

    def __init__(self, sources: Sequence[Source], order: Any) -> None:
        """Args: order: what decides which source is read when, as JSON.

        Raises UserError where the sets' tokenizers differ, which no model could read together.
        """
        first = sources[0]
        super().__init__(first.tokens.folder, first.tokens.manifest)
        self.sources, self.order = tuple(sources), order
        for source in sources:
            theirs, ours = source.tokens.tokenizer_spec, first.tokens.tokenizer_spec
            if theirs["sha256"] != ours["sha256"]:
                raise UserError(
                    f"data.mix: {source.name} has a {theirs['kind']} tokenizer of {theirs['vocab_size']} ids, "
                    f"{first.name} another one ({ours['kind']}, {ours['vocab_size']}): prepare them with one tokenizer"
                )

    @cached_property
    def identities(self) -> dict[str, str]:
        """Of each set, by name."""
        return {source.name: source.tokens.identity for source in self.sources}

    @property
    def identity(self) -> str:
        """SHA-256 of the sets, in their order in the mix, and of the order in which they are read."""
        sets = list(self.identities.items())  # equal shares of other sources would be other data
        return hashlib.sha256(canonical_json(["mix", sets, self.order]).encode()).hexdigest()

    def with_sets(self, sets: Mapping[str, TokenSet]) -> "TokenMix":
        """The same mix of copies elsewhere."""
        sources = [Source(s.name, sets[s.name], s.share, s.max_epochs) for s in self.sources]
        return TokenMix(sources, self.order)


def sources_of(tokens: TokenSet) -> tuple[Source, ...]:
    """Those of a mix; a single set by itself, without a name."""
    return tokens.sources if isinstance(tokens, TokenMix) else (Source("", tokens),)
