"""What kind of runs a campaign has: on one token set, or on a staged mix of several, packed whole; branches or not."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from data_prep.token_sets.token_set import TokenSet
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import make_conversation_set, make_pairs, short_tokenizer
from tests.helpers.token_sets import make_token_set

BLOCK_SIZE = 16
MIXED_SEQUENCES = 12  # of a step: for 1, 2, 3 and 4 ranks
MIXED_TOKENS = {"web": 960, "code": 320, "books": 150}  # books is read many times over
STAGES = [
    {"until_tokens": 15 * MIXED_SEQUENCES * BLOCK_SIZE, "weights": {"web": 3, "code": 1}},
    {
        "until_tokens": 30 * MIXED_SEQUENCES * BLOCK_SIZE + 40,  # within a step
        "weights": {"web": 1, "code": 1, "books": 1},
        "ramp_tokens": 5 * MIXED_SEQUENCES * BLOCK_SIZE,
    },
    {"weights": {"books": 1, "web": 1}},
]
BRANCHED_AT = 6  # steps of the trunk, which reads web only


@dataclass(frozen=True)
class Kind:
    """spiked: with loss spikes. mixed: over a staged mix of packed sets. branched: from a run on one set of the mix.
    adapted: fine-tunings on conversations, with adapters and the rows of the tokens around turns.

    ranks: numbers of which a start has one. Several are compared within a tolerance, with a run of one rank.
    """

    spiked: bool = False
    mixed: bool = False
    branched: bool = False
    adapted: bool = False
    ranks: tuple[int, ...] = (2,)

    @property
    def sequences(self) -> int:
        """Of a step."""
        return MIXED_SEQUENCES if self.mixed else 8

    @property
    def first_step(self) -> int:
        """Where its runs start."""
        return BRANCHED_AT if self.branched else 0


def make_sets(folder: Path, kind: Kind, *, conversations: bool = False, pairs: bool = False) -> list[TokenSet]:
    """The token sets that its runs read; a trunk reads the first."""
    if pairs:
        return [make_pairs(folder, count=60)]
    if conversations:
        return [make_conversation_set(folder, count=60, val_count=10, shard_tokens=300)]
    if not kind.mixed:
        return [make_token_set(folder, train_tokens=2_001, val_tokens=500, shard_tokens=300)]
    return [
        make_token_set(folder / name, train_tokens=tokens, val_tokens=300 + 50 * seed, shard_tokens=200, seed=seed)
        for seed, (name, tokens) in enumerate(MIXED_TOKENS.items())
    ]


def make_base(folder: Path) -> Path:
    """A checkpoint without the ids of the tokens around turns, which fine-tunings on conversations start from."""
    tokenizer, shape = short_tokenizer().base.spec, {"n_layer": 2, "n_head": 2, "n_embd": 32}
    return write_checkpoint(folder, tokenizer=tokenizer, block_size=64, dropout=0.1, **shape)


def write_mix(path: Path, sets: Path) -> None:
    """The configuration of a staged mix, to be added to the others."""
    mix = [{"name": name, "path": str(sets / name)} for name in MIXED_TOKENS]
    path.write_text(yaml.safe_dump({"data": {"mix": mix, "stages": STAGES}}), encoding="utf-8")
