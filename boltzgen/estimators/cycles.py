"""Free energies from several runs: repeats combined, thermodynamic cycles closed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from boltzgen.core import Estimate
from boltzgen.errors import InputError

#: Upper end of the central interval that holds as much as one standard error.
_UPPER = float(norm.cdf(1.0))


@dataclass(frozen=True)
class Repeats:
    """Several independent runs of one difference.

    Attributes:
        estimate: Their mean; its error is the larger of the two below.
        within: Error of the mean from the errors that the runs state, √(Σ s²)/n.
        between: Error of the mean from their scatter, its 68.3 % interval by Student's t; NaN for one run.
        chi_squared: Σ (v − mean)²/s² per degree of freedom: about 1 where the stated errors are right; NaN for one run.
    """

    estimate: Estimate
    within: float
    between: float
    chi_squared: float


def combine_repeats(estimates: Sequence[Estimate], *, name: str) -> Repeats:
    """The mean of independent runs of the same difference.

    The plain mean, not one weighted by stated errors: those are themselves noisy, and small ones belong to runs that saw too little.

    Args:
        estimates: One for each run, finite, of one unit.
        name: Name of the result.

    Raises:
        InputError: If there are none, or one is not finite.
    """
    values, errors = (np.array([float(getattr(e, key)) for e in estimates]) for key in ("value", "stderr"))
    if not len(estimates) or not np.isfinite(values).all() or not np.isfinite(errors).all():
        raise InputError(f"{name}: expected finite values and errors of one run or more, got {values.tolist()} and {errors.tolist()}")
    n = len(values)
    mean, within = float(values.mean()), float(np.sqrt((errors**2).sum()) / n)
    between = chi_squared = math.nan
    if n > 1:
        between = float(student.ppf(_UPPER, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
        with np.errstate(divide="ignore", invalid="ignore"):
            chi_squared = float(((values - mean) ** 2 / errors**2).sum() / (n - 1))
    stderr = within if math.isnan(between) else max(within, between)
    combined = Estimate(
        name=name, value=mean, stderr=stderr, unit=estimates[0].unit, n_effective=float(sum(e.n_effective for e in estimates)),
        note="; ".join(dict.fromkeys(e.note for e in estimates if e.note)),
    )  # fmt: skip
    return Repeats(combined, within, between, chi_squared)


@dataclass(frozen=True)
class ClosedCycles:
    """Differences that add up around every cycle.

    Attributes:
        estimates: The differences after closing, in the order given, with errors that know it.
        closures: Sum of the differences around each cycle before closing, with its error: zero within it where all is well.
    """

    estimates: tuple[Estimate, ...]
    closures: tuple[Estimate, ...]


def close_cycles(estimates: Mapping[str, Estimate], cycles: Mapping[str, Sequence[str]]) -> ClosedCycles:
    """The closest differences, by inverse variance, that sum to zero around every cycle.

    With values v, variances S and one row of C for each cycle (+1 or −1 for a leg forwards or backwards), the minimum of
    Σ (x − v)²/s² under C x = 0 is x = v − S Cᵀ (C S Cᵀ)⁺ C v with covariance S − S Cᵀ (C S Cᵀ)⁺ C S.

    Args:
        estimates: Leg → difference, independent of each other.
        cycles: Cycle → legs in order; a name with a leading ``-`` is passed backwards.

    Raises:
        InputError: If a cycle names a leg that there is not.

    References:
        Inverse-variance closure is the maximum-likelihood estimate for normal errors; see Xu, J. Chem. Inf. Model. 59, 4720 (2019).
    """
    names = list(estimates)
    matrix = np.zeros((len(cycles), len(names)))
    for row, (cycle, legs) in enumerate(cycles.items()):
        for leg in legs:
            sign, name = (-1.0, leg[1:]) if leg.startswith("-") else (1.0, leg)
            if name not in estimates:
                raise InputError(f"cycle {cycle}: there is no leg {name!r}; there are {', '.join(names)}")
            matrix[row, names.index(name)] += sign
    v, s = (np.array([float(getattr(estimates[name], key)) for name in names]) for key in ("value", "stderr"))
    covariance = np.diag(s**2)
    around = matrix @ covariance @ matrix.T
    gain = covariance @ matrix.T @ np.linalg.pinv(around)
    closed, left = v - gain @ matrix @ v, covariance - gain @ matrix @ covariance
    new = [
        Estimate(
            name=f"{name}, cycles closed", value=float(closed[k]), stderr=float(math.sqrt(max(left[k, k], 0.0))),
            unit=estimates[name].unit, n_effective=estimates[name].n_effective,
        )
        for k, name in enumerate(names)
    ]  # fmt: skip
    closures = [
        Estimate(
            name=f"closure of {cycle}", value=float(matrix[row] @ v), stderr=float(math.sqrt(around[row, row])), unit="kT",
            n_effective=float(min(estimates[name].n_effective for k, name in enumerate(names) if matrix[row, k])),
        )
        for row, cycle in enumerate(cycles)
    ]  # fmt: skip
    return ClosedCycles(tuple(new), tuple(closures))
