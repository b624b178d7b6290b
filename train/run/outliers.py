"""Which of several machines that should be alike is not: by how far it falls short of the others' median."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

DEVIATIONS = 4.0  # robust standard deviations below the median
FEW = 4  # of fewer, the deviation says little: they have to fall short twice as far
TO_STANDARD = 1.4826  # from the median absolute deviation to a normal distribution's standard deviation


def medians(rates: npt.NDArray[np.float64], kinds: Sequence[Hashable]) -> npt.NDArray[np.float64]:
    """For each of the rates (n,), the median of all of its kind that are known; NaN where there is none.

    Of an even number it is the upper one, which of two is the faster one's.
    """
    found = np.full(len(rates), np.nan)
    for kind in set(kinds):
        mine = np.array([other == kind for other in kinds])
        known = np.sort(rates[mine & np.isfinite(rates)])
        if len(known):
            found[mine] = known[len(known) // 2]
    return found


def outliers(rates: npt.NDArray[np.float64], kinds: Sequence[Hashable], least_share: float) -> list[int]:
    """The places of those that are far slower than the others.

    Args:
        rates: (n,), more is better; what is not finite is unknown, and neither judged nor compared with.
        kinds: (n,): only those of one kind are compared.
        least_share: of its kind's median, which a healthy one always reaches.
    """
    found = []
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind and np.isfinite(rates[place])]
        if len(places) < 2:
            continue
        known = rates[places]
        median = np.sort(known)[len(known) // 2]
        deviation = TO_STANDARD * np.sort(np.abs(known - median))[(len(known) - 1) // 2]
        share = least_share / 2 if len(known) < FEW else least_share
        limit = min(share * median, median - DEVIATIONS * deviation if len(known) >= FEW else median)
        found += [place for place in places if rates[place] < limit]
    return sorted(found)
