"""Correlation in time: how many frames of a trajectory count as one."""

from __future__ import annotations

import math

import numpy as np

from boltzgen.errors import EnergyError, ShapeError
from boltzgen.estimators.bootstrap import INEFFICIENCIES_IN_A_UNIT
from boltzgen.estimators.quiet_pymbar import timeseries


def statistical_inefficiency(series: np.ndarray) -> float:
    """Number of correlated frames worth one independent frame, g = 1 + 2 Σ_t (1 − t/n) C(t).

    Chains share one mean, so a difference between chains counts as correlation that does not decay within one.

    Args:
        series: One observable of every frame, ``[n]``, or ``[chains, n]`` of independent chains.

    Returns:
        g ≥ 1, in frames; the length of a chain where the observable never changes, since nothing was then learnt about it.

    Raises:
        ShapeError: If the series is empty or has more than two axes.
        EnergyError: If a value is not finite.

    References:
        Chodera et al., J. Chem. Theory Comput. 3, 26 (2007), eq. 7; Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008).
    """
    chains = np.atleast_2d(np.asarray(series, dtype=np.float64))
    if chains.ndim != 2 or chains.size == 0:
        raise ShapeError(f"expected a series [n] or [chains, n] with at least one frame, got shape {np.shape(series)}")
    if not np.isfinite(chains).all():
        raise EnergyError(f"frame {np.argwhere(~np.isfinite(chains))[0].tolist()} of the series is not finite; remove or mend it first")
    return _inefficiency(list(chains))


def _inefficiency(chains: list[np.ndarray]) -> float:
    """The same of chains of any lengths."""
    n = max(len(chain) for chain in chains)
    values = np.concatenate(chains)
    if n == 1 or np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return float(n)
    return float(np.clip(timeseries.statistical_inefficiency_multiple(chains), 1.0, n))


def decorrelate(series: np.ndarray, *, inefficiency: float | None = None) -> np.ndarray:
    """Indices of frames that are independent of each other.

    Args:
        series: One observable of every frame of one chain, ``[n]``.
        inefficiency: Statistical inefficiency in frames; that of the series by default.

    Returns:
        Ascending indices ``[m]``, about n / g of them, at least one.

    Raises:
        ShapeError: If the series is not ``[n]`` with n ≥ 1, or the inefficiency is below 1.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ShapeError(f"expected the series [n] of one chain, got shape {values.shape}; decorrelate one chain at a time")
    g = statistical_inefficiency(values) if inefficiency is None else inefficiency
    if g < 1:
        raise ShapeError(f"expected a statistical inefficiency of at least 1 frame, got {g}")
    return np.unique(np.floor(np.arange(0, len(values), g)).astype(np.int64))


def rows_by_chain(chain: np.ndarray, time: np.ndarray) -> list[np.ndarray]:
    """Rows of every chain in the order of time, chains by their number."""
    order = np.lexsort((time, chain))
    return np.split(order, np.flatnonzero(np.diff(chain[order])) + 1) if len(order) else []


def time_blocks(chain: np.ndarray, time: np.ndarray, series: np.ndarray, *, at_least: float = 1.0) -> np.ndarray:
    """Independent units of rows of several chains: stretches of a chain five times as long as the longest memory of some series.

    A chain that is shorter than two such stretches is one unit; so is every chain where they differ by more than they fluctuate.

    Args:
        chain: Chain of every row ``[n]``, any integers.
        time: Orders the rows of a chain ``[n]``.
        series: ``k`` observables of every row ``[n, k]``, finite. One that never changes says nothing and is left out.
        at_least: A statistical inefficiency in rows that the series may not show.

    Returns:
        Units ``[n]``, labels 0 to m − 1.

    Raises:
        EnergyError: If a value is not finite.
    """
    if not np.isfinite(series).all():
        raise EnergyError(f"row {int(np.argwhere(~np.isfinite(series))[0, 0])} of the series is not finite; remove or mend it first")
    chains = rows_by_chain(chain, time)
    memories = [_inefficiency([column[rows] for rows in chains]) for column in series.T if chains and np.ptp(column) > 0]
    length = math.ceil(INEFFICIENCIES_IN_A_UNIT * max([at_least, *memories]))
    units, first = np.empty(len(series), dtype=np.int64), 0
    for rows in chains:
        n_units = max(1, len(rows) // length)
        units[rows] = first + np.arange(len(rows)) * n_units // len(rows)
        first += n_units
    return units
