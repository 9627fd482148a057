"""Free energy profile along one variable from everything that paths pass through, accepted or not.

Few paths end at a rare value between the basins, but all that cross pass it, there and back. Let F(γ) be the stationary density of a tried
path (λ₀ with x₀ from π̂, λ₁ from ρ), W_k its work after k steps and λ_k its centre then. The part of a path after step k integrates to one,
and so does the part before it, run backwards from x_k. So for any function q(λ₀, λ₁, k)

    ∫ F(γ) e^{−W_k} q/ρ(λ₁) f(ξ(x_k)) dγ = ∫ dλ₀ dλ₁ q ∫ dx e^{−u(x) − r(ξ(x), λ_k)} f(ξ(x)),

and the same with f/G, G(ξ) = ∫ dλ₀ dλ₁ q Σ_k e^{−r(ξ, λ_k)} over all looks k, adds up to ∫ e^{−u} f. Paths from a set s to a set e are
drawn from n_s F/Z_s, and ways back from n_e F/Z_e, whose density is that of the way there times e^{−w}: the pool of both has the density
F D with D = n_s/Z_s + e^{−w} n_e/Z_e. Both add the same, and a look counts

    e^{−W_k} q(λ₀, λ₁) / (ρ(λ₁) D G(ξ_k)).

Z solves Z_s = Σ 1/D over all paths that start in s, there and back; for two sets that is Bennett's equation. Only equilibrium within each
set is needed. Any q is right. With the density of centres g(λ) = Σ (Z/n) e^{−r(ξ(x₀), λ)} and the share h of its way that the
centre has gone, q = (1 − h) g(λ₀) ρ(λ₁) + h ρ(λ₀) g(λ₁): a look close to an end counts as a draw from equilibrium at that end, whatever the
rest of the path dissipates. G is then an average over the paths themselves.

Where walkers were between paths (after every local move) is equilibrium within each set as well: Σ_s Z_s p(ξ | s), with Z_s as above and p
counted. It knows more where paths seldom go. In every bin both are averaged with inverse variances; those of
the counts are smoothed, proportional to the probability, as a bin that happens to be empty has none of its own.

References:
    Minh and Adib, Phys. Rev. Lett. 100, 180602 (2008); Hummer and Szabo, Proc. Natl. Acad. Sci. 98, 3658 (2001); Shirts and Chodera,
    J. Chem. Phys. 129, 124105 (2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from boltzgen.errors import InputError, ShapeError
from boltzgen.estimators.bootstrap import bootstrap
from boltzgen.estimators.path_works import Membership, unrolled
from boltzgen.estimators.profiles import Profile, assembled, bin_index, checked_edges, effective_units_by_bin, wrapped
from boltzgen.estimators.timeseries import time_blocks
from boltzgen.paths import Looks, Paths, Restraint

#: Points of the grid of centres and values in one width of the restraint; looks that are added up at once.
_POINTS_PER_WIDTH, _ROWS = 8, 4096
#: Widths beyond the outermost centre where the density of configurations is not looked for.
_MARGIN = 8


def profile_along_paths(
    paths: Paths,
    looks: Looks,
    restraint: Restraint,
    basins: Sequence[Membership],
    *,
    edges: np.ndarray,
    visited: np.ndarray | None = None,
    at_least: float = 1.0,
    name: str = "",
    reference: int | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> Profile:
    """Free energy along the one variable of a restraint, −ln of the density of ξ, from the ends of paths and from looks at them.

    Args:
        paths: All tried paths of frozen production. One that failed counts where it starts.
        looks: What was seen of them.
        restraint: r, of one variable.
        basins: Sets within which paths start from equilibrium, apart from each other. What lies outside of all is one more.
        edges: Ascending bin edges ``[bins + 1]``, within one turn where the variable is periodic.
        visited: ξ of the walker of every path after each local move before it ``[n, L]``; None leaves them out.
        at_least: A statistical inefficiency in moves that paths and variables may not show.
        name: What it is along.
        reference: Bin of the zero; the most probable one by default.
        n_bootstrap: Bootstrap replicates over stretches of walkers; each solves everything anew.
        seed: Seed of the bootstrap.

    Returns:
        The profile.

    Raises:
        InputError: If a work is not a number, paths start in one stretch only, nothing lies inside the edges, or looks are not of these
            paths.
        ShapeError: If there is more than one variable, or visits are not of these paths.

    References:
        See the top of this file.
    """
    if restraint.n_variables != 1:
        raise ShapeError(f"expected one variable, got {restraint.n_variables}: take path_profile for each of more")
    if np.isnan(paths.w).any():
        raise InputError(f"{int(np.isnan(paths.w).sum())} paths have works that are no numbers; a path that failed has the work +inf")
    passes = _Passes.of(paths, looks, restraint, basins)
    series = np.column_stack([passes.score(), _centred(unrolled(paths.xi_start, restraint.periods), passes.start)])
    units = time_blocks(paths.walker, paths.time, series, at_least=at_least)
    if units.max(initial=0) == 0:
        raise InputError(f"the {len(paths)} paths form one independent unit, of which no error can be known: sample longer")
    cuts = (checked_edges(edges),)
    n_bins = len(cuts[0]) - 1
    bins = bin_index(wrapped(passes.xi, cuts[0], restraint.periods[0])[:, None], cuts)
    pooled = passes.by_unit(units, restraint)
    visits = _Visits.of(np.zeros((len(paths), 0)) if visited is None else visited, len(paths), basins, cuts, restraint.periods[0])

    def histograms(counts: np.ndarray) -> np.ndarray:
        b = passes.log_shares(counts)
        passing = np.bincount(bins, weights=pooled.weights(counts, b), minlength=n_bins + 1)
        return np.stack([passing, visits.histogram(counts, passes.populations(counts, b), n_bins + 1)])

    once, inside = np.ones(len(paths)), bins < n_bins
    both, w = histograms(once), pooled.weights(once, passes.log_shares(once))
    replicates = bootstrap(histograms, units, n_bootstrap=n_bootstrap, seed=seed)
    share = _share_of_passes(both, replicates)
    p, drawn = (share * one[..., 0, :] + (1 - share) * one[..., 1, :] for one in (both, replicates))
    n_effective = [effective_units_by_bin(bins[inside], w[inside], units[passes.path[inside]], n_bins)]
    if len(visits.path):
        kept = visits.bins < n_bins
        n_effective.append(effective_units_by_bin(visits.bins[kept], np.ones(kept.sum()), units[visits.path[kept]], n_bins))
    return assembled(
        name, cuts, p[:n_bins], drawn[:, :n_bins], fewest=units, n_effective=np.max(n_effective, axis=0),
        reference=None if reference is None else (reference,), outside=float(p[n_bins] / p.sum()),
    )  # fmt: skip


def _share_of_passes(both: np.ndarray, replicates: np.ndarray) -> np.ndarray:
    """Weight of what paths pass against what walkers visit, in every bin ``[bins]``.

    Args:
        both: Probabilities by passes and by visits ``[2, bins]``.
        replicates: The same of bootstrap replicates ``[n_bootstrap, 2, bins]``.
    """
    if both[1].sum() == 0:
        return np.ones(both.shape[1])
    passing, counted = replicates.var(axis=0, ddof=1)
    smooth = both.mean(axis=0) * counted.sum() / both[1].sum()
    with np.errstate(invalid="ignore"):
        return np.where(both[0] > 0, np.nan_to_num(smooth / (smooth + passing)), 0.0)


@dataclass(frozen=True)
class _Visits:
    """Where walkers were between paths.

    Attributes:
        path: The path that follows ``[v]``.
        sets: Set of each visit ``[v]``.
        bins: Its bin, or the number of bins outside of all ``[v]``.
    """

    path: np.ndarray
    sets: np.ndarray
    bins: np.ndarray

    @classmethod
    def of(cls, visited: np.ndarray, n_paths: int, basins: Sequence[Membership], cuts: tuple[np.ndarray], period: float | None) -> _Visits:
        if visited.ndim != 2 or len(visited) != n_paths:
            raise ShapeError(f"expected visits [{n_paths}, L] of the walkers of as many paths, got {list(visited.shape)}")
        xi = visited.reshape(-1, 1)
        return cls(
            np.repeat(np.arange(n_paths), visited.shape[1]), _sets(xi, basins), bin_index(wrapped(xi[:, 0], cuts[0], period)[:, None], cuts)
        )

    def histogram(self, counts: np.ndarray, populations: np.ndarray, n_bins: int) -> np.ndarray:
        """Probabilities of bins ``[n_bins]`` where every path was drawn ``counts`` times, given those of the sets ``[c]``."""
        found = np.zeros(n_bins)
        for k, population in enumerate(populations):
            here = self.sets == k
            counted = np.bincount(self.bins[here], weights=counts[self.path[here]], minlength=n_bins)
            if population > 0 and counted.sum() > 0:
                found += population * counted / counted.sum()
        return found


@dataclass(frozen=True)
class _Passes:
    """Every path at its ends and at its looks.

    Attributes:
        w: Of every path ``[n]``.
        log_ratio: ln ρ(λ₁) − ln ρ(λ₀) ``[n]``.
        start: Set of x₀ ``[n]``.
        end: Set of x_K ``[n]``; −1 where the path failed.
        values: ξ(x₀) ``[n]``.
        centres: λ₀ and λ₁ ``[n, 2]``.
        path: Path of every pass ``[m]``, ascending.
        xi: ξ of it ``[m]``.
        work: W_k of it ``[m]``.
        centre: λ_k of it ``[m]``.
        gone: h, the share of its way that the centre has gone ``[m]``.
    """

    w: np.ndarray
    log_ratio: np.ndarray
    start: np.ndarray
    end: np.ndarray
    values: np.ndarray
    centres: np.ndarray
    path: np.ndarray
    xi: np.ndarray
    work: np.ndarray
    centre: np.ndarray
    gone: np.ndarray

    @classmethod
    def of(cls, paths: Paths, looks: Looks, restraint: Restraint, basins: Sequence[Membership]) -> _Passes:
        rows = np.arange(len(paths))
        arrived = np.flatnonzero(~paths.failed)
        looked = _rows_of(looks, paths)
        path = np.concatenate([rows, looked, arrived])
        ways, gone = (
            restraint.difference(*map(torch.from_numpy, pair)).numpy()[:, 0]
            for pair in ((paths.end, paths.start), (looks.centre, paths.start[looked]))
        )
        columns = [
            np.concatenate([paths.xi_start[:, 0], looks.xi[:, 0], paths.xi_end[arrived, 0]]),
            np.concatenate([np.zeros(len(paths)), looks.work, paths.work[arrived]]),
            np.concatenate([paths.start[:, 0], looks.centre[:, 0], paths.end[arrived, 0]]),
            np.concatenate([np.zeros(len(paths)), gone / ways[looked], np.ones(len(arrived))]),
        ]
        order = np.argsort(path, kind="stable")
        xi, work, centre, h = (column[order] for column in columns)
        start, end = _sets(paths.xi_start, basins), _sets(paths.xi_end, basins)
        return cls(
            np.where(paths.failed, np.inf, paths.w), paths.log_proposal_ratio, start, end, paths.xi_start[:, 0],
            np.column_stack([paths.start[:, 0], paths.end[:, 0]]), path[order], xi, work, centre, h,
        )  # fmt: skip

    def log_shares(self, counts: np.ndarray) -> np.ndarray:
        """ln(n/Z) of every set ``[c]`` up to a constant, by maximum likelihood; −inf where no path starts."""
        n = np.bincount(self.start, weights=counts, minlength=max(self.start.max(), self.end.max()) + 1)
        able, known = np.flatnonzero(n > 0), self.end >= 0
        b = np.where(n > 0, 0.0, -np.inf)
        with np.errstate(divide="ignore"):
            b[able] = np.log(n[able] / n[able].max())
        links = known & (counts > 0) & (self.start != self.end)
        links[links] = n[self.end[links]] > 0
        c, w, s, e = counts[links], self.w[links], self.start[links], self.end[links]

        def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
            b[able[1:]] = b[able[0]] + free
            late = expit(b[e] - w - b[s])  # the share of D that is the way back
            slope = np.bincount(s, weights=c * late, minlength=len(n)) - np.bincount(e, weights=c * late, minlength=len(n))
            value = float(c @ (np.logaddexp(b[s], b[e] - w) - b[s]))
            return value, -slope[able[1:]]

        if len(able) > 1:
            found = minimize(loss, b[able[1:]] - b[able[0]], jac=True, method="BFGS", options={"gtol": 1e-7 * counts.sum()})
            loss(found.x)
        return b

    def populations(self, counts: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Z of every set ``[c]``, which sum to one, from their :meth:`log_shares`; 0 where no path starts."""
        n = np.bincount(self.start, weights=counts, minlength=len(b))
        z = np.where(n > 0, n * np.exp(-np.where(np.isfinite(b), b, 0.0)), 0.0)
        return np.asarray(z / z.sum())

    def score(self) -> np.ndarray:
        """What every path adds to the equation of Z: the share of D that is its way back, about its mean from one set ``[n]``."""
        b = self.log_shares(np.ones(len(self.w)))
        return _centred(self._late(b)[:, None], self.start)[:, 0]

    def _late(self, b: np.ndarray) -> np.ndarray:
        back = np.where(self.end >= 0, b[self.end], -np.inf)
        return np.asarray(expit(back - self.w - b[self.start]))

    def log_density(self, b: np.ndarray) -> np.ndarray:
        """ln D ``[n]``, up to a constant."""
        return np.asarray(np.logaddexp(b[self.start], np.where(self.end >= 0, b[self.end], -np.inf) - self.w))

    def by_unit(self, units: np.ndarray, restraint: Restraint) -> _Pooled:
        grid = _grid(np.concatenate([self.centre, self.values]), restraint)
        group = units * (self.start.max() + 1) + self.start
        shape = (int(group.max()) + 1, len(grid))
        around_starts, around_centres = np.zeros(shape), np.zeros(shape)
        for values, share, rows, total in (
            (self.values, np.ones(len(self.values)), group, around_starts), (self.centre, 1 - self.gone, group[self.path], around_centres)
        ):  # fmt: skip
            for first in range(0, len(values), _ROWS):
                some = slice(first, first + _ROWS)
                np.add.at(total, rows[some], share[some, None] * _restrained(grid, values[some], restraint))
        groups, representative = np.unique(group, return_index=True)
        return _Pooled(self, grid, restraint.periods[0], around_starts[groups], around_centres[groups], representative)


