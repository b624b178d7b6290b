"""Which faults a campaign inflicts, all drawn from its seed."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tests.chaos.phases import BEFORE_CONFIGURATION, ENTRIES, FIRST_RANK_ONLY, PHASES, SAVING, Moment, Trap

KILL, STOP_FILE, DISK_FULL = "kill -9", "STOP file", "disk full"
SECOND_TRAINER, WANDB_SILENT, WANDB_STOPPED = "second trainer", "wandb: silent server", "wandb: service stopped"
CHECKPOINT_TRUNCATED, CHECKPOINT_FLIPPED = "checkpoint truncated", "bit flipped in checkpoint"
SHARD_TRUNCATED, SHARD_FLIPPED = "shard truncated", "bit flipped in shard"
FREEZE, SLOW = "freeze", "slow"
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
ONE_RANK, ALL_RANKS, LAUNCHER, ALL = "one rank", "all ranks", "launcher", "all"
BETWEEN_STARTS = "between starts"

# of a thousand faults; a kill in each phase is 50, so that 200 faults hold 10 of each
WEIGHTS: dict[tuple[str, str], float] = {
    **{(KILL, phase): 50 for phase in PHASES},
    **{(name, target): 12 for name in SIGNALS for target in (ONE_RANK, ALL_RANKS, LAUNCHER)},
    (FREEZE, ""): 48,
    (SLOW, ""): 36,
    (DISK_FULL, ""): 54,
    (STOP_FILE, ""): 46,
    (SECOND_TRAINER, ""): 46,
    (WANDB_SILENT, ""): 18,
    (WANDB_STOPPED, ""): 18,
    (CHECKPOINT_TRUNCATED, BETWEEN_STARTS): 40,
    (CHECKPOINT_FLIPPED, BETWEEN_STARTS): 40,
    (SHARD_TRUNCATED, BETWEEN_STARTS): 30,
    (SHARD_FLIPPED, BETWEEN_STARTS): 30,
}
MOMENTS: tuple[Moment, ...] = ("before", "during", "after")
SLOW_SECONDS = 0.5  # a step without a launcher
SLOWED_SECONDS = 0.1  # a step of a rank that is to be slowed, so that there is time for it
LONGEST_DELAY_SECONDS = 0.02  # how long after a rank entered the phase a fault `during` it comes


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        target: whom it hits (a kill, a signal).
        trap: where a rank tells that the moment has come; None for what is done between two starts.
        delay_seconds: from there to the fault, for a trap that does not hold the rank.
        executed: start the trainer by exec, not by fork.
        seed: of further choices (which file, which byte).
        ranks: of the start that it hits.
    """

    number: int
    kind: str
    phase: str
    target: str
    trap: Trap | None
    delay_seconds: float
    executed: bool
    seed: int
    ranks: int = 2


def draw(
    count: int,
    seed: int,
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    executed_share: float = 0.25,
    ranks: Sequence[int] = (2,),
) -> list[Fault]:
    """`count` faults in random order, of every kind its share to within one.

    Args:
        only, without: kinds to take, or not to. executed_share: of starts by exec. ranks: numbers of which a start has
            one.
    """
    chance, of_ranks = random.Random(f"chaos {seed}"), random.Random(f"ranks {seed}")
    kinds = [
        (kind, weight) for kind, weight in WEIGHTS.items() if kind[0] not in without and (not only or kind[0] in only)
    ]
    chance.shuffle(kinds)
    # systematic sampling: one point in each of `count` equal parts of the line that the weights lie along
    total = sum(weight for _, weight in kinds)
    offset = chance.random()
    chosen, end, number = [], 0.0, 0
    for kind, weight in kinds:
        end += weight / total * count
        while number + offset < end:
            chosen.append(kind)
            number += 1
    chosen += [kinds[-1][0]] * (count - len(chosen))  # a rounding error
    chance.shuffle(chosen)
    targets = Cycle(chance)
    return [
        _fault(number, kind, place, targets, chance.random() < executed_share, chance, of_ranks.choice(ranks))
        for number, (kind, place) in enumerate(chosen, 1)
    ]


class Cycle:
    """Deals the targets of kills evenly in each phase."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._stacks: dict[str, list[str]] = {}

    def deal(self, phase: str) -> str:
        stack = self._stacks.setdefault(phase, [])
        if not stack:
            stack += self._chance.sample([ONE_RANK, LAUNCHER, ALL], 3)
        return stack.pop()


def _fault(
    number: int, kind: str, place: str, targets: Cycle, executed: bool, chance: random.Random, ranks: int
) -> Fault:
    seed = chance.randrange(1 << 32)
    if place == BETWEEN_STARTS:
        return Fault(number, kind, place, "file", None, 0.0, executed, seed, ranks)
    target = {KILL: "", DISK_FULL: "disk", SECOND_TRAINER: "run's folder", STOP_FILE: "run's folder"}.get(kind, place)
    if kind == KILL:
        phase = place
        target = targets.deal(phase)
    elif kind == DISK_FULL:
        phase = chance.choice([*SAVING, "forward", "validation"])
    elif kind in (WANDB_SILENT, WANDB_STOPPED):
        phase, target = "forward", "wandb"
    elif kind in (FREEZE, SLOW):
        phase, target = chance.choice(PHASES if kind == FREEZE else PHASES[1:]), ONE_RANK
    elif kind == SECOND_TRAINER:
        phase = chance.choice(PHASES[1:])
    else:
        phase = chance.choice(PHASES)
    rank = 0 if phase in FIRST_RANK_ONLY else chance.randrange(ranks)
    entry = chance.randint(1, ENTRIES[phase])
    if kind == FREEZE and phase == "start":
        entry = max(entry, BEFORE_CONFIGURATION + 1)  # before that it takes ten minutes to be ended
    if kind in (WANDB_SILENT, WANDB_STOPPED, DISK_FULL, SECOND_TRAINER):
        moment: Moment = "before"  # the rank waits: what is done to it takes longer than the tiny run
    else:
        moment = chance.choice(MOMENTS)
    slow_seconds = SLOW_SECONDS if target == LAUNCHER else SLOWED_SECONDS if kind == SLOW else 0.0
    trap = Trap(rank, phase, entry, moment, slow_seconds)
    delay = chance.uniform(0.0, LONGEST_DELAY_SECONDS) if moment == "during" else 0.0
    return Fault(number, kind, phase, target, trap, delay, executed, seed, ranks)
