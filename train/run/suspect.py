"""Which rank a hanging run waits for: a judgement from the ranks' heartbeats as one of them has seen them.

All ranks do the same acts in the same order, so whoever has done the fewest is the one that the others wait for. But a
rank whose heartbeat itself stands still is stopped, or stuck where not even its other thread runs. What can't be read
is unknown, never guilty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STILL_SECONDS = 30.0  # without a new beat, of which there is one every 5 s
SHORTEST_STILL_SECONDS = 12.0  # whatever `run.hang_seconds` is


@dataclass(frozen=True)
class Sighting:
    """A rank's newest heartbeat, as one watcher has seen it since its own progress stands still.

    Attributes:
        still_for: seconds, by the watcher's own clock, for which this has been the newest.
        is_newer: an older one has been seen before: this one tells where the rank stands now.
    """

    beat: Mapping[str, Any]  # as `heartbeat.Beat`
    still_for: float
    is_newer: bool


@dataclass(frozen=True)
class Suspect:
    """rank: None where no rank is behind. why: for people. node: the rank's machine; "" where it is not known."""

    rank: int | None
    why: str
    node: str = ""

    def __str__(self) -> str:
        return self.why


def find_suspect(
    sightings: Mapping[int, Sighting], me: int, *, stalled_for: float, patience: float, whole: bool
) -> Suspect | None:
    """Who is waited for; None while nobody can be blamed.

    Args:
        sightings: of all ranks that this one watches and could read, itself among them.
        me: this rank. Where its own beat, as read from the disk, stands still, so may everybody's: the disk is away.
        stalled_for: seconds without any act of this rank.
        patience: from how many on that is a hang.
        whole: whether all ranks are watched. Who does not see all blames none but those that stand still.
    """
    still_seconds = min(STILL_SECONDS, max(SHORTEST_STILL_SECONDS, patience))
    if me not in sightings or sightings[me].still_for >= still_seconds:
        return None
    others = {rank: sighting for rank, sighting in sightings.items() if rank != me}
    still = {rank: sighting for rank, sighting in others.items() if sighting.still_for >= still_seconds}
    if still:
        rank = max(still, key=lambda rank: (still[rank].still_for, -rank))
        return _named(rank, still[rank].beat, f"silent for {still[rank].still_for:.0f} s")
    if stalled_for < patience or not whole or not all(sighting.is_newer for sighting in sightings.values()):
        return None
    fewest = min(sighting.beat["acts"] for sighting in sightings.values())
    behind = [rank for rank, sighting in sightings.items() if sighting.beat["acts"] == fewest]
    if len(sightings) > 1 and len(behind) == len(sightings):
        return Suspect(None, f"no rank is behind: network or disk, no progress for {stalled_for:.0f} s")
    return _named(behind[0], sightings[behind[0]].beat, f"no progress for {stalled_for:.0f} s")


def _named(rank: int, beat: Mapping[str, Any], silence: str) -> Suspect:
    host = str(beat.get("host", "an unknown host"))
    why = f"rank {rank} on {host}, step {beat['step']}, in {beat['act']}, {silence}"
    return Suspect(rank, why, node_of(beat))


def node_of(beat: Mapping[str, Any]) -> str:
    """The machine from which a heartbeat comes."""
    return str(beat.get("node") or beat.get("host", ""))
