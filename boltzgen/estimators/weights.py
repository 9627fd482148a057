"""How good a set of importance weights is: effective sample sizes and the Pareto shape of the tail."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import WeightedSamples
from boltzgen.errors import InputError, WeightsError

#: Fewer tail weights than this cannot be fitted by a generalised Pareto distribution.
_SMALLEST_TAIL = 5

#: Rows named in an error message.
_ROWS_NAMED = 10


def checked_log_weights(log_w: Tensor | np.ndarray) -> np.ndarray:
    """Log weights as a float64 array, after checking that they can be normalised.

    Args:
        log_w: Log weights ``[n]``; −inf is weight zero.

    Returns:
        The same, ``[n]``, float64.

    Raises:
        WeightsError: If there are none, one is NaN or +inf, or all are −inf.
    """
    array = torch.as_tensor(log_w).detach().to("cpu", torch.float64).numpy()
    if array.ndim != 1 or len(array) == 0:
        raise WeightsError(f"expected log weights [n] with n > 0, got shape {list(array.shape)}; draw samples first")
    bad = np.flatnonzero(np.isnan(array) | np.isposinf(array))
    if len(bad):
        raise WeightsError(
            f"{len(bad)} log weights are NaN or +inf, in rows {bad[:_ROWS_NAMED].tolist()}: expected finite numbers, or -inf for weight "
            "zero; look at the energies and log densities of these rows"
        )
    if np.isneginf(array).all():
        raise WeightsError(
            f"all {len(array)} weights are zero: every energy is +inf, so nothing can be estimated; check that the flow and the target "
            "describe the same system, or train the flow longer"
        )
    return array


def normalised_weights(log_w: Tensor | np.ndarray, sign: Tensor | np.ndarray | None = None) -> np.ndarray:
    """Weights w_i = s_i exp(log_w_i) / Σ_j s_j exp(log_w_j), ``[n]``, float64.

    Args:
        log_w: Log weights ``[n]``; −inf is weight zero.
        sign: Signs s_i ``[n]``, +1 or −1; all positive by default.

    Raises:
        WeightsError: As :func:`checked_log_weights`, or if negative weights outweigh the others.
    """
    array = checked_log_weights(log_w)
    w = np.exp(array - array.max()) * (1.0 if sign is None else np.asarray(sign, dtype=np.float64))
    if w.sum() <= 0:
        raise WeightsError(
            f"negative weights outweigh the positive ones among {len(w)} samples, so that nothing can be estimated: the flow's steps fold "
            "space where the weight is; take more field.steps, or train the flow longer"
        )
    return w / w.sum()


def exact_weights(samples: WeightedSamples) -> np.ndarray:
    """Normalised weights ``[n]`` of samples that a statistically exact number may rest on; negative ones keep their sign.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the samples.
        WeightsError: If the weights cannot be normalised.
    """
    exact = samples.require_exact()
    return normalised_weights(exact.log_w, exact.sign)


def effective_sample_size(samples: WeightedSamples) -> float:
    """Raw effective sample size as a fraction, (Σw)² / (n Σw²), nothing clipped.

    Args:
        samples: ``n`` weighted samples.

    Returns:
        A fraction between 1/n (less only with negative weights) and 1.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the samples.
        WeightsError: If the weights cannot be normalised.

    References:
        Kish, Survey Sampling (1965); Owen, Monte Carlo theory (2013), chapter 9.
    """
    return _kish_fraction(exact_weights(samples))


def clipped_effective_sample_size(samples: WeightedSamples, *, fraction: float) -> float:
    """Effective sample size after the largest weights were lowered: a comparison with the literature, not a measure of quality.

    The k = round(fraction · n) largest weights are set to the largest weight that is not among them.

    Args:
        samples: ``n`` weighted samples.
        fraction: Fraction of the rows that is clipped, 0 ≤ fraction < 1. Always state it beside the result.

    Returns:
        A fraction between 1/n and 1, never below the raw one.

    Raises:
        InputError: If ``fraction`` is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"expected a clipped fraction in [0, 1), got {fraction}; a usual one is 0.002 (0.2 %)")
    log_w = checked_log_weights(samples.require_exact().log_w)
    n_clipped = min(round(fraction * len(log_w)), len(log_w) - 1)
    threshold = np.sort(log_w)[len(log_w) - 1 - n_clipped]
    if np.isneginf(threshold):
        raise InputError(f"clipping {fraction:.3g} of {len(log_w)} rows removes every row of positive weight; clip a smaller fraction")
    return _kish_fraction(normalised_weights(np.minimum(log_w, threshold), samples.sign))


def negative_share(samples: WeightedSamples) -> float:
    """Sum of the sizes of negative weights against that of the positive ones: how much of what the flow makes cancels; 0 without any.

    Raises:
        TrainingDataError, InexactDensityError, WeightsError: As :func:`exact_weights`.
    """
    w = exact_weights(samples)
    return float(np.abs(w[w < 0]).sum() / w[w > 0].sum())


