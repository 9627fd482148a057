"""The one bootstrap behind every error bar: independent rows are resampled one by one, correlated rows in whole blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from boltzgen.core import WeightedSamples
from boltzgen.errors import InputError

#: Below this number of independent blocks an error bar is itself uncertain by more than a quarter.
FEW_UNITS = 10

#: Statistical inefficiencies that make a unit of consecutive rows: the error of a mean over them is then within about a tenth.
INEFFICIENCIES_IN_A_UNIT = 5.0

#: Central probability of one standard error either side, for a Gaussian.
_LOWER, _UPPER = 0.158655254, 0.841344746


def numbered(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered from 0 without gaps."""
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def independent_units(samples: WeightedSamples) -> np.ndarray:
    """Which independent unit every row belongs to.

    Rows with a ``log_q`` were drawn independently: each is a unit. Rows without (MD, MCMC) are correlated in time: a unit is one
    block of one chain. Give every row its own block where the rows were decorrelated before.

    Returns:
        Labels ``[n]`` from 0 to m − 1.

    Raises:
        InputError: If all rows form one unit, so that no error can be estimated.
    """
    n = len(samples)
    if samples.log_q is not None:
        units = np.arange(n)
    else:
        chain, block = (np.unique(ids.cpu().numpy(), return_inverse=True)[1].reshape(n) for ids in (samples.chain, samples.block))
        units = np.unique(chain * (n + 1) + block, return_inverse=True)[1].reshape(n)
    if n == 0 or units.max() == 0:
        raise InputError(
            f"the {n} rows form one block: expected at least 2 independent blocks (10 or more for a useful error bar); label time blocks "
            "in `block`, or give every decorrelated row its own: block=torch.arange(n)"
        )
    return units


def bootstrap(statistic: Callable[..., np.ndarray | float], *units: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    """Replicates of a statistic over units drawn with replacement.

    Args:
        statistic: Takes how often every row was drawn ``[n]`` (float64), one array for each set of samples, and returns a number or an
            array.
        units: Independent unit of every row ``[n]``, labels 0 to m − 1; one array for each set of samples.
        n_bootstrap: Number of replicates; 200 know an error bar to about 7 %.
        seed: Seed of the resampling.

    Returns:
        Replicates ``[n_bootstrap, ...]``.

    Raises:
        InputError: If fewer than 20 replicates are asked for.

    References:
        Efron, Ann. Statist. 7, 1 (1979); blocks: Künsch, Ann. Statist. 17, 1217 (1989).
    """
    if n_bootstrap < 20:
        raise InputError(f"expected at least 20 bootstrap replicates, got {n_bootstrap}; the default is 200")
    generator = np.random.default_rng(seed)
    sizes = [int(labels.max()) + 1 for labels in units]
    replicates = []
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty basin or bin is ±inf, two of them NaN
        for _ in range(n_bootstrap):
            drawn = [np.bincount(generator.integers(m, size=m), minlength=m).astype(np.float64) for m in sizes]
            counts = (times[labels] for times, labels in zip(drawn, units, strict=True))
            replicates.append(np.asarray(statistic(*counts), dtype=np.float64))
    return np.stack(replicates)


def standard_error(replicates: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Half the central 68.3 % interval of the replicates, times √(m / (m − 1)) for m units.

    For a Gaussian this is the standard deviation. Unlike it, it stays defined when a few replicates leave a basin empty; it is
    +inf when more than 16 % do, or when a replicate is undefined.

    Args:
        replicates: ``[n_bootstrap, ...]``.
        units: Independent unit of every row ``[n]``.

    Returns:
        Standard errors ``[...]``.
    """
    undefined = np.isnan(replicates).any(axis=0)
    lower, upper = np.quantile(np.where(np.isnan(replicates), 0.0, replicates), [_LOWER, _UPPER], axis=0, method="inverted_cdf")
    unbounded = undefined | np.isinf(lower) | np.isinf(upper)
    width = np.where(unbounded, 0.0, upper) - np.where(unbounded, 0.0, lower)
    return np.where(unbounded, np.inf, 0.5 * width * _few_units_factor(units))


def covariance(replicates: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Covariance of ``k`` statistics ``[k, k]`` from replicates ``[n_bootstrap, k]``, corrected for few units as the errors are."""
    return np.cov(replicates, rowvar=False) * _few_units_factor(units) ** 2


def effective_units(weights: np.ndarray, units: np.ndarray) -> float:
    """Effective number of independent units, (ΣW)² / ΣW² with W the weight of a unit; 0 if all weights are zero."""
    per_unit = np.bincount(units, weights=weights)
    squares = float((per_unit**2).sum())
    return float(per_unit.sum() ** 2 / squares) if squares > 0 else 0.0


def few_units_note(units: np.ndarray) -> str:
    """A sentence for the reader when the error rests on few blocks, else an empty string."""
    m = int(units.max()) + 1
    return "" if m >= FEW_UNITS else f"the error rests on {m} independent blocks and is itself uncertain"


def _few_units_factor(units: np.ndarray) -> float:
    m = int(units.max()) + 1
    return float(np.sqrt(m / (m - 1)))
