"""Correlation in time: how many frames of a trajectory count as one."""

from __future__ import annotations

import numpy as np

from boltzgen.errors import EnergyError, ShapeError
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
    n = chains.shape[1]
    if np.ptp(chains) <= 1e-12 * max(1.0, float(np.abs(chains).max())):
        return float(n)
    g = timeseries.statistical_inefficiency_multiple(list(chains))
    return float(np.clip(g, 1.0, n))


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
