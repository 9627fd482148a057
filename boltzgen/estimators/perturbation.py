"""Free energy differences of two states from work values: exponential averages, Bennett's acceptance ratio, bounds, convergence.

Φ_F are works of samples of A towards B, Φ_R of samples of B towards A (:class:`~boltzgen.estimators.works.Works`). With a trained map the
exponential average is LFEP and the acceptance ratio LBAR; with works of switching protocols they are Jarzynski's and Crooks'
estimators; with plain energy differences FEP and BAR. One set of functions serves them all, as one theorem stands behind them:
P_F(Φ) e^{−Φ} = e^{−ΔF} P_R(−Φ).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_expit

from boltzgen.core import Estimate
from boltzgen.errors import InputError
from boltzgen.estimators.bootstrap import bootstrap, effective_units, few_units_note, standard_error
from boltzgen.estimators.verdict import Verdict
from boltzgen.estimators.weights import tail_shape
from boltzgen.estimators.works import Works

#: Overlap below which two states hardly know of each other (Klimovich et al. 2015 ask for 0.03 next to the diagonal).
MIN_OVERLAP = 0.05
#: Independent units of each state that must carry the estimate, for its error bar to hold.
MIN_CARRIERS = 50.0
#: The same for an exponential average, whose error bar needs more of them.
MIN_EXPONENTIAL_CARRIERS = 300.0
#: Pareto k̂ of its terms from which rare works that were not seen may carry it.
MAX_EXPONENTIAL_K = 0.6
#: Numbers that should be equal may differ by this many of their errors, and by rounding in kT.
MAX_SIGMA, ROUNDING = 3.0, 1e-6


def exponential_average(works: Works, *, reverse: bool = False, name: str | None = None, n_bootstrap: int = 200, seed: int) -> Estimate:
    """ΔF = F_B − F_A = −ln ⟨e^{−Φ_F}⟩_A, or +ln ⟨e^{−Φ_R}⟩_B.

    Args:
        works: Works of one direction.
        reverse: Whether they start from B.
        name: Name of the estimate.
        n_bootstrap: Bootstrap replicates over independent units.
        seed: Seed of the bootstrap.

    Returns:
        ΔF in kT; ``n_effective`` is the effective number of units that carry the average. Its note says why the error may be too small;
        that there is none is no proof, as one direction cannot tell what it has not seen: only both have a verdict.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.

    References:
        Zwanzig, J. Chem. Phys. 22, 1420 (1954); Jarzynski, Phys. Rev. Lett. 78, 2690 (1997), eq. 2; Phys. Rev. E 65, 046122 (2002), eq. 8.
    """
    w = works.require_exact().w
    weights = np.exp(w.min() - w)
    sign = 1.0 if reverse else -1.0

    def difference(counts: np.ndarray) -> float:
        return sign * (_log_sum(-w, counts) - math.log(counts.sum()))

    replicates = bootstrap(difference, works.units, n_bootstrap=n_bootstrap, seed=seed)
    carriers = effective_units(weights, works.units)
    return Estimate(
        name=name or f"F_B - F_A, exponential average from {'B' if reverse else 'A'}",
        value=difference(np.ones(len(w))),
        stderr=float(standard_error(replicates, works.units)),
        unit="kT",
        n_effective=carriers,
        note=_notes(
            _few_carriers(carriers, MIN_EXPONENTIAL_CARRIERS), _heavy_tail(tail_shape(-w)), few_units_note(works.units), works.note
        ),
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
    m = works.n_units
    if np.isposinf(w).any():
        return Estimate(name=name, value=sign * math.inf, stderr=math.inf, unit="kT", n_effective=float(m), note=works.note)
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
        mismatch: How far the two sets of works are from Crooks' theorem: 1 − (second-order)/(first-order) estimate of the overlap,
            zero within its error where the works belong together.
        replicates: ΔF of every bootstrap replicate ``[n_bootstrap]``.
    """

    difference: Estimate
    overlap: float
    n_forward: float
    n_reverse: float
    mismatch: Estimate
    replicates: np.ndarray


