"""The law by which final losses fall with compute, L(C) = E + A·C^-α, fitted to runs of several sizes or budgets.

The form is Kaplan et al.'s (2020) with the floor E of Hoffmann et al. (2022). What is minimised is the sum, not the
mean, of squared differences of logarithms: with the mean, Hoffmann's fit stopped early (Besiroglu et al., 2024).
Squares, not Huber's loss: of so few points none can be seen to be an outlier. For each exponent the other two follow,
so that every exponent of a grid is a start, and the best one is refined.

Intervals are those of the likelihood's profile: all laws whose sum of squares is not larger by more than an F-test
allows. Points are means over seeds of whole runs, each at its own compute, and count alike. N points, G exponents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from eval.comparison.differences import LEVEL

Values = npt.NDArray[np.float64]
Interval = tuple[float, float]

FEWEST = 6  # points: three are the law's own
EXPONENTS = np.geomspace(0.01, 4.0, 200)  # no law of losses is outside
INSIDE = 120  # exponents at which an interval is searched
STEPS = 8  # of Gauss and Newton, which converge in three
ALIKE = 0.01  # amounts of compute that differ by less are one point
AHEAD = (2.0, 10.0)  # times the largest compute, where the law is extrapolated


@dataclass(frozen=True)
class Law:
    """Loss = floor + scale · compute^-exponent."""

    floor: float
    scale: float
    exponent: float

    def at(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.exponent


@dataclass(frozen=True)
class Predicted:
    """The loss that a run has at a compute, by the law; the interval has the scatter of a point, too."""

    compute: float
    loss: float
    interval: Interval


@dataclass(frozen=True)
class Fitted:
    """A law and how sure it is. Attributes: compute, losses: (N,), growing compute."""

    compute: Values
    losses: Values
    law: Law

    @cached_property
    def squares(self) -> float:
        return float(np.sum(np.log(self.losses / [self.law.at(each) for each in self.compute]) ** 2))

    @property
    def freedom(self) -> int:
        return len(self.losses) - 3

    @property
    def scatter(self) -> float:
        """Standard deviation of a point from the law, as a fraction of its loss."""
        return math.sqrt(self.squares / self.freedom)

    @property
    def limit(self) -> float:
        """The largest sum of squares of a law inside the interval."""
        return self.squares * (1 + float(special.fdtri(1, self.freedom, LEVEL)) / self.freedom)

    @cached_property
    def exponents(self) -> Interval:
        """Interval of the exponent; no wider than `EXPONENTS`."""
        grid = np.union1d(EXPONENTS, [self.law.exponent])
        x = self._x
        inside = np.flatnonzero(_solve(grid, x, self.losses).squares <= self.limit)
        inside = inside if len(inside) else np.flatnonzero(grid == self.law.exponent)

        def beyond(exponent: float) -> float:
            return float(_solve(np.array([exponent]), x, self.losses).squares[0]) - self.limit

        def edge(within: int, outside: int) -> float:
            if not 0 <= outside < len(grid) or beyond(grid[within]) >= 0:
                return float(grid[within])
            return float(optimize.brentq(beyond, grid[within], grid[outside], xtol=1e-12))

        return edge(inside[0], inside[0] - 1), edge(inside[-1], inside[-1] + 1)

    @property
    def floors(self) -> Interval:
        return self._range(math.inf)

    def predict(self, compute: float) -> Predicted:
        loss = self.law.at(compute)
        low, high = self._range(compute)
        scatter = float(special.stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.scatter * loss
        return Predicted(
            compute, loss, (loss - math.hypot(loss - low, scatter), loss + math.hypot(high - loss, scatter))
        )

    @cached_property
    def _centre(self) -> float:
        return float(np.mean(np.log(self.compute)))

    @property
    def _x(self) -> Values:
        return np.asarray(np.log(self.compute) - self._centre)

    def _range(self, compute: float) -> Interval:
        """Of the law's loss at a compute, inf for its floor: that of all laws with a sum of squares up to `limit`."""
        exponents = np.linspace(*self.exponents, INSIDE)
        solved = _solve(exponents, self._x, self.losses)
        at = np.exp(-exponents * (math.log(compute) - self._centre)) if math.isfinite(compute) else np.zeros(INSIDE)
        ends = np.concatenate(solved.ends(at, self.limit))
        ends = np.append(ends[np.isfinite(ends)], self.law.at(compute) if math.isfinite(compute) else self.law.floor)
        return float(ends.min()), float(ends.max())


