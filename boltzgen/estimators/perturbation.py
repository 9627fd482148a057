"""Free energy differences of two states from work values: exponential averages, Bennett's acceptance ratio, bounds, convergence.

Φ_F are works of samples of A towards B, Φ_R of samples of B towards A (:class:`~boltzgen.estimators.works.Works`). With a trained map the
exponential average is LFEP and the acceptance ratio LBAR; with works of switching protocols they are Jarzynski's and Crooks'
estimators; with plain energy differences FEP and BAR. One set of functions serves them all, as one theorem stands behind them:
P_F(Φ) e^{−Φ} = e^{−ΔF} P_R(−Φ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from boltzgen.core import Estimate
from boltzgen.errors import InputError
from boltzgen.estimators.bootstrap import bootstrap, effective_units, few_units_note, standard_error
from boltzgen.estimators.verdict import Verdict
from boltzgen.estimators.works import Works

#: Overlap below which two states hardly know of each other (Klimovich et al. 2015 ask for 0.03 next to the diagonal).
MIN_OVERLAP = 0.05
#: Independent units of each state that must carry the estimate, for its error bar to hold.
MIN_CARRIERS = 50.0
#: Halves of the data may differ by this many of their combined errors.
MAX_DRIFT = 3.0
#: Steps of Newton's method for the acceptance ratio, and how close in kT it comes.
_MOST_STEPS, _CLOSE = 100, 1e-11


def exponential_average(works: Works, *, reverse: bool = False, name: str | None = None, n_bootstrap: int = 200, seed: int) -> Estimate:
    """ΔF = F_B − F_A = −ln ⟨e^{−Φ_F}⟩_A, or +ln ⟨e^{−Φ_R}⟩_B.

    Args:
        works: Works of one direction.
        reverse: Whether they start from B.
        name: Name of the estimate.
        n_bootstrap: Bootstrap replicates over independent units.
        seed: Seed of the bootstrap.

    Returns:
        ΔF in kT; ``n_effective`` is the effective number of units that carry the average.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.

    References:
        Zwanzig, J. Chem. Phys. 22, 1420 (1954); Jarzynski, Phys. Rev. Lett. 78, 2690 (1997), eq. 2; Phys. Rev. E 65, 046122 (2002), eq. 8.
    """
    w = works.require_exact().w
    shift = float(w.min())
    weights = np.exp(shift - w)
    sign = 1.0 if reverse else -1.0

    def difference(counts: np.ndarray) -> float:
        return sign * float(np.log(counts @ weights / counts.sum()) - shift)

    replicates = bootstrap(difference, works.units, n_bootstrap=n_bootstrap, seed=seed)
    return Estimate(
        name=name or f"F_B - F_A, exponential average from {'B' if reverse else 'A'}",
        value=difference(np.ones(len(w))),
        stderr=float(standard_error(replicates, works.units)),
        unit="kT",
        n_effective=effective_units(weights, works.units),
        note="; ".join(part for part in (few_units_note(works.units), works.note) if part),
    )


def bound(works: Works, *, reverse: bool = False) -> Estimate:
    """⟨Φ_F⟩_A ≥ ΔF, or −⟨Φ_R⟩_B ≤ ΔF (Jensen's inequality; also the loss that maps are trained by).

    Args:
        works: Works of one direction.
        reverse: Whether they start from B.

    Returns:
        The mean in kT, with the error of independent units; ±inf with error +inf where a work is infinite.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.
    """
    w, sign = works.require_exact().w, -1.0 if reverse else 1.0
    name = f"F_B - F_A, {'lower' if reverse else 'upper'} bound"
    m = int(works.units.max()) + 1
    if np.isposinf(w).any() or m < 2:
        value = sign * (math.inf if np.isposinf(w).any() else float(w.mean()))
        return Estimate(name=name, value=value, stderr=math.inf, unit="kT", n_effective=float(m), note=works.note)
    mean = float(w.mean())
    per_unit = np.bincount(works.units, weights=w - mean)
    stderr = float(np.sqrt((per_unit**2).sum() * m / (m - 1)) / len(w))
    return Estimate(name=name, value=sign * mean, stderr=stderr, unit="kT", n_effective=float(m), note=few_units_note(works.units))


@dataclass(frozen=True)
class AcceptanceRatio:
    """Bennett's acceptance ratio with what tells whether to trust it.

    Attributes:
        difference: ΔF in kT.
        overlap: Share of what a sample of one state can also be a sample of the other: the off-diagonal sum O_AB + O_BA of the
            overlap matrix (1 − λ₂); 1 for equal states, 0 for disconnected ones.
        n_forward: Effective number of independent forward units that carry the estimate.
        n_reverse: Of reverse ones.
    """

    difference: Estimate
    overlap: float
    n_forward: float
    n_reverse: float


def acceptance_ratio(forward: Works, reverse: Works, *, name: str = "F_B - F_A", n_bootstrap: int = 200, seed: int) -> AcceptanceRatio:
    """Bennett's acceptance ratio: the root ΔF of Σ_F f(M + Φ_F − ΔF) = Σ_R f(−M + Φ_R + ΔF), f(x) = 1/(1 + eˣ), M = ln(n_F/n_R).

    It is the maximum-likelihood estimate from both directions and equals MBAR with two states; +inf works count as rows that are never
    accepted. (pymbar 4.0.3's ``bar`` returns 0 ± 0 for them; where all are finite the two agree, which is tested.)

    Args:
        forward: Works of samples of A.
        reverse: Works of samples of B.
        name: Name of the estimate.
        n_bootstrap: Bootstrap replicates, over independent units of each state on their own.
        seed: Seed of the bootstrap.

    Returns:
        ΔF with its error, overlap and effective numbers.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.

    References:
        Bennett, J. Comput. Phys. 22, 245 (1976), eq. 12; Shirts, Bair, Hooker & Pande, Phys. Rev. Lett. 91, 140601 (2003), eq. 5;
        overlap: Klimovich, Shirts & Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015).
    """
    w_f, w_r = forward.require_exact().w, reverse.require_exact().w
    value = _root(w_f, w_r, np.ones(len(w_f)), np.ones(len(w_r)), start=0.0)
    drawn = (
        bootstrap(lambda counts: counts, works.units, n_bootstrap=n_bootstrap, seed=seed + k) for k, works in enumerate((forward, reverse))
    )
    replicates = np.array([_root(w_f, w_r, c_f, c_r, start=value) for c_f, c_r in zip(*drawn, strict=True)])
    fewest = min(forward, reverse, key=lambda works: int(works.units.max())).units
    accepted_f, accepted_r = _accepted(w_f, w_r, value, math.log(len(w_f) / len(w_r)))
    n_forward, n_reverse = effective_units(accepted_f, forward.units), effective_units(accepted_r, reverse.units)
    difference = Estimate(
        name=name,
        value=value,
        stderr=float(standard_error(replicates, fewest)),
        unit="kT",
        n_effective=min(n_forward, n_reverse),
        note="; ".join(part for part in (few_units_note(fewest), forward.note, reverse.note) if part),
    )
    return AcceptanceRatio(difference, _overlap(accepted_f, accepted_r), n_forward, n_reverse)


@dataclass(frozen=True)
class Convergence:
    """The acceptance ratio of growing shares of the data, in kT.

    Attributes:
        shares: Shares ``[k]``, the last one 1.
        from_start: ΔF of the first rows ``[k]``.
        from_end: ΔF of the last rows ``[k]``.
        from_start_error: Its standard errors ``[k]``.
        from_end_error: Likewise.
    """

    shares: np.ndarray
    from_start: np.ndarray
    from_end: np.ndarray
    from_start_error: np.ndarray
    from_end_error: np.ndarray


def convergence(forward: Works, reverse: Works, *, n_shares: int = 10, n_bootstrap: int = 50, seed: int) -> Convergence:
    """How the acceptance ratio settles with the amount of data, taken from the start and from the end of both.

    Args:
        forward: Works of samples of A, in the order of time.
        reverse: Works of samples of B, likewise.
        n_shares: Number of shares.
        n_bootstrap: Bootstrap replicates of each.
        seed: Seed of the bootstrap.

    Returns:
        Two curves that meet at the full data.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.
        InputError: If a share has fewer than two units.

    References:
        Yang, Bitetti-Putzer & Karplus, J. Chem. Phys. 120, 2618 (2004); Klimovich, Shirts & Mobley (2015).
    """
    shares = np.arange(1, n_shares + 1) / n_shares
    if min(len(forward), len(reverse)) < 2 * n_shares:
        raise InputError(f"expected at least {2 * n_shares} works of each state for {n_shares} shares, got {len(forward)}, {len(reverse)}")
    curves = []
    for take in (_first, _last):
        found = [
            acceptance_ratio(take(forward, share), take(reverse, share), n_bootstrap=n_bootstrap, seed=seed).difference for share in shares
        ]
        curves.append((np.array([float(e.value) for e in found]), np.array([float(e.stderr) for e in found])))
    (start, start_error), (end, end_error) = curves
    return Convergence(shares, start, end, start_error, end_error)


def perturbation_verdict(found: AcceptanceRatio, *, drift: Convergence | None = None, warnings: Sequence[str] = ()) -> Verdict:
    """Judge a free energy difference by what carries it.

    ``low overlap`` below an overlap of 0.05; ``not converged`` with fewer than 50 independent works of either state behind it, halves of
    the data that differ by more than three errors, or a warning; ``reliable`` otherwise. Modes that neither set of samples visits
    cannot be seen by any of this.

    Args:
        found: The acceptance ratio.
        drift: Its convergence with the data.
        warnings: Reasons for doubt from elsewhere.

    Returns:
        The verdict with its reasons.
    """
    estimate = found.difference
    overlap = [] if found.overlap >= MIN_OVERLAP else [
        f"the two states overlap by {found.overlap:.2g} only, {MIN_OVERLAP} are needed: a better map, or states in between"
    ]  # fmt: skip
    doubts = list(warnings)
    if not estimate.n_effective >= MIN_CARRIERS:
        doubts.append(
            f"{found.n_forward:.0f} independent works of A and {found.n_reverse:.0f} of B carry the estimate, {MIN_CARRIERS:.0f} of "
            "each are needed: sample longer"
        )
    if not math.isfinite(float(estimate.stderr)):
        doubts.append("the error is unbounded")
    half = None if drift is None else int(np.argmin(np.abs(drift.shares - 0.5)))
    if drift is not None and half is not None:
        difference = abs(drift.from_start[half] - drift.from_end[half])
        error = math.hypot(drift.from_start_error[half], drift.from_end_error[half])
        if not difference <= MAX_DRIFT * error:
            doubts.append(f"the two halves of the data differ by {difference:.2g} kT, with an error of {error:.2g}: sample longer")
    if overlap:
        return Verdict("low overlap", (*overlap, *doubts))
    if doubts:
        return Verdict("not converged", tuple(doubts))
    return Verdict("reliable", (
        f"overlap {found.overlap:.2g}; {found.n_forward:.0f} independent works of A and {found.n_reverse:.0f} of B carry the estimate",
    ))  # fmt: skip


def _first(works: Works, share: float) -> Works:
    return works.rows(slice(0, round(share * len(works))))


def _last(works: Works, share: float) -> Works:
    return works.rows(slice(len(works) - round(share * len(works)), None))


def _accepted(w_f: np.ndarray, w_r: np.ndarray, difference: float, m: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that a sample of A is one of B, and the other way round, given that it is in the union of both."""
    return expit(-(m + w_f - difference)), expit(-(-m + w_r + difference))


def _root(w_f: np.ndarray, w_r: np.ndarray, c_f: np.ndarray, c_r: np.ndarray, *, start: float) -> float:
    """The ΔF of Bennett's equation where rows count ``c`` times; ±inf where all works of a direction are infinite.

    The difference of the two sums grows monotonically with ΔF: Newton's method within a bracket that it shrinks.
    """
    some_f, some_r = bool(c_f[np.isfinite(w_f)].any()), bool(c_r[np.isfinite(w_r)].any())
    if not (some_f and some_r):
        return math.inf if some_r else -math.inf if some_f else math.nan
    m = math.log(c_f.sum() / c_r.sum())
    lower, upper, x = -math.inf, math.inf, start
    for _ in range(_MOST_STEPS):
        a_f, a_r = _accepted(w_f, w_r, x, m)
        excess = float(c_f @ a_f - c_r @ a_r)
        slope = float(c_f @ (a_f * (1 - a_f)) + c_r @ (a_r * (1 - a_r)))
        lower, upper = (x, upper) if excess < 0 else (lower, x)
        newton = x - excess / slope if slope > 0 else math.inf
        x_next = newton if lower < newton < upper and abs(newton - x) < 10 else _within(lower, upper, x)
        if abs(x_next - x) < _CLOSE * max(1.0, abs(x)):
            return x_next
        x = x_next
    return x


def _within(lower: float, upper: float, x: float) -> float:
    """A point inside the bracket, or far outside the side that is still open."""
    if math.isfinite(lower) and math.isfinite(upper):
        return 0.5 * (lower + upper)
    far = max(10.0, abs(x))
    return x + far if math.isfinite(lower) else x - far


def _overlap(accepted_f: np.ndarray, accepted_r: np.ndarray) -> float:
    """1 − λ₂ = (1/n_F + 1/n_R) Σ p_A p_B of the two-state overlap matrix."""
    both = float((accepted_f * (1 - accepted_f)).sum() + (accepted_r * (1 - accepted_r)).sum())
    return both * (1 / len(accepted_f) + 1 / len(accepted_r))