@dataclass(frozen=True)
class _Pooled:
    """Passes with the sums that g and G need, over the paths of one unit and set.

    Attributes:
        passes: The passes.
        grid: Values ``[p]``.
        period: Of the variable.
        around_starts: Σ e^{−r(ξ(x₀), grid)} ``[g, p]``.
        around_centres: Σ Σ_k (1 − h) e^{−r(grid, λ_k)} ``[g, p]``.
        representative: A path of each of the g ``[g]``.
    """

    passes: _Passes
    grid: np.ndarray
    period: float | None
    around_starts: np.ndarray
    around_centres: np.ndarray
    representative: np.ndarray

    def weights(self, counts: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Weights of all passes ``[m]``, which sum to one, with every path drawn ``counts`` ``[n]`` times, log shares ``b``."""
        p = self.passes
        drawn = counts[self.representative] > 0
        share = np.where(drawn, counts[self.representative] * np.exp(-np.where(np.isfinite(b), b, 0.0)[p.start[self.representative]]), 0.0)
        with np.errstate(divide="ignore"):
            log_g, log_norm = np.log(share @ self.around_starts), np.log(share @ self.around_centres)
            left, gone = np.log1p(-p.gone), np.log(p.gone)
        at_start, at_end = (self._at(log_g, p.centres[:, i]) for i in range(2))
        log_q = np.logaddexp(left + at_start[p.path], gone + (at_end - p.log_ratio)[p.path])
        log_w = log_q - p.log_density(b)[p.path] - p.work - self._at(log_norm, p.xi)
        if self.period is None:
            log_w[(p.xi < self.grid[0]) | (p.xi > self.grid[-1])] = -np.inf
        w = counts[p.path] * np.exp(log_w - log_w[counts[p.path] > 0].max(), where=counts[p.path] > 0, out=np.zeros(len(log_w)))
        return np.asarray(w / w.sum())

    def _at(self, values: np.ndarray, where: np.ndarray) -> np.ndarray:
        finite = np.maximum(values, values[np.isfinite(values)].min() - 50.0)
        return np.interp(where, self.grid, finite, period=self.period)


def _grid(values: np.ndarray, restraint: Restraint) -> np.ndarray:
    """Values of the variable, fine against the width of the restraint, and far beyond all that are given."""
    width = float(restraint.stiffness[0]) ** -0.5
    spacing = width / _POINTS_PER_WIDTH
    if restraint.periods[0] is None:
        low, high = float(values.min()) - _MARGIN * width, float(values.max()) + _MARGIN * width
        return np.linspace(low, high, int(np.ceil((high - low) / spacing)) + 2)
    period = restraint.periods[0]
    return np.linspace(-0.5 * period, 0.5 * period, int(np.ceil(period / spacing)), endpoint=False)


def _restrained(grid: np.ndarray, values: np.ndarray, restraint: Restraint) -> np.ndarray:
    """e^{−r} ``[n, p]`` of values and grid."""
    apart = torch.from_numpy(values[:, None] - grid).reshape(-1, 1)
    return restraint.energy(apart, torch.zeros(1, dtype=torch.float64)).neg().exp().reshape(len(values), len(grid)).numpy()


def _rows_of(looks: Looks, paths: Paths) -> np.ndarray:
    """Row of the path of every look ``[m]``."""
    order = np.lexsort((paths.walker, paths.time))
    stride = max(int(paths.walker.max(initial=0)), int(looks.walker.max(initial=0))) + 1
    keys, wanted = (one.time * stride + one.walker for one in (paths, looks))
    found = np.searchsorted(keys[order], wanted).clip(max=len(paths) - 1)
    rows = order[found]
    if len(looks) and not (keys[rows] == wanted).all():
        raise InputError("expected looks at the paths of this table, got some of other moves or walkers")
    return np.asarray(rows)


def _sets(values: np.ndarray, basins: Sequence[Membership]) -> np.ndarray:
    """Set of every row ``[n]``: the basin, the number of basins outside of all, −1 where it is NaN."""
    known = ~np.isnan(values).any(axis=1)
    found = np.where(known, len(basins), -1)
    for k, basin in enumerate(basins):
        inside = known.copy()
        inside[known] = basin(values[known])
        if (inside & (found < len(basins)) & known).any():
            raise InputError("expected basins apart from each other, but some rows lie in two of them")
        found[inside] = k
    return found


def _centred(columns: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Columns ``[n, k]`` about their mean within each set."""
    centred = np.zeros_like(columns)
    for k in np.unique(sets):
        centred[sets == k] = columns[sets == k] - columns[sets == k].mean(axis=0)
    return centred
