"""The phases of a run that a fault can hit, and how the harness tells a rank where to wait for it."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

# phase: how many entries of it a trap may count on in one start (see the configuration in campaign.py)
ENTRIES = {
    "start": 4,  # before the imports, before the ranks connect, before the model is built, before a checkpoint is read
    "forward": 8,
    "backward": 8,
    "optimizer": 4,
    "snapshot": 2,
    "write": 4,
    "hash": 4,
    "rename": 2,
    "validation": 2,
}
PHASES = tuple(ENTRIES)
MORE_ENTRIES = {"data": 8, "agreement": 8, "end": 1}  # which freezes of `freezes.py` hit, too
BEFORE_CONFIGURATION, BEFORE_MEETING = 1, 2  # entries of a start up to which a rank has no limit, and no peers, yet
SAVING = ("snapshot", "write", "hash", "rename")
FIRST_RANK_ONLY = ("rename",)  # rank 0 publishes

MARK_VARIABLE = "CHAOS_MARK"  # stands in the environment of every process of one start
TRAP_VARIABLE = "CHAOS_TRAP"
SOCKET_VARIABLE = "CHAOS_SOCKET"  # name of an abstract Unix socket that the harness listens at
NO_MARK = "0" * 16
BROKEN_HOOK_STATUS = 77  # a function that a trap wraps is no longer there

Moment = Literal["before", "during", "after"]


@dataclass(frozen=True)
class Trap:
    """Where one rank reports to the harness: at the `entry`-th entry of `phase`.

    moment: before or after the phase's function the rank waits until it is told to go on; `during` it reports and goes
    on, so that the fault comes at a random instant. slow_seconds: added to every step from then on, where the fault
    takes time to be noticed and a tiny run would be over before.
    """

    rank: int
    phase: str
    entry: int
    moment: Moment
    slow_seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Trap":
        return Trap(**json.loads(text))
