"""Who is waited for, judged from heartbeats alone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.run.suspect import STILL_SECONDS, Sighting, find_suspect


def beat(acts: int, act: str = "forward") -> dict[str, Any]:
    return {"step": 7, "act": act, "acts": acts, "host": "node7"}


def seen(acts: int, still_for: float = 2.0, *, is_newer: bool = True) -> Sighting:
    return Sighting(beat(acts), still_for, is_newer)


def suspect(
    sightings: dict[int, Sighting], *, me: int = 0, stalled: float = 70.0, patience: float = 60.0, whole: bool = True
) -> str:
    return str(find_suspect(sightings, me, stalled_for=stalled, patience=patience, whole=whole) or "")


@pytest.mark.parametrize(
    ("sightings", "words"),
    [
        ({0: seen(90), 1: seen(90), 2: seen(89)}, "rank 2 on node7, step 7, in forward, no progress for 70 s"),
        ({0: seen(89), 1: seen(90)}, "rank 0 on node7, step 7, in forward, no progress for 70 s"),
        ({0: seen(90), 1: seen(90)}, "no rank is behind: network or disk, no progress for 70 s"),
        ({0: seen(90)}, "rank 0 on node7, step 7, in forward, no progress for 70 s"),  # there is no other
        ({0: seen(90), 1: seen(95, 44.0)}, "rank 1 on node7, step 7, in forward, silent for 44 s"),
        ({0: seen(90), 1: seen(95, 44.0), 2: seen(1)}, "rank 1 on node7, step 7, in forward, silent for 44 s"),
        ({0: seen(90), 1: seen(90, 31.0), 2: seen(90, 44.0)}, "rank 2 on node7, step 7, in forward, silent for 44 s"),
        ({0: seen(90), 1: seen(80, is_newer=False)}, ""),  # where it stands now is not known yet
        ({0: seen(90, 44.0), 1: seen(80, 44.0)}, ""),  # nor here: no beat comes to the disk, not even this rank's
        ({1: seen(80)}, ""),
    ],
)
def test_who_is_waited_for(sightings: dict[int, Sighting], words: str) -> None:
    assert suspect(sightings) == words


def test_a_hang_is_one_only_after_a_while() -> None:
    assert suspect({0: seen(90), 1: seen(80)}, stalled=59.0) == ""
    assert suspect({0: seen(90), 1: seen(80, 31.0)}, stalled=40.0) != ""  # a process that stands still is known sooner
    assert suspect({0: seen(90), 1: seen(90, 13.0)}, stalled=14.0, patience=5.0) != ""  # as soon as is asked for


def test_who_does_not_see_all_blames_only_those_that_stand_still() -> None:
    assert suspect({0: seen(80), 1: seen(90)}, me=1, whole=False) == ""
    assert "rank 0" in suspect({0: seen(95, 31.0), 1: seen(90)}, me=1, whole=False)


SIGHTINGS = st.builds(seen, st.integers(0, 3), st.floats(0, 60), is_newer=st.booleans())


@given(st.dictionaries(st.integers(0, 5), SIGHTINGS), st.floats(0, 200), st.booleans())
def test_nobody_is_blamed_without_a_reason(sightings: dict[int, Sighting], stalled: float, whole: bool) -> None:
    found = find_suspect(sightings, 0, stalled_for=stalled, patience=60.0, whole=whole)
    if found is None or found.rank is None:
        return
    blamed = sightings[found.rank]
    fewest = blamed.beat["acts"] == min(sighting.beat["acts"] for sighting in sightings.values())
    assert blamed.still_for >= STILL_SECONDS or (whole and stalled >= 60.0 and fewest and blamed.is_newer)
