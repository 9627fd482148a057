"""Paths between two sets, there and back, as the works of two states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from boltzgen.errors import EnergyError, InputError, ShapeError
from boltzgen.estimators.bootstrap import numbered
from boltzgen.estimators.timeseries import time_blocks
from boltzgen.estimators.works import Works
from boltzgen.paths import Paths, Periods

#: Tells which values ``[n, k]`` of collective variables lie in a set: bool ``[n]``.
Membership = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PathWorks:
    """Paths that start in A or in B; the rows of a walker keep the order of time.

    Attributes:
        w: work + ln ρ(λ₁) − ln ρ(λ₀) in kT ``[n]``; +inf for a path that failed or did not end in the other set.
        from_a: Which start in A, bool ``[n]``; the others start in B.
        units: Independent unit of every row ``[n]``; one may hold rows of both sets.
        walker: Walker of every row ``[n]``.
        time: Number of the move ``[n]``.
    """

    w: np.ndarray
    from_a: np.ndarray
    units: np.ndarray
    walker: np.ndarray
    time: np.ndarray

    @classmethod
    def of_basins(
        cls, paths: Paths, in_a: Membership, in_b: Membership, *, periods: Periods | None = None, at_least: float = 1.0
    ) -> PathWorks:
        """Paths by the basins of x₀ and x_K.

        Args:
            paths: All tried paths of frozen production.
            in_a: Basin A by values of ξ.
            in_b: Basin B, apart from A.
            periods: Period of every variable, None where it has none.
            at_least: A statistical inefficiency in moves that paths and variables may not show.

        Raises:
            InputError: If the basins overlap.
            ShapeError: If memberships are not one bool for each row.
            EnergyError: If a work is not a number.
        """
        starts, ends = sets_of(paths.xi_start, in_a, in_b), sets_of(paths.xi_end, in_a, in_b)
        return cls._of(paths, starts, ends, np.ones(len(paths), dtype=bool), periods, at_least)

    @classmethod
    def of_centres(
        cls,
        paths: Paths,
        in_a: Membership,
        in_b: Membership,
        *,
        sent_only: bool,
        periods: Periods | None = None,
        at_least: float = 1.0,
    ) -> PathWorks:
        """Paths by the sets of λ₀ and λ₁.

        Args:
            paths: All tried paths of frozen production.
            in_a: Set A by values of λ.
            in_b: Set B, apart from A.
            sent_only: Whether to leave out paths that were not sent to the other set.
            periods: Period of every variable, None where it has none.
            at_least: A statistical inefficiency in moves that paths and variables may not show.

        Raises:
            InputError, ShapeError, EnergyError: As :meth:`of_basins`.
        """
        starts, ends = sets_of(paths.start, in_a, in_b), sets_of(paths.end, in_a, in_b)
        sent = (starts[0] & ends[1]) | (starts[1] & ends[0])
        return cls._of(paths, starts, ends, sent if sent_only else np.ones_like(sent), periods, at_least)

    @classmethod
    def _of(
        cls,
        paths: Paths,
        starts: tuple[np.ndarray, np.ndarray],
        ends: tuple[np.ndarray, np.ndarray],
        kept: np.ndarray,
        periods: Periods | None,
        at_least: float,
    ) -> PathWorks:
        bad = np.flatnonzero(np.isnan(paths.w))
        if len(bad):
            raise EnergyError(
                f"{len(bad)} of {len(paths)} paths have works that are no numbers, in rows {bad[:10].tolist()}: a path that failed has "
                "the work +inf; look at the density of the proposal there"
            )
        crossed = (starts[0] & ends[1]) | (starts[1] & ends[0])
        w = np.where(crossed & ~paths.failed, paths.w, np.inf)
        series = np.column_stack([_how_accepted(w, starts), *_within(unrolled(paths.xi_start, periods), starts).T])
        units = time_blocks(paths.walker, paths.time, series, at_least=at_least)
        rows = np.flatnonzero((starts[0] | starts[1]) & kept)
        rows = rows[np.argsort(paths.time[rows], kind="stable")]
        return cls(w[rows], starts[0][rows], units[rows], paths.walker[rows], paths.time[rows])

    def __len__(self) -> int:
        return len(self.w)

    def share(self, share: float, *, from_end: bool = False) -> PathWorks:
        """The rows of the first, or of the last, part of the times at which paths were tried."""
        times = np.unique(self.time)
        n = round(share * len(times))
        kept = np.isin(self.time, times[len(times) - n :] if from_end else times[:n])
        return replace(self, **{name: getattr(self, name)[kept] for name in ("w", "from_a", "units", "walker", "time")})

    def works(self) -> tuple[Works, Works, np.ndarray]:
        """Works from A and from B, and the units that both share, ``[n_A + n_B]``."""
        both = [
            Works.of(self.w[rows], role="evaluate", log_det_error=0.0, units=self.units[rows], chain=self.walker[rows])
            for rows in self.rows
        ]
        return both[0], both[1], numbered(np.concatenate([self.units[rows] for rows in self.rows]))

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows from A, and rows from B."""
        return np.flatnonzero(self.from_a), np.flatnonzero(~self.from_a)

    @property
    def connecting(self) -> tuple[np.ndarray, np.ndarray]:
        """Works of the paths from A that ended in B, and of those from B that ended in A."""
        reached = np.isfinite(self.w)
        return self.w[self.from_a & reached], self.w[~self.from_a & reached]

    @property
    def unknown(self) -> str:
        """Why these paths give no number, or an empty string."""
        for name, other, rows in (("A", "B", self.rows[0]), ("B", "A", self.rows[1])):
            if len(rows) == 0:
                return f"no path started in {name}"
            if not np.isfinite(self.w[rows]).any():
                return f"none of {len(rows)} paths from {name} ended in {other}: the difference is unknown, not infinite"
            if len(np.unique(self.units[rows])) < 2:
                return f"the {len(rows)} paths from {name} form one independent unit, of which no error can be known: sample longer"
        return ""


