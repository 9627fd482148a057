"""Averages over the stationary distribution from all paths, accepted or not: waste recycling.

A tried path from x₀ to x_K is accepted with probability α = min(1, e^{−w}). Where x₀ follows π so does the state after the move, and its
average over the accept/reject step, (1 − α) f(x₀) + α f(x_K), has the same mean as f. This holds in **global** equilibrium only: where
walkers are in A and B in other shares than π says, these averages are wrong by as much. ``path_free_energy`` needs less.

References:
    Frenkel, Proc. Natl. Acad. Sci. 101, 17571 (2004); Delmas and Jourdain, J. Appl. Probab. 46, 938 (2009), on when it reduces variance.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from boltzgen.core import Estimate, WeightedSamples
from boltzgen.errors import InputError, ShapeError
from boltzgen.estimators.path_works import unrolled
from boltzgen.estimators.profiles import Profile, profile_1d, wrapped
from boltzgen.estimators.reweighting import mean
from boltzgen.estimators.timeseries import time_blocks
from boltzgen.paths import Paths, Periods

#: What a reader of these numbers must know.
NEEDS = "needs walkers in global equilibrium"


def recycled_average(
    paths: Paths,
    at_start: np.ndarray,
    at_end: np.ndarray,
    *,
    name: str = "mean",
    unit: str = "",
    periods: Periods | None = None,
    at_least: float = 1.0,
    n_bootstrap: int = 200,
    seed: int,
) -> Estimate:
    """⟨f⟩ = mean of (1 − α) f(x₀) + α f(x_K), α = min(1, e^{−w}), over all paths. Walkers must be in global equilibrium.

    Args:
        paths: All tried paths of frozen production.
        at_start: f(x₀) ``[n]`` or ``[n, m]``.
        at_end: f(x_K), as ``at_start``; ignored where a path cannot be accepted.
        name: Name of the estimate.
        unit: Unit of f.
        periods: Period of every variable, None where it has none: for the memory of walkers.
        at_least: A statistical inefficiency in moves that f and the variables may not show.
        n_bootstrap: Bootstrap replicates over stretches of walkers, five times as long as the memory of f and of the variables.
        seed: Seed of the bootstrap.

    Returns:
        The average with its error.

    Raises:
        ShapeError: If there is not one value for each path.
        InputError: If a value is not finite where it counts, or all paths form one unit.
    """
    start, end = np.asarray(at_start, dtype=np.float64), np.asarray(at_end, dtype=np.float64)
    if start.shape != end.shape or start.ndim not in (1, 2) or len(start) != len(paths):
        raise ShapeError(f"expected values [{len(paths)}] or [{len(paths)}, m] at both ends, got {start.shape} and {end.shape}")
    values = np.concatenate([start, end])
    samples = _both_ends(paths, _recycled(paths, start, end), periods, at_least)
    found = mean(samples, values, name=name, unit=unit, n_bootstrap=n_bootstrap, seed=seed)
    return replace(found, note="; ".join(part for part in (NEEDS, found.note) if part))


def path_profile(
    paths: Paths,
    edges: np.ndarray,
    *,
    variable: int = 0,
    periods: Periods | None = None,
    at_least: float = 1.0,
    name: str = "",
    reference: int | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> Profile:
    """Free energy along one variable, −ln of the density of ξ by waste recycling. Walkers must be in global equilibrium.

    Args:
        paths: All tried paths of frozen production.
        edges: Ascending bin edges ``[bins + 1]``, within one turn where the variable is periodic.
        variable: Which of the ``k`` variables.
        periods: Period of every variable, None where it has none.
        at_least: A statistical inefficiency in moves that the variables may not show.
        name: What it is along.
        reference: Bin of the zero; the most probable one by default.
        n_bootstrap: Bootstrap replicates over stretches of walkers.
        seed: Seed of the bootstrap.

    Returns:
        The profile.

    Raises:
        InputError: If the edges do not ascend or span more than one turn, nothing lies inside them, or all paths form one unit.
        ShapeError: If there is not one period for every variable.
    """
    period = None if periods is None else periods[variable]
    values = wrapped(np.concatenate([paths.xi_start[:, variable], paths.xi_end[:, variable]]), np.asarray(edges), period)
    inside = (values >= edges[0]) & (values <= edges[-1])
    bins = np.where(inside, np.digitize(values, edges), 0)
    samples = _both_ends(paths, _recycled(paths, *np.split(bins.astype(np.float64), 2)), periods, at_least)
    return profile_1d(samples, values, edges=edges, name=name, reference=reference, n_bootstrap=n_bootstrap, seed=seed)


def acceptance_probability(paths: Paths) -> np.ndarray:
    """α = min(1, e^{−w}) of every path ``[n]``; 0 where it failed.

    Raises:
        InputError: If a work is not a number.
    """
    if np.isnan(paths.w).any():
        raise InputError(f"{int(np.isnan(paths.w).sum())} paths have works that are no numbers; a path that failed has the work +inf")
    return np.where(paths.failed, 0.0, np.exp(-paths.w.clip(min=0.0)))


def _recycled(paths: Paths, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(1 − α) f(x₀) + α f(x_K) of every path, ``[n, m]``."""
    alpha = acceptance_probability(paths)[:, None]
    at_start, at_end = (values.reshape(len(paths), -1) for values in (start, end))
    return (1 - alpha) * np.where(alpha < 1, at_start, 0.0) + alpha * np.where(alpha > 0, at_end, 0.0)


def _both_ends(paths: Paths, recycled: np.ndarray, periods: Periods | None, at_least: float) -> WeightedSamples:
    """Starts with the weights 1 − α, then ends with α, in the independent units that the memory of values and variables asks for."""
    if not np.isfinite(recycled).all():
        row = int(np.argwhere(~np.isfinite(recycled))[0, 0])
        raise InputError(f"the value of path {row} is not finite where it counts; check the observable")
    alpha = acceptance_probability(paths)
    units = time_blocks(paths.walker, paths.time, np.column_stack([recycled, unrolled(paths.xi_start, periods)]), at_least=at_least)
    with np.errstate(divide="ignore"):
        log_w = torch.from_numpy(np.log(np.concatenate([1 - alpha, alpha])))
    block, nothing = torch.from_numpy(np.tile(units, 2)), torch.full((2 * len(paths),), torch.nan, dtype=torch.float64)
    return WeightedSamples(
        x=nothing[:, None], u=nothing, log_w=log_w, log_q=None, block=block, chain=torch.zeros_like(block), role="evaluate"
    )