@dataclass(frozen=True)
class _Solved:
    """Floor and scale (G,) of each exponent, with no bound (`free_…`) and with a floor of 0 or more.

    Attributes:
        information: (G, 3), of floor, of both, of scale: the free sum of squares grows with them as a quadratic form.
    """

    free_floor: Values
    free_scale: Values
    free_squares: Values
    floor: Values
    scale: Values
    squares: Values
    information: Values

    def ends(self, at: Values, limit: float) -> tuple[Values, Values]:
        """The lowest and the highest of floor + scale · `at` (G,) with squares up to `limit`; NaN where none has."""
        ff, fs, ss = self.information.T
        determinant = ff * ss - fs * fs
        toward = np.stack([ss - fs * at, ff * at - fs]) / determinant  # information's inverse · (1, at)
        variance = toward[0] + toward[1] * at
        with np.errstate(invalid="ignore"):  # the root of what is negative: no law of this exponent is inside
            room = np.sqrt(limit - self.free_squares)
            # where the floor is 0, the scale has a quadratic equation
            turn = (fs * self.free_floor) ** 2 - ss * (ff * self.free_floor**2 - (limit - self.free_squares))
            root = np.sqrt(turn)
        found = []
        for side in (-1.0, 1.0):
            floor = self.free_floor + side * toward[0] / np.sqrt(variance) * room
            value = self.free_floor + self.free_scale * at + side * np.sqrt(variance) * room
            on_line = (self.free_scale + (fs * self.free_floor + side * root) / ss) * at
            found.append(np.where(floor >= 0, value, on_line))
        return found[0], found[1]


def _solve(exponents: Values, x: Values, losses: Values) -> _Solved:
    """The best floor and scale of each exponent (G,). x: (N,) logarithms of compute, about their mean."""
    powers = np.exp(-exponents[:, None] * x)  # (G, N)
    values = np.broadcast_to(losses, powers.shape)
    floor = scale = np.zeros(len(exponents))
    for step in range(STEPS):
        law = floor[:, None] + scale[:, None] * powers
        law = np.where(law > 0.2 * losses, law, values)
        # the first step, from zeros, is the linear fit of relative differences
        wanted = np.log(values / law) if step else np.ones_like(values)
        of_floor, of_scale = 1 / law, powers / law
        ff, fs, ss = ((one * other).sum(axis=1) for one, other in
                      ((of_floor, of_floor), (of_floor, of_scale), (of_scale, of_scale)))  # fmt: skip
        floor_side, scale_side = (of_floor * wanted).sum(axis=1), (of_scale * wanted).sum(axis=1)
        determinant = ff * ss - fs * fs
        floor = floor + (ss * floor_side - fs * scale_side) / determinant
        scale = scale + (ff * scale_side - fs * floor_side) / determinant
    free = floor[:, None] + scale[:, None] * powers
    free_squares = _squares(values, free)
    pure = np.exp(np.mean(np.log(values) + exponents[:, None] * x, axis=1))  # without a floor
    bounded = floor < 0
    best_floor, best_scale = np.where(bounded, 0.0, floor), np.where(bounded, pure, scale)
    squares = _squares(values, best_floor[:, None] + best_scale[:, None] * powers)
    return _Solved(floor, scale, free_squares, best_floor, best_scale, squares, np.stack([ff, fs, ss], axis=1))


def _squares(values: Values, law: Values) -> Values:
    """Sums (G,) of squared differences of logarithms; inf where a law is not positive."""
    positive = np.all(law > 0, axis=1)
    found = np.sum(np.log(values / np.where(law > 0, law, 1.0)) ** 2, axis=1)
    return np.where(positive, found, np.inf)