def sets_of(values: np.ndarray, in_a: Membership, in_b: Membership) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of ``values`` ``[n, k]`` lie in A and which in B, bool ``[n]`` each; those with NaN lie in neither.

    Raises:
        InputError: If a row lies in both.
        ShapeError: If a membership is not one bool for each row.
    """
    known, found = ~np.isnan(values).any(axis=1), []
    for membership in (in_a, in_b):
        inside = np.zeros(len(values), dtype=bool)
        answer = np.asarray(membership(values[known]))
        if answer.shape != (int(known.sum()),) or answer.dtype != np.bool_:
            raise ShapeError(f"expected bool [{int(known.sum())}] of a set's membership, got {answer.dtype} {list(answer.shape)}")
        inside[known] = answer
        found.append(inside)
    both = found[0] & found[1]
    if both.any():
        raise InputError(f"expected sets apart from each other, but {both.sum()} rows lie in both, such as {values[int(np.argmax(both))]}")
    return found[0], found[1]


def unrolled(values: np.ndarray, periods: Periods | None) -> np.ndarray:
    """Values ``[n, k]`` with cosine and sine in place of periodic ones, ``[n, k']``.

    Raises:
        ShapeError: If there is not one period, or None, for every variable.
    """
    if periods is None:
        return values
    if len(periods) != values.shape[1]:
        raise ShapeError(f"expected {values.shape[1]} periods, None for a variable without one, got {len(periods)}")
    columns: list[np.ndarray] = []
    for column, period in zip(values.T, periods, strict=True):
        columns += [column] if period is None else [f(2 * math.pi * column / period) for f in (np.cos, np.sin)]
    return np.column_stack(columns)


def _how_accepted(w: np.ndarray, starts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """What every path adds to Bennett's equation, up to its constants: 1/(1 + e^{w − median}) about its mean in A, and minus it in B."""
    score = np.zeros(len(w))
    for sign, inside in zip((1.0, -1.0), starts, strict=True):
        reached = inside & np.isfinite(w)
        if reached.any():
            accepted = expit(np.median(w[reached]) - w[inside])
            score[inside] = sign * (accepted - accepted.mean())
    return score


def _within(columns: np.ndarray, starts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Variables ``[n, k]`` about their mean within each set; zero outside of both."""
    centred = np.zeros_like(columns)
    for inside in starts:
        if inside.any():
            centred[inside] = columns[inside] - columns[inside].mean(axis=0)
    return centred