def acceptance_ratio(
    forward: Works,
    reverse: Works,
    *,
    name: str = "F_B - F_A",
    shared_units: np.ndarray | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> AcceptanceRatio:
    """Bennett's acceptance ratio: the root ΔF of Σ_F f(M + Φ_F − ΔF) = Σ_R f(−M + Φ_R + ΔF), f(x) = 1/(1 + eˣ), M = ln(n_F/n_R).

    It is the maximum-likelihood estimate from both directions and equals MBAR with two states; +inf works count as rows that are never
    accepted. (pymbar 4.0.3's ``bar`` returns 0 ± 0 for them; where all are finite the two agree, which is tested.) The root is
    found for the logarithms of both sums, which neither under- nor overflow.

    **Do the works belong together?** With a = f(…) the probability that a row is one of the other state, Crooks' theorem gives
    E[Σ_F a] = E[Σ_F a(1 − a) + Σ_R a(1 − a)]: two estimates of the same overlap, of first and second order. Works of
    the wrong sign, unit or temperature violate it.

    Args:
        forward: Works of samples of A.
        reverse: Works of samples of B.
        name: Name of the estimate.
        shared_units: Independent units of forward and reverse rows ``[n_F + n_R]``, labels 0 to m − 1, where a unit may hold rows of both
            states, as one stretch of a walker that went to and fro does. None: the units of each state are drawn on their own.
        n_bootstrap: Bootstrap replicates over independent units.
        seed: Seed of the bootstrap.

    Returns:
        ΔF with its error, overlap, effective numbers and mismatch.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.

    References:
        Bennett, J. Comput. Phys. 22, 245 (1976), eq. 12; Shirts, Bair, Hooker & Pande, Phys. Rev. Lett. 91, 140601 (2003), eq. 5;
        overlap: Klimovich, Shirts & Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015); the two orders: Hahn & Then, Phys. Rev. E
        81, 041117 (2010).
    """
    w_f, w_r = forward.require_exact().w, reverse.require_exact().w

    some_f, some_r = np.isfinite(w_f), np.isfinite(w_r)  # rows that are never accepted count in M alone

    def root_and_mismatch(c_f: np.ndarray, c_r: np.ndarray, *, start: float) -> np.ndarray:
        m = float(np.log(c_f.sum()) - np.log(c_r.sum()))
        rows = w_f[some_f], w_r[some_r], c_f[some_f], c_r[some_r]
        x = _root(*rows, m, start=start)
        return np.array([x, _mismatch(*rows, m, x)])

    near = 0.5 * float(np.median(w_f[some_f]) - np.median(w_r[some_r]))
    value, mismatch = root_and_mismatch(np.ones(len(w_f)), np.ones(len(w_r)), start=near)
    nearby = functools.partial(root_and_mismatch, start=float(value))
    if shared_units is None:
        replicates = bootstrap(nearby, forward.units, reverse.units, n_bootstrap=n_bootstrap, seed=seed)
    else:
        replicates = bootstrap(lambda c: nearby(c[: len(w_f)], c[len(w_f) :]), shared_units, n_bootstrap=n_bootstrap, seed=seed)
    fewest = min(forward, reverse, key=lambda works: works.n_units).units
    stderr, mismatch_error = standard_error(replicates, fewest)
    log_f, log_r = _log_accepted(w_f, w_r, value, math.log(len(w_f) / len(w_r)))
    n_forward, n_reverse = (
        effective_units(np.exp(logs - logs.max()), units) for logs, units in ((log_f, forward.units), (log_r, reverse.units))
    )
    carriers, note = min(n_forward, n_reverse), _notes(few_units_note(fewest), forward.note, reverse.note)
    return AcceptanceRatio(
        Estimate(
            name=name,
            value=float(value),
            stderr=float(stderr),
            unit="kT",
            n_effective=carriers,
            note=_notes(_few_carriers(carriers, MIN_CARRIERS), note),
        ),
        _overlap(np.exp(log_f), np.exp(log_r)),
        n_forward,
        n_reverse,
        Estimate(name="mismatch", value=float(mismatch), stderr=float(mismatch_error), unit="", n_effective=carriers),
        replicates[:, 0],
    )


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
    """How the acceptance ratio settles with the amount of data, taken from the start and from the end of every chain.

    Args:
        forward: Works of samples of A, in the order of time.
        reverse: Works of samples of B, likewise.
        n_shares: Number of shares, even.
        n_bootstrap: Bootstrap replicates of each.
        seed: Seed of the bootstrap.

    Returns:
        Two curves that meet at the full data.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the works.
        InputError: If a share has fewer than two units, or the number of shares is odd.

    References:
        Yang, Bitetti-Putzer & Karplus, J. Chem. Phys. 120, 2618 (2004); Klimovich, Shirts & Mobley (2015).
    """
    if n_shares < 2 or n_shares % 2:
        raise InputError(f"expected an even number of shares, so that there are halves to compare, got {n_shares}")
    shares, curves = np.arange(1, n_shares + 1) / n_shares, []
    whole = acceptance_ratio(forward, reverse, n_bootstrap=n_bootstrap, seed=seed).difference
    for from_end in (False, True):
        found = []
        for share in shares[:-1]:
            parts = [works.share(share, from_end=from_end) for works in (forward, reverse)]
            if min(part.n_units for part in parts) < 2:
                raise InputError(
                    f"{share:.0%} of the works form one independent unit: take fewer than {n_shares} shares, or shorter blocks"
                )
            found.append(acceptance_ratio(*parts, n_bootstrap=n_bootstrap, seed=seed).difference)
        found.append(whole)
        curves.append((np.array([float(e.value) for e in found]), np.array([float(e.stderr) for e in found])))
    (start, start_error), (end, end_error) = curves
    return Convergence(shares, start, end, start_error, end_error)


def perturbation_verdict(
    found: AcceptanceRatio,
    *,
    drift: Convergence | None = None,
    warnings: Sequence[str] = (),
    advice: str = "a better map, or states in between",
) -> Verdict:
    """Judge a free energy difference by what carries it.

    ``low overlap`` below an overlap of 0.05; ``not converged`` with fewer than 50 independent works of either state behind it, works of
    the two directions that contradict each other or halves of the data that differ by more than three errors, or a warning; ``reliable``
    otherwise. Modes that neither set of samples visits cannot be seen by any of this.

    Args:
        found: The acceptance ratio.
        drift: Its convergence with the data.
        warnings: Reasons for doubt from elsewhere.
        advice: What helps against low overlap.

    Returns:
        The verdict with its reasons.
    """
    doubts = list(warnings)
    carriers = f"{found.n_forward:.0f} independent works of A and {found.n_reverse:.0f} of B carry the estimate"
    if not found.difference.n_effective >= MIN_CARRIERS:
        doubts.append(f"{carriers}, {MIN_CARRIERS:.0f} of each are needed: sample longer")
    if not math.isfinite(float(found.difference.stderr)):
        doubts.append("the error is unbounded: sample longer")
    mismatch = found.mismatch
    if not agree(float(mismatch.value), 0.0, float(mismatch.stderr)):
        doubts.append(
            f"forward and reverse works contradict each other (two estimates of their overlap differ by {100 * float(mismatch.value):.0f} "
            f"+- {100 * float(mismatch.stderr):.0f} %): check the sign, unit and temperature of the reverse works, or sample longer"
        )
    if drift is not None:
        half = len(drift.shares) // 2 - 1
        first, second = drift.from_start[half], drift.from_end[half]
        error = math.hypot(drift.from_start_error[half], drift.from_end_error[half])
        if not agree(first, second, error):
            doubts.append(f"the halves of the data give {first:.4g} and {second:.4g} kT, with an error of {error:.2g}: sample longer")
    if not found.overlap >= MIN_OVERLAP:
        overlap = f"the two states overlap by {found.overlap:.2g} only, {MIN_OVERLAP} are needed: {advice}"
        return Verdict("low overlap", (overlap, *doubts))
    if doubts:
        return Verdict("not converged", tuple(doubts))
    return Verdict("reliable", (f"overlap {found.overlap:.2g}; {carriers}",))


def agree(a: float, b: float, error: float) -> bool:
    """Whether two finite numbers are equal within their error and rounding."""
    return math.isfinite(error) and abs(a - b) <= MAX_SIGMA * error + ROUNDING


def _few_carriers(carriers: float, needed: float) -> str:
    return "" if carriers >= needed else f"about {carriers:.0f} independent works carry the number: its error bar is too small"


def _notes(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _log_accepted(w_f: np.ndarray, w_r: np.ndarray, x: float, m: float) -> tuple[np.ndarray, np.ndarray]:
    """ln of the probabilities that a sample of A is one of B, and the other way round, given that it is in the union of both."""
    return log_expit(x - m - w_f), log_expit(m - x - w_r)


def _root(w_f: np.ndarray, w_r: np.ndarray, c_f: np.ndarray, c_r: np.ndarray, m: float, *, start: float) -> float:
    """The ΔF of Bennett's equation where finite works count ``c`` times; ±inf where no work of a direction counts, NaN where none does.

    h(x) = ln Σ_F c f(M + w − x) − ln Σ_R c f(−M + w + x) grows, by about one per kT, so that its sign and size tell where to look.
    """
    some_f, some_r = bool(c_f.any()), bool(c_r.any())
    if not (some_f and some_r):
        return math.inf if some_r else -math.inf if some_f else math.nan

    def h(x: float) -> float:
        log_f, log_r = _log_accepted(w_f, w_r, x, m)
        return _log_sum(log_f, c_f) - _log_sum(log_r, c_r)

    beyond, at_start = start, h(start)
    step = 1.5 * abs(at_start) + ROUNDING
    while at_start * h(beyond) > 0:
        beyond, step = beyond - math.copysign(step, at_start), 2 * step
    return float(brentq(h, start, beyond, xtol=1e-12, rtol=4 * np.finfo(float).eps, maxiter=1000)) if at_start else start


def _heavy_tail(k: float) -> str:
    return (
        "" if k < MAX_EXPONENTIAL_K else f"works that were not seen may carry the number (Pareto k = {k:.2f}): its error bar is too small"
    )


def _log_sum(logs: np.ndarray, counts: np.ndarray) -> float:
    """ln Σ c e^l over the rows that count."""
    logs, counts = _drawn(logs, counts)
    shift = float(logs.max())
    return shift + math.log(counts @ np.exp(logs - shift)) if math.isfinite(shift) else shift


def _mismatch(w_f: np.ndarray, w_r: np.ndarray, c_f: np.ndarray, c_r: np.ndarray, m: float, x: float) -> float:
    """1 − [Σ_F a(1 − a) + Σ_R a(1 − a)] / Σ_F a over the rows that count, from logarithms."""
    if not math.isfinite(x):
        return math.nan
    (w_f, c_f), (w_r, c_r) = _drawn(w_f, c_f), _drawn(w_r, c_r)
    log_f, log_r = _log_accepted(w_f, w_r, x, m)
    scale = max(float(log_f.max()), float(log_r.max()))
    a_f, a_r = np.exp(log_f - scale), np.exp(log_r - scale)
    second = c_f @ (a_f * -np.expm1(log_f)) + c_r @ (a_r * -np.expm1(log_r))
    return 1.0 - float(second / (c_f @ a_f))


def _drawn(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that count: one that was not drawn may be e^1000 times larger than all others."""
    drawn = counts > 0
    return values[drawn], counts[drawn]


def _overlap(accepted_f: np.ndarray, accepted_r: np.ndarray) -> float:
    """1 − λ₂ = (1/n_F + 1/n_R) Σ p_A p_B of the two-state overlap matrix."""
    both = float((accepted_f * (1 - accepted_f)).sum() + (accepted_r * (1 - accepted_r)).sum())
    return both * (1 / len(accepted_f) + 1 / len(accepted_r))