def ess_by_batch(samples: WeightedSamples, *, batch_size: int) -> np.ndarray:
    """Raw effective sample size of consecutive batches; its median is the figure of merit quoted for a generator.

    Args:
        samples: ``n`` weighted samples.
        batch_size: Rows per batch; an incomplete last batch is left out.

    Returns:
        Fractions ``[n // batch_size]``; 0 for a batch whose weights sum to nothing.

    Raises:
        InputError: If there is not one complete batch.
    """
    exact_weights(samples)
    n_batches = len(samples) // batch_size if batch_size > 0 else 0
    if n_batches == 0:
        raise InputError(f"expected at least one batch of {batch_size} rows, got {len(samples)} rows; draw more samples")
    fractions = np.zeros(n_batches)
    for k in range(n_batches):
        with suppress(WeightsError):
            fractions[k] = effective_sample_size(samples[k * batch_size : (k + 1) * batch_size])
    return fractions


def forward_effective_sample_size(log_ratio: Tensor) -> float:
    """Effective sample size seen from the target, 1 / (E_p[w] E_p[1/w]): falls to zero when the flow misses what p holds.

    With w = p̃/q, E_q[w]² / E_q[w²] = Z² / (Z E_p[w]) and 1/Z = E_p[1/w].

    Args:
        log_ratio: ln p̃(x) − ln q(x) of rows x ~ p ``[n]``, held out from training.

    Returns:
        A fraction between 0 and 1. It sees only modes that the rows visited.

    Raises:
        WeightsError: If a ratio is NaN, or −inf (a row outside the target's own support).

    References:
        Midgley et al., ICLR 2023 (2208.01893): reverse and forward ESS.
    """
    ratios = torch.as_tensor(log_ratio).detach().to("cpu", torch.float64)
    bad = torch.nonzero(torch.isnan(ratios) | torch.isneginf(ratios)).flatten()
    if len(bad) or len(ratios) == 0:
        raise WeightsError(
            f"{len(bad)} of {len(ratios)} log ratios are NaN or -inf, in rows {bad[:_ROWS_NAMED].tolist()}: expected finite values on rows "
            "that follow the target; check their energies"
        )
    if torch.isposinf(ratios).any():
        return 0.0
    log_product = torch.logsumexp(ratios, 0) + torch.logsumexp(-ratios, 0) - 2.0 * math.log(len(ratios))
    return math.exp(-float(log_product))


def pareto_k(samples: WeightedSamples) -> float:
    """Shape k̂ of a generalised Pareto tail fitted to the M = ⌈min(n/5, 3√n)⌉ largest weights, by size where some are negative.

    Below 0.5 the weights have a finite variance; below 0.7 averages and their error bars can be relied on; above, they rest on
    a few rows and the true error is larger than the one stated.

    Args:
        samples: ``n`` weighted samples.

    Returns:
        k̂; 0 when the tail weights are all equal; +inf when fewer than 5 weights make up the tail, so that it cannot be judged.

    References:
        Zhang and Stephens, Technometrics 51, 316 (2009); Vehtari et al., JMLR 25(72) (2024), with its weak prior at 0.5, worth ten
        rows.
    """
    return tail_shape(checked_log_weights(samples.require_exact().log_w))


def tail_shape(log_w: np.ndarray) -> float:
    """k̂ of log weights ``[n]``, as :func:`pareto_k`; −inf is a weight of zero."""
    ordered = np.sort(log_w)
    n_tail = math.ceil(min(len(ordered) / 5, 3 * math.sqrt(len(ordered))))
    if n_tail < _SMALLEST_TAIL:
        return math.inf
    w = np.exp(ordered - ordered[-1])
    excess = w[-n_tail:] - w[-n_tail - 1]
    if excess[-1] <= 1e-12:
        return 0.0
    excess = excess[excess > 0]
    return math.inf if len(excess) < _SMALLEST_TAIL else _pareto_shape(excess)


def _pareto_shape(x: np.ndarray) -> float:
    """Shape of a generalised Pareto distribution from its ascending positive excesses ``[m]``."""
    m = len(x)
    n_grid = 30 + int(math.sqrt(m))
    quartile = x[int(m / 4 + 0.5) - 1]
    b = 1.0 / x[-1] + (1.0 - np.sqrt(n_grid / (np.arange(1, n_grid + 1) - 0.5))) / (3.0 * quartile)
    k = np.log1p(-b[:, None] * x).mean(axis=1)
    log_likelihood = m * (np.log(-b / k) - k - 1.0)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    b_mean = float((b * posterior).sum() / posterior.sum())
    shape = float(np.log1p(-b_mean * x).mean())
    return (m * shape + 10 * 0.5) / (m + 10)


def _kish_fraction(w: np.ndarray) -> float:
    """(Σw)² / (n Σw²) of weights ``[n]`` that sum to one."""
    return float(1.0 / (len(w) * (w**2).sum()))
