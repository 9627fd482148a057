"""Do several chains agree, and what are they worth? Split R̂ and effective sample size of Markov chains.

Both are rank-normalised (Vehtari et al. 2021): draws are replaced by normal scores of their ranks, so that heavy tails do no harm, and
every chain is split in two, so that a drift within a chain is a difference between chains.

References:
    Gelman and Rubin, Stat. Sci. 7, 457 (1992); Geyer, Stat. Sci. 7, 473 (1992); Vehtari, Gelman, Simpson, Carpenter and Bürkner,
    Bayesian Anal. 16, 667 (2021).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from boltzgen.errors import EnergyError, ShapeError

#: Fewest draws of a chain: two in each half.
MIN_DRAWS = 4


def split_r_hat(chains: np.ndarray) -> float:
    """Rank-normalised split R̂ = √((N − 1)/N + B/(N W)): the larger of that of location and that of spread.

    W is the variance within half chains of N draws, B that of their means times N. The spread is that of |x − median|.

    Args:
        chains: One observable ``[chains, n]``, in the order of time.

    Returns:
        R̂, about 1 where the chains agree (below 1.01, or 1.05 with few draws); +inf where every half chain stands still at a value of its
        own, NaN where nothing ever changes.

    Raises:
        ShapeError: If there are not at least 4 draws of one chain.
        EnergyError: If a value is not finite.

    References:
        Vehtari et al. (2021), eqs. 1–4 and section 4.
    """
    halves = _halves(chains)
    return max(_r_hat(_normal_scores(halves)), _r_hat(_normal_scores(np.abs(halves - np.median(halves)))))


def chain_effective_sample_size(chains: np.ndarray) -> float:
    """Bulk effective sample size of chains together, S/τ, τ = 1 + 2 Σ_t ρ_t by Geyer's initial monotone sequence.

    ρ_t = 1 − (W − mean autocovariance of the half chains at lag t)/var⁺: chains that disagree stay correlated for ever.

    Args:
        chains: One observable ``[chains, n]``, in the order of time.

    Returns:
        Independent draws that the chains are worth for the mean, at most S log₁₀ S; NaN where nothing ever changes.

    Raises:
        ShapeError, EnergyError: As :func:`split_r_hat`.

    References:
        Vehtari et al. (2021), eqs. 10–13; Geyer (1992), section 3.3.
    """
    x = _normal_scores(_halves(chains))
    m, n = x.shape
    centred = x - x.mean(axis=1, keepdims=True)
    spectrum = np.abs(np.fft.rfft(centred, n=2 * n, axis=1)) ** 2
    covariance = np.fft.irfft(spectrum, axis=1)[:, :n].mean(axis=0) / n
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + x.mean(axis=1).var(ddof=1)
    if total == 0:
        return math.nan
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0)
    kept = np.minimum.accumulate(pairs[: negative[0] if len(negative) else len(pairs)])
    tau = max(2 * kept.sum() - 1, 1 / math.log10(m * n))
    return float(m * n / tau)


def _halves(chains: np.ndarray) -> np.ndarray:
    """First and second halves as chains of their own ``[2 chains, n // 2]``; the middle draw of an odd number is left out."""
    array = np.asarray(chains, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or array.shape[1] < MIN_DRAWS:
        raise ShapeError(f"expected chains [chains, n] of at least {MIN_DRAWS} draws, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise EnergyError(f"draw {np.argwhere(~np.isfinite(array))[0].tolist()} of the chains is not finite; remove or mend it first")
    half = array.shape[1] // 2
    return np.concatenate([array[:, :half], array[:, -half:]])


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """Φ⁻¹((rank − 3/8)/(S + 1/4)), equal values with their mean rank."""
    return ndtri((rankdata(x).reshape(x.shape) - 0.375) / (x.size + 0.25))


def _r_hat(x: np.ndarray) -> float:
    n = x.shape[1]
    within, between = float(x.var(axis=1, ddof=1).mean()), float(x.mean(axis=1).var(ddof=1))
    if within <= 1e-24:  # variances of normal scores of order one
        return math.inf if between > 1e-24 else math.nan
    return math.sqrt((n - 1) / n + between / within)