def fit_law(compute: Values, losses: Values) -> Fitted:
    """The law through points (N,) of four or more different amounts of compute, whose order changes nothing."""
    order = np.lexsort((losses, compute))
    compute, losses = np.asarray(compute[order]), np.asarray(losses[order])
    centre = float(np.mean(np.log(compute)))
    x = np.log(compute) - centre

    def squares(log_exponent: float) -> float:
        return float(_solve(np.exp([log_exponent]), x, losses).squares[0])

    of_grid = _solve(EXPONENTS, x, losses).squares
    logs, last = np.log(EXPONENTS), len(EXPONENTS) - 1
    lowest = [at for at in range(last + 1) if of_grid[at] <= min(of_grid[max(0, at - 1)], of_grid[min(last, at + 1)])]
    found = [(of_grid[at], logs[at]) for at in lowest]
    for at in lowest:
        bounds = (logs[max(0, at - 1)], logs[min(last, at + 1)])
        refined = optimize.minimize_scalar(squares, bounds=bounds, method="bounded", options={"xatol": 1e-10})
        found.append((float(refined.fun), float(refined.x)))
    exponent = math.exp(min(found)[1])
    best = _solve(np.array([exponent]), x, losses)
    law = Law(float(best.floor[0]), float(best.scale[0]) * math.exp(exponent * centre), exponent)
    return Fitted(compute, losses, law)


@dataclass(frozen=True)
class Ladder:
    """The fit of all points, and the largest one as those below predict it. `beside`: points not on the frontier."""

    fitted: Fitted
    held_out: Predicted
    beside: list[tuple[float, float]]

    @property
    def error(self) -> float:
        """Of the prediction of the largest point, as a fraction of its loss."""
        return self.held_out.loss / float(self.fitted.losses[-1]) - 1

    @property
    def extrapolated(self) -> list[Predicted]:
        return [self.fitted.predict(float(self.fitted.compute[-1]) * times) for times in AHEAD]

    def as_json(self) -> dict[str, Any]:
        fitted, law = self.fitted, self.fitted.law
        held_out = {"compute": self.held_out.compute, "loss": float(fitted.losses[-1]), "predicted": self.held_out.loss,
                    "interval": self.held_out.interval, "error": self.error}  # fmt: skip
        return {
            "law": "floor + scale * compute ** -exponent",
            "points": [list(point) for point in zip(fitted.compute.tolist(), fitted.losses.tolist(), strict=True)],
            "beside": [list(point) for point in self.beside],
            "floor": law.floor,
            "floor_interval": fitted.floors,
            "scale": law.scale,
            "exponent": law.exponent,
            "exponent_interval": fitted.exponents,
            "scatter": fitted.scatter,
            "held_out": held_out,
            "extrapolated": [
                {"compute": each.compute, "loss": each.loss, "interval": each.interval} for each in self.extrapolated
            ],
        }


def climb(points: Sequence[tuple[float, float]]) -> Ladder | str:
    """The ladder of (compute, final loss) points, in any order; in words why there is none.

    The law is that of the best loss for a compute: a point that another one with no more compute is below is left out
    of it. Of points within a hundredth of the same compute the lowest one counts.
    """
    frontier: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []
    for compute, loss in sorted(points):
        if frontier and loss >= frontier[-1][1]:
            beside.append((compute, loss))
        elif frontier and compute <= frontier[-1][0] * (1 + ALIKE):
            beside.append(frontier[-1])
            frontier[-1] = (compute, loss)
        else:
            frontier.append((compute, loss))
    if len(frontier) < FEWEST:
        count, rest = len(frontier), f" (not counting {len(beside)} above a loss of no more compute)" if beside else ""
        return f"{count} point{'s' * (count != 1)} of falling loss{rest}: a law needs {FEWEST} sizes or budgets or more"
    compute, losses = np.array(frontier).T
    fitted, below = fit_law(compute, losses), fit_law(compute[:-1], losses[:-1])
    return Ladder(fitted, below.predict(float(compute[-1])), beside)
