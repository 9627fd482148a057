"""Free energy differences of two sets from all paths between them, accepted or not.

One theorem stands behind both functions. Let F(γ) dγ be the stationary density of a tried path γ: x₀ and λ₀ from π̂, λ₁ from ρ, then the
path. The way back γ̃ has F(γ̃) = F(γ) e^{−w(γ)} with w = work + ln ρ(λ₁) − ln ρ(λ₀), and w(γ̃) = −w(γ).

**Basins of x.** Paths from A are drawn from F/Z_A. With Γ_AB the paths from A to B, whose ways back are Γ_BA, and any function g

    Z_A E_A[1_B(x_K) g(w)] = ∫_{Γ_AB} F(γ) g(w) dγ = Z_B E_B[1_A(x_K) e^{−w} g(−w)].

g(w) = min(1, e^{−w}) gives the flux estimator. For independent paths Bennett's g = 1/(1 + e^{M + w − ΔF}) has the smallest variance of all.
Works of paths that connect A and B obey p(−w | BA) = p(w | AB) e^{Δ − w} with Δ = −ln(Z_B/Z_A) + ln(p_AB/p_BA), where p_AB is the share of
all paths from A that end in B. As p_AB = n_AB/n_A, M = ln(n_AB/n_BA) − ln(p_AB/p_BA) is ln(n_A/n_B): the acceptance ratio of **all** paths
from A and from B, with w = +inf where they do not connect, is that of those which do minus ln(p_AB/p_BA), and its bootstrap holds the
noise of both shares.

**Sets of λ.** Paths with λ₀ ∈ A are drawn from F/Z_A with Z_A that of the blurred λ, ∫_A dλ ∫ dx e^{−u−r}. The share that is sent
to B is ρ_B = ∫_B ρ wherever they start: Δ = −ln(Z_B/Z_A) + ln(ρ_B/ρ_A).

Only ratios *within* A and *within* B enter, so that paths must start from equilibrium within each set; how often walkers are in A or
in B does not matter, and they need never cross.

References:
    Crooks, Phys. Rev. E 61, 2361 (2000); Shirts, Bair, Hooker and Pande, Phys. Rev. Lett. 91, 140601 (2003); Bennett, J. Comput. Phys.
    22, 245 (1976), eqs. 5 and 12; Minh and Chodera, J. Chem. Phys. 131, 134110 (2009); Schönle, Gabrié, Lelièvre and Stoltz,
    arXiv 2405.18160.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from boltzgen.core import Estimate
from boltzgen.errors import InputError
from boltzgen.estimators.bootstrap import bootstrap, effective_units, few_units_note, standard_error
from boltzgen.estimators.path_works import Membership, PathWorks
from boltzgen.estimators.perturbation import MIN_CARRIERS, AcceptanceRatio, Convergence, acceptance_ratio, agree, perturbation_verdict
from boltzgen.estimators.verdict import Verdict
from boltzgen.paths import Paths, Periods


@dataclass(frozen=True)
class PathFreeEnergy:
    """A free energy difference from paths there and back, with its check and what tells whether to trust it.

    Attributes:
        difference: −ln(Z_B/Z_A) in kT by Bennett's acceptance ratio; NaN where it is not known.
        flux: The same from min(1, e^{−w}), with the same bootstrap.
        disagreement: flux − difference, zero within its error.
        bennett: The acceptance ratio; its overlap is that of the works of paths that connect A and B. None where nothing is known.
        forward: w of paths from A that ended in B (were sent to B), in kT ``[n_AB]``.
        reverse: w of paths from B that ended in A ``[n_BA]``.
        crossing: Where the density of ``forward`` crosses that of −``reverse``, in kT: the difference plus ln(p_AB/p_BA).
        verdict: What a reader may conclude.
    """

    difference: Estimate
    flux: Estimate
    disagreement: Estimate
    bennett: AcceptanceRatio | None
    forward: np.ndarray
    reverse: np.ndarray
    crossing: float
    verdict: Verdict


def basin_free_energy(
    paths: Paths,
    in_a: Membership,
    in_b: Membership,
    *,
    periods: Periods | None = None,
    at_least: float = 1.0,
    name: str = "F_B - F_A",
    n_bootstrap: int = 200,
    seed: int,
) -> PathFreeEnergy:
    """ΔF = −ln(Z_B/Z_A) of two basins of x from paths that start in them.

    It needs equilibrium within A and within B, not between them.

    Args:
        paths: All tried paths of frozen production, rejected and failed ones included.
        in_a: Basin A, by values of ξ ``[n, k]``.
        in_b: Basin B, apart from A. The two need not fill space.
        periods: Period of every variable, None where it has none: for the memory of walkers.
        at_least: A statistical inefficiency in moves that paths and variables may not show.
        name: Name of the estimate.
        n_bootstrap: Bootstrap replicates over independent units: stretches of a walker, five times as long as the memory of how its paths
            are accepted and of its variables within a basin.
        seed: Seed of the bootstrap.

    Returns:
        ΔF with its error. Not known (NaN, error +inf) where no path of a direction connects the basins, or a basin holds one unit.

    Raises:
        InputError: If the basins overlap.
        ShapeError: If a membership is not one bool for each row.
        EnergyError: If a work is not a number, or −inf.

    References:
        See the top of this file.
    """
    works = PathWorks.of_basins(paths, in_a, in_b, periods=periods, at_least=at_least)
    return _free_energy(works, 0.0, name=name, n_bootstrap=n_bootstrap, seed=seed)


def centre_free_energy(
    paths: Paths,
    in_a: Membership,
    in_b: Membership,
    *,
    masses: tuple[float, float] | None = None,
    periods: Periods | None = None,
    at_least: float = 1.0,
    name: str = "F_B - F_A of centres",
    n_bootstrap: int = 200,
    seed: int,
) -> PathFreeEnergy:
    """ΔF = −ln(Z_B/Z_A) of two sets of the blurred variable λ ~ exp(−r(ξ(x), λ)), from paths that start at λ₀ in one and go to the other.

    It needs equilibrium within each set of λ, which is not that within basins of x where both differ.

    Args:
        paths: All tried paths of frozen production, rejected and failed ones included.
        in_a: Set A, by values of λ ``[n, k]``.
        in_b: Set B, apart from A.
        masses: (∫_A ρ, ∫_B ρ) of the proposal; an error of theirs is not in that of the result. None: counted from the paths themselves.
        periods: As in :func:`basin_free_energy`.
        at_least: Likewise.
        name: Name of the estimate.
        n_bootstrap: Bootstrap replicates over independent units.
        seed: Seed of the bootstrap.

    Returns:
        ΔF with its error; not known as in :func:`basin_free_energy`.

    Raises:
        InputError: If the sets overlap, or a mass is not above 0 and at most 1.
        ShapeError, EnergyError: As :func:`basin_free_energy`.
    """
    if masses is not None and not all(0 < mass <= 1 for mass in masses):
        raise InputError(f"expected the shares of the proposal in A and in B, above 0 and at most 1, got {masses}")
    works = PathWorks.of_centres(paths, in_a, in_b, sent_only=masses is not None, periods=periods, at_least=at_least)
    log_shares = 0.0 if masses is None else math.log(masses[1] / masses[0])
    return _free_energy(works, log_shares, name=name, n_bootstrap=n_bootstrap, seed=seed)


def path_convergence(
    paths: Paths, in_a: Membership, in_b: Membership, *, n_shares: int = 10, n_bootstrap: int = 50, seed: int
) -> Convergence:
    """How ΔF of two basins settles with the number of moves, counted from the start and from the end.

    Args:
        paths: As in :func:`basin_free_energy`.
        in_a: Basin A.
        in_b: Basin B.
        n_shares: Number of shares, even.
        n_bootstrap: Bootstrap replicates of each.
        seed: Seed of the bootstrap.

    Returns:
        Two curves that meet at the full data; NaN with error +inf where a share does not know the difference.

    Raises:
        InputError: If the number of shares is odd or larger than that of moves of a walker.
        ShapeError, EnergyError: As :func:`basin_free_energy`.
    """
    works = PathWorks.of_basins(paths, in_a, in_b)
    if n_shares < 2 or n_shares % 2 or n_shares > len(np.unique(works.time)):
        raise InputError(f"expected an even number of shares, at most one for each of {len(np.unique(works.time))} moves, got {n_shares}")
    return _convergence(works, 0.0, n_shares=n_shares, n_bootstrap=n_bootstrap, seed=seed)


def _free_energy(works: PathWorks, log_shares: float, *, name: str, n_bootstrap: int, seed: int) -> PathFreeEnergy:
    forward, reverse = works.connecting
    if works.unknown:
        nothing = Estimate(name=name, value=math.nan, stderr=math.inf, unit="kT", n_effective=0.0, note=works.unknown)
        flux, disagreement = (replace(nothing, name=f"{name}, {what}") for what in ("flux", "flux - acceptance ratio"))
        return PathFreeEnergy(
            nothing, flux, disagreement, None, forward, reverse, math.nan, Verdict("low overlap", (works.unknown + "; longer paths",))
        )
    found, units = _bennett(works, log_shares, name=name, n_bootstrap=n_bootstrap, seed=seed)
    flux, disagreement = _flux(works, found, units, log_shares, n_bootstrap=n_bootstrap, seed=seed)
    doubts = []
    if not agree(float(disagreement.value), 0.0, float(disagreement.stderr)):
        doubts.append(
            f"paths weighted by min(1, e^-w) give {float(flux.value):.4g} kT, {float(disagreement.value):+.2g} +- "
            f"{float(disagreement.stderr):.2g} from the acceptance ratio: the works are not those of these paths, or walkers are not in "
            "equilibrium within A and B"
        )
    drift = None
    if len(np.unique(works.time)) > 1:
        drift = _convergence(works, log_shares, n_shares=2, n_bootstrap=max(20, n_bootstrap // 2), seed=seed)
    verdict = perturbation_verdict(found, drift=drift, warnings=doubts, advice="longer paths, a softer restraint, or other variables")
    n_a, n_b = (len(rows) for rows in works.rows)
    crossing = float(found.difference.value) + log_shares + math.log(len(forward) / n_a * n_b / len(reverse))
    return PathFreeEnergy(found.difference, flux, disagreement, found, forward, reverse, crossing, verdict)


def _bennett(works: PathWorks, log_shares: float, *, name: str, n_bootstrap: int, seed: int) -> tuple[AcceptanceRatio, np.ndarray]:
    """The acceptance ratio of all paths, with the overlap of those that connect, and the units that both directions share."""
    forward, reverse, units = works.works()
    found = acceptance_ratio(forward, reverse, name=name, shared_units=units, n_bootstrap=n_bootstrap, seed=seed)
    n_ab, n_ba = (len(connecting) for connecting in works.connecting)
    overlap = found.overlap * (1 / n_ab + 1 / n_ba) / (1 / len(forward) + 1 / len(reverse))
    carriers = found.difference.n_effective
    few = "" if carriers >= MIN_CARRIERS else f"about {carriers:.0f} independent paths carry the number: its error bar is too small"
    note = "; ".join(part for part in (few, few_units_note(units)) if part)
    moved = replace(found.difference, value=float(found.difference.value) - log_shares, note=note)
    return replace(found, difference=moved, overlap=overlap, replicates=found.replicates - log_shares), units


def _flux(
    works: PathWorks, found: AcceptanceRatio, units: np.ndarray, log_shares: float, *, n_bootstrap: int, seed: int
) -> tuple[Estimate, Estimate]:
    """−ln(Z_B/Z_A) = ln E_B[1_A α] − ln E_A[1_B α] − ln(ρ_B/ρ_A), and its difference from Bennett's, replicate by replicate."""
    n_a = len(works.rows[0])
    accepted = np.concatenate([np.exp(-works.w[rows].clip(min=0.0)) for rows in works.rows])

    def difference(counts: np.ndarray) -> float:
        of_a, of_b = slice(None, n_a), slice(n_a, None)
        forward, reverse = (counts[rows] @ accepted[rows] / counts[rows].sum() for rows in (of_a, of_b))
        return float(np.log(reverse) - np.log(forward)) - log_shares

    with np.errstate(divide="ignore", invalid="ignore"):
        value = difference(np.ones(len(accepted)))
    replicates = bootstrap(difference, units, n_bootstrap=n_bootstrap, seed=seed)
    gap, carriers = (
        value - float(found.difference.value),
        [effective_units(accepted[:n_a], units[:n_a]), effective_units(accepted[n_a:], units[n_a:])],
    )
    like = replace(found.difference, n_effective=min(carriers), note="")
    with np.errstate(invalid="ignore"):
        apart = replicates - found.replicates
    return (
        replace(like, name=f"{like.name}, flux", value=value, stderr=float(standard_error(replicates, units))),
        replace(like, name=f"{like.name}, flux - acceptance ratio", value=gap, stderr=float(standard_error(apart, units))),
    )


def _convergence(works: PathWorks, log_shares: float, *, n_shares: int, n_bootstrap: int, seed: int) -> Convergence:
    shares = np.arange(1, n_shares + 1) / n_shares
    values, errors = np.full((2, n_shares), math.nan), np.full((2, n_shares), math.inf)
    for row, from_end in enumerate((False, True)):
        for column, share in enumerate(shares):
            part = works.share(share, from_end=from_end)
            if not part.unknown:
                found = _bennett(part, log_shares, name="", n_bootstrap=n_bootstrap, seed=seed)[0].difference
                values[row, column], errors[row, column] = float(found.value), float(found.stderr)
    return Convergence(shares, *values, *errors)
