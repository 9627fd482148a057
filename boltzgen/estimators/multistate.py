"""Free energies of several states at once from samples of all of them (MBAR), with maps between the states or without.

Maps T_k from a reference space to the space of state k, T_0 = 1, pull every sample back, z = T_k⁻¹(x). Changing variables,
∫ e^{−u_k(x)} dx = ∫ e^{−ũ_k(z)} dz with ũ_k(z) = u_k(T_k z) − ln|det ∂T_k z/∂z|: pulled-back samples of state k have the density
e^{−ũ_k}/Z_k with the **same** Z_k. MBAR of ũ_l(z_n) therefore gives ln Z_k/Z_0 whatever the maps are; they change the overlap only.
Identities give plain MBAR, two states the acceptance ratio of mapped works (LBAR), as ũ_1 − ũ_0 is the work of a row.

References:
    Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008); configuration mapping: Paliwal & Shirts, J. Chem. Theory Comput. 9, 4700
    (2013); learned maps: Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_expit

from boltzgen.core import Estimate
from boltzgen.errors import NoOverlapError
from boltzgen.estimators.bootstrap import FEW_UNITS, bootstrap, covariance, effective_units, standard_error
from boltzgen.estimators.mbar_equations import log_mixture, solve_mbar
from boltzgen.estimators.perturbation import MAX_SIGMA, MIN_CARRIERS, MIN_OVERLAP, ROUNDING
from boltzgen.estimators.state_potentials import StatePotentials
from boltzgen.estimators.verdict import Verdict


@dataclass(frozen=True)
class Neighbours:
    """Two states that samples of both tie together, looked at on their own with the free energies of all states.

    Attributes:
        a: One of them.
        b: The other.
        overlap: 1 − λ₂ of the overlap matrix of the two, as of the acceptance ratio.
        n_a: Effective number of independent units of A that are samples of B as well.
        n_b: The same with A and B exchanged.
        mismatch: 1 − (second-order)/(first-order) estimate of the overlap, zero within its error where the energies belong together.
    """

    a: int
    b: int
    overlap: float
    n_a: float
    n_b: float
    mismatch: Estimate


@dataclass(frozen=True)
class MultistateFreeEnergies:
    """Free energies of all states with what tells whether to trust them.

    Attributes:
        estimate: f_k − f_0 in kT ``[K]``, with errors and covariance ``[K, K]``; its first entry is zero by definition.
        overlap_matrix: O_ij = Σ_n p_in p_jn / N_i of the states with samples ``[S, S]``: how much of a sample of i is one of j; rows
            sum to 1.
        neighbours: The pairs with the largest overlaps that tie all states together (a spanning tree), the smallest overlap first.
        reweighted: Effective number of independent units that carry each state without samples, by its number.
        replicates: Bootstrap replicates of f ``[n_bootstrap, K]``.
        n_units: Fewest independent units of a state.
        note: What a reader must know of the rows.
    """

    estimate: Estimate
    overlap_matrix: np.ndarray
    neighbours: tuple[Neighbours, ...]
    reweighted: dict[int, float]
    replicates: np.ndarray = field(repr=False)
    n_units: int
    note: str = ""

    @property
    def f(self) -> np.ndarray:
        """Free energies ``[K]`` in kT, that of state 0 is zero."""
        return np.asarray(self.estimate.value)

    @property
    def overlap(self) -> float:
        """Smallest overlap of neighbours."""
        return self.neighbours[0].overlap

    @property
    def carriers(self) -> float:
        """Fewest effective independent units that tie two neighbours together, or carry a state without samples."""
        return self.estimate.n_effective

    def between(self, a: int, b: int, *, name: str | None = None) -> Estimate:
        """F_b − F_a in kT, with the error of the difference."""
        stderr = standard_error(self.replicates[:, b] - self.replicates[:, a], np.arange(self.n_units))
        value = float(self.f[b] - self.f[a])
        return Estimate(name or f"F_{b} - F_{a}", value, float(stderr), "kT", self.carriers, note=self.estimate.note)


def multistate_free_energies(
    potentials: StatePotentials, *, name: str = "F_k - F_0", n_bootstrap: int = 200, seed: int
) -> MultistateFreeEnergies:
    """Solve the MBAR equations f_k = −ln Σ_n e^{−u_k(x_n)} / Σ_l N_l e^{f_l − u_l(x_n)}, with bootstrap errors.

    Independent units are drawn with replacement, those of each state on their own, or together for states that share units.

    Args:
        potentials: Reduced potentials of all samples in all states, in units that are independent (:meth:`StatePotentials.blocked`).
        name: Name of the estimate.
        n_bootstrap: Bootstrap replicates.
        seed: Seed of the bootstrap.

    Returns:
        Free energies with errors, overlaps and effective numbers.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the potentials.
        NoOverlapError: If states are not tied together.
    """
    rows = potentials.require_exact()
    ones, strata = np.ones(len(rows)), rows.strata()
    f = solve_mbar(rows.u, rows.state, ones)
    pairs = _spanning_tree(rows, f)

    def statistic(*drawn: np.ndarray) -> np.ndarray:
        counts = ones.copy()
        for some, times in zip(strata, drawn, strict=True):
            counts[some] = times
        try:
            found = solve_mbar(rows.u, rows.state, counts, start=f)
        except NoOverlapError:
            return np.full(len(f) + len(pairs), np.nan)
        return np.concatenate([found, [_Pair.of(rows, found, *pair, counts=counts).mismatch(counts) for pair in pairs]])

    units = [np.unique(rows.units[some], return_inverse=True)[1].reshape(-1) for some in strata]
    replicates = bootstrap(statistic, *units, n_bootstrap=n_bootstrap, seed=seed)
    fewest = min(len(np.unique(rows.units[rows.state == k])) for k in np.unique(rows.state))
    errors = standard_error(replicates, np.arange(fewest))
    neighbours = [_Pair.of(rows, f, *pair).judged(rows, error) for pair, error in zip(pairs, errors[len(f) :], strict=True)]
    reweighted = {int(k): _carriers(rows, f, int(k)) for k in np.flatnonzero(rows.n_k == 0)}
    found, few = replicates[:, : len(f)], f"the error rests on {fewest} independent units of a state and is itself uncertain"
    note = "; ".join(part for part in (few if fewest < FEW_UNITS else "", rows.note) if part)
    together = covariance(found, np.arange(fewest)) if np.isfinite(found).all() else np.full((len(f), len(f)), np.nan)
    carriers = min(*(min(pair.n_a, pair.n_b) for pair in neighbours), *reweighted.values(), math.inf)
    estimate = Estimate(name, f, errors[: len(f)], "kT", carriers, covariance=together, note=note)
    return MultistateFreeEnergies(
        estimate, _overlap_matrix(rows, f), tuple(sorted(neighbours, key=lambda pair: pair.overlap)), reweighted, found, fewest, note
    )


def halves(potentials: StatePotentials, *, n_bootstrap: int = 50, seed: int) -> tuple[MultistateFreeEnergies, MultistateFreeEnergies]:
    """The free energies of the first and of the second half of every chain, which agree where the samples have converged.

    Raises:
        NoOverlapError: If half of the samples do not tie the states together.
        TrainingDataError, InexactDensityError: If no exact number may rest on the potentials.
    """
    first, second = (multistate_free_energies(half, n_bootstrap=n_bootstrap, seed=seed) for half in potentials.halves())
    return first, second


def multistate_verdict(
    found: MultistateFreeEnergies,
    *,
    drift: tuple[MultistateFreeEnergies, MultistateFreeEnergies] | None = None,
    warnings: Sequence[str] = (),
) -> Verdict:
    """Judge free energies of several states by the weakest link between them.

    ``low overlap`` where two neighbours overlap by less than 0.05; ``not converged`` with fewer than 50 independent units of a state
    behind a link, energies of neighbours that contradict each other or halves of the data that differ by more than three errors, or a
    warning; ``reliable`` otherwise. Modes that no sample visits cannot be seen by any of this.

    Args:
        found: The free energies.
        drift: Those of both halves of the data.
        warnings: Reasons for doubt from elsewhere.

    Returns:
        The verdict with its reasons.
    """
    doubts = [*warnings, *_link_doubts(found)]
    if not np.isfinite(np.asarray(found.estimate.stderr)).all():
        doubts.append("an error is unbounded: sample longer")
    if drift is not None:
        change = drift[1].f - drift[0].f
        error = np.hypot(np.asarray(drift[0].estimate.stderr), np.asarray(drift[1].estimate.stderr))
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.abs(change) <= MAX_SIGMA * error + ROUNDING) | ~np.isfinite(error))
        if len(bad):
            k = int(bad[0])
            doubts.append(
                f"the halves of the data give {drift[0].f[k]:.4g} and {drift[1].f[k]:.4g} kT for state {k}, with an error of "
                f"{error[k]:.2g}: sample longer"
            )
    weakest = found.neighbours[0]
    if not found.overlap >= MIN_OVERLAP:
        overlap = f"states {weakest.a} and {weakest.b} overlap by {found.overlap:.2g} only, {MIN_OVERLAP} are needed"
        return Verdict("low overlap", (f"{overlap}: a better map, or states in between", *doubts))
    if doubts:
        return Verdict("not converged", tuple(doubts))
    return Verdict("reliable", (f"smallest overlap {found.overlap:.2g}; {found.carriers:.0f} independent units carry the weakest link",))


def _link_doubts(found: MultistateFreeEnergies) -> list[str]:
    doubts = []
    fewest = min(found.neighbours, key=lambda pair: min(pair.n_a, pair.n_b))
    if not min(fewest.n_a, fewest.n_b) >= MIN_CARRIERS:
        doubts.append(
            f"{fewest.n_a:.0f} independent units of state {fewest.a} and {fewest.n_b:.0f} of state {fewest.b} tie them together, "
            f"{MIN_CARRIERS:.0f} of each are needed: sample longer"
        )
    for pair in found.neighbours:
        mismatch, error = float(pair.mismatch.value), float(pair.mismatch.stderr)
        if not (math.isfinite(error) and abs(mismatch) <= MAX_SIGMA * error + ROUNDING):
            doubts.append(
                f"samples of states {pair.a} and {pair.b} contradict each other (two estimates of their overlap differ by "
                f"{100 * mismatch:.0f} +- {100 * error:.0f} %): check the units and temperatures of their energies, or sample longer"
            )
    doubts += [
        f"{n:.0f} independent units carry state {k}, which has no samples; {MIN_CARRIERS:.0f} are needed: sample longer, or sample it"
        for k, n in found.reweighted.items()
        if not n >= MIN_CARRIERS
    ]
    return doubts


@dataclass(frozen=True)
class _Pair:
    """Rows of two states, and ln p of each being one of the other state, given that it is in the union of both."""

    a: int
    b: int
    of_a: np.ndarray
    of_b: np.ndarray
    log_a: np.ndarray
    log_b: np.ndarray

    @classmethod
    def of(cls, rows: StatePotentials, f: np.ndarray, a: int, b: int, *, counts: np.ndarray | None = None) -> _Pair:
        of_a, of_b = (np.flatnonzero(rows.state == k) for k in (a, b))
        n_a, n_b = (len(some) if counts is None else counts[some].sum() for some in (of_a, of_b))
        towards_b = f[b] - f[a] + math.log(n_b / n_a)
        u = rows.u
        return cls(
            a, b, of_a, of_b, log_expit(towards_b + u[a, of_a] - u[b, of_a]), log_expit(-towards_b + u[b, of_b] - u[a, of_b])
        )  # fmt: skip

    def overlap(self) -> float:
        """1 − λ₂ = (1/n_a + 1/n_b) Σ p_a p_b."""
        both = float(sum((np.exp(log) * -np.expm1(log)).sum() for log in (self.log_a, self.log_b)))
        return both * (1 / len(self.of_a) + 1 / len(self.of_b))

    def mismatch(self, counts: np.ndarray) -> float:
        """1 − Σ p_a p_b / ½(Σ_a p_b + Σ_b p_a), whose sums have the same expectation."""
        if not (np.isfinite(self.log_a).any() and np.isfinite(self.log_b).any()):
            return math.nan
        scale = max(float(self.log_a.max()), float(self.log_b.max()))
        first = second = 0.0
        for rows, log in ((self.of_a, self.log_a), (self.of_b, self.log_b)):
            p = np.exp(log - scale)
            first += 0.5 * float(counts[rows] @ p)
            second += float(counts[rows] @ (p * -np.expm1(log)))
        return 1.0 - second / first if first else math.nan

    def judged(self, rows: StatePotentials, error: float) -> Neighbours:
        n_a, n_b = (
            effective_units(np.exp(log - log.max()), np.unique(rows.units[some], return_inverse=True)[1].reshape(-1))
            for some, log in ((self.of_a, self.log_a), (self.of_b, self.log_b))
        )
        value = self.mismatch(np.ones(len(rows)))
        return Neighbours(self.a, self.b, self.overlap(), n_a, n_b, Estimate("mismatch", value, float(error), "", min(n_a, n_b)))


def _spanning_tree(rows: StatePotentials, f: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of states with samples that tie all of them together with the largest overlaps (Prim)."""
    sampled = np.unique(rows.state).tolist()
    overlaps = {(a, b): _Pair.of(rows, f, a, b).overlap() for a in sampled for b in sampled if a < b}
    inside, found = {sampled[0]}, []
    while len(inside) < len(sampled):
        pair = max((pair for pair in overlaps if (pair[0] in inside) != (pair[1] in inside)), key=overlaps.__getitem__)
        found.append(pair)
        inside |= set(pair)
    return found


def _overlap_matrix(rows: StatePotentials, f: np.ndarray) -> np.ndarray:
    sampled = rows.n_k > 0
    u, n, f = rows.u[sampled], rows.n_k[sampled], f[sampled]
    p = np.exp((np.log(n) + f)[:, None] - u - log_mixture(u, n, f))
    return (p @ p.T) / n[:, None]


def _carriers(rows: StatePotentials, f: np.ndarray, k: int) -> float:
    """Effective number of independent units that carry a state without samples."""
    sampled = rows.n_k > 0
    log_w = -rows.u[k] - log_mixture(rows.u[sampled], rows.n_k[sampled], f[sampled])
    return effective_units(np.exp(log_w - log_w.max()), rows.units)
