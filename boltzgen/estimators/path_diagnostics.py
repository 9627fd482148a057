"""How well steered paths mix: acceptance and its exact identity, crossings, convergence of walkers, cost, and what to worry about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from boltzgen.core import Estimate, WeightedSamples
from boltzgen.errors import InputError
from boltzgen.estimators.chain_convergence import MIN_DRAWS, chain_effective_sample_size, split_r_hat
from boltzgen.estimators.path_averages import acceptance_probability
from boltzgen.estimators.path_works import Membership, sets_of, unrolled
from boltzgen.estimators.reweighting import mean
from boltzgen.estimators.timeseries import rows_by_chain, statistical_inefficiency, time_blocks
from boltzgen.paths import Paths, Periods

#: R̂ from which walkers do not agree, and effective draws below which their agreement says little (as other estimates ask for).
MAX_R_HAT, MIN_CHAIN_ESS = 1.05, 100.0
#: Share of proposals below which a set is hardly proposed, and of paths from which failures are too many.
MIN_PROPOSED, MAX_FAILED = 0.01, 0.01
#: Work in kT that no path does whose time step and restraint fit: it blew up, even if its numbers are still numbers.
MAX_WORK = 1e4
#: Standard errors that the acceptance may be from 2 P(w < 0).
MAX_IDENTITY_SIGMA = 4.0


@dataclass(frozen=True)
class PathDiagnostics:
    """What a table of paths says about how walkers mix.

    Attributes:
        acceptance: Mean of min(1, e^{−w}).
        identity: Acceptance − 2 P(w < 0) − P(w = 0), zero at stationarity.
        walkers: Numbers of the walkers ``[m]``.
        crossings: How often every walker went from one set to the other ``[m]``, by paths or between them.
        round_trips: There and back ``[m]``: pairs of crossings.
        accepted_crossings: Accepted paths from one set to the other.
        proposed: Shares of λ₁ in A and in B.
        n_failed: Paths that failed.
        n_blown_up: Paths that failed, or did more than 10⁴ kT of work.
        force_evaluations: Force evaluations of paths that were ``accepted``, ``rejected`` and ``failed``.
        inefficiency: Moves worth one independent move, by walker and variable ``[m, k]``; the number of its moves where it never changed.
        r_hat: Rank-normalised split R̂ of every variable ``[k]``; NaN where walkers made fewer than four moves.
        ess: Effective draws of every variable over all walkers ``[k]``.
        warnings: Sentences in plain words.
    """

    acceptance: Estimate
    identity: Estimate
    walkers: np.ndarray
    crossings: np.ndarray
    round_trips: np.ndarray
    accepted_crossings: int
    proposed: tuple[float, float]
    n_failed: int
    n_blown_up: int
    force_evaluations: dict[str, int]
    inefficiency: np.ndarray
    r_hat: np.ndarray
    ess: np.ndarray
    warnings: tuple[str, ...]


def path_diagnostics(
    paths: Paths,
    in_a: Membership,
    in_b: Membership,
    *,
    periods: Periods | None = None,
    names: tuple[str, str] = ("A", "B"),
    variables: Sequence[str] | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> PathDiagnostics:
    """Diagnostics of all tried paths of frozen production.

    At stationarity E[min(1, e^{−w})] = 2 P(w < 0) + P(w = 0): ways back of paths with w > 0 are those with w < 0, e^{−w} times as
    likely. Paths within a basin obey it by themselves: it finds wrong works and walkers out of equilibrium within basins, but hardly
    wrong populations of basins, which crossings and R̂ show.

    Args:
        paths: All tried paths.
        in_a: A set by values of ξ ``[n, k]``; that of λ is the same function.
        in_b: Another set, apart from A.
        periods: Period of every variable, None where it has none; R̂, ESS and memory are then the worse of cosine and sine.
        names: What warnings call the two sets.
        variables: What they call the variables; by number where not given.
        n_bootstrap: Bootstrap replicates over stretches of walkers.
        seed: Seed of the bootstrap.

    Returns:
        Numbers and warnings.

    Raises:
        InputError: If there are no paths, or the sets overlap.
        ShapeError: If a membership is not one bool for each row, or periods are missing.
    """
    if len(paths) == 0:
        raise InputError("expected paths to judge, got none")
    alpha = acceptance_probability(paths)
    gap = alpha - 2.0 * (paths.w < 0) - (paths.w == 0)
    both = np.column_stack([alpha, gap])
    acceptance, identity = (
        mean_over_paths(paths, values, name=name, together=both, periods=periods, n_bootstrap=n_bootstrap, seed=seed)
        for name, values in zip(("acceptance", "acceptance - 2 P(w < 0)"), both.T, strict=True)
    )
    starts, ends = sets_of(paths.xi_start, in_a, in_b), sets_of(paths.xi_end, in_a, in_b)
    walkers = np.unique(paths.walker)
    rows = rows_by_chain(paths.walker, paths.time)
    crossings = np.array([_crossings(paths, one, starts, ends) for one in rows])
    inefficiency, r_hat, ess = _chains(paths, rows, periods)
    sent = sets_of(paths.end, in_a, in_b)
    crossed = paths.accepted & ((starts[0] & ends[1]) | (starts[1] & ends[0]))
    found = PathDiagnostics(
        acceptance, identity, walkers, crossings, crossings // 2, int(crossed.sum()), (float(sent[0].mean()), float(sent[1].mean())),
        int(paths.failed.sum()), int((paths.failed | (paths.work > MAX_WORK)).sum()), _cost(paths), inefficiency, r_hat, ess, (),
    )  # fmt: skip
    return PathDiagnostics(**{**vars(found), "warnings": _warnings(found, len(paths), names, variables or range(len(r_hat)))})


def mean_over_paths(
    paths: Paths, values: np.ndarray, *, name: str, together: np.ndarray | None = None, periods: Periods | None, n_bootstrap: int, seed: int
) -> Estimate:
    """The mean of a value of every path ``[n]``, with the error of stretches of walkers as long as their memory.

    Args:
        paths: The paths.
        values: ``[n]``.
        name: Name of the estimate.
        together: More values ``[n, m]`` whose memory counts.
        periods: Period of every variable.
        n_bootstrap: Bootstrap replicates.
        seed: Seed of the bootstrap.

    Returns:
        The mean; its error is +inf where all paths form one stretch.
    """
    remembered = [values[:, None], unrolled(paths.xi_start, periods), *([] if together is None else [together])]
    units = time_blocks(paths.walker, paths.time, np.concatenate(remembered, axis=1))
    if units.max() == 0:
        note = "all paths form one independent unit, of which no error can be known"
        return Estimate(name, float(values.mean()), math.inf, "", 1.0, note=note)
    u = torch.full((len(paths),), torch.nan, dtype=torch.float64)
    samples = WeightedSamples.unweighted(u[:, None], u, role="evaluate", block=torch.from_numpy(units))
    return mean(samples, values, name=name, n_bootstrap=n_bootstrap, seed=seed)


def _crossings(paths: Paths, rows: np.ndarray, starts: tuple[np.ndarray, np.ndarray], ends: tuple[np.ndarray, np.ndarray]) -> int:
    """Changes of the set that one walker was last in, its last path included."""
    final = ends if paths.accepted[rows[-1]] else starts
    last = [bool(inside[rows[-1]]) for inside in final]
    in_a, in_b = (np.append(inside[rows], here) for inside, here in zip(starts, last, strict=True))
    return int(np.count_nonzero(np.diff(in_b[in_a | in_b].astype(np.int64))))


def _chains(paths: Paths, rows: list[np.ndarray], periods: Periods | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memory ``[m, k]``, R̂ ``[k]`` and ESS ``[k]`` of every variable; walkers count from the end where they differ in length."""
    k, n = paths.xi_start.shape[1], min(len(one) for one in rows)
    inefficiency, r_hat, ess = np.ones((len(rows), k)), np.full(k, math.nan), np.full(k, math.nan)
    for j in range(k):
        columns = unrolled(paths.xi_start[:, j : j + 1], None if periods is None else periods[j : j + 1])
        inefficiency[:, j] = [max(statistical_inefficiency(column[one]) for column in columns.T) for one in rows]
        if n >= MIN_DRAWS:
            chains = [np.stack([column[one[-n:]] for one in rows]) for column in columns.T]
            r_hat[j], ess[j] = max(split_r_hat(one) for one in chains), min(chain_effective_sample_size(one) for one in chains)
    return inefficiency, r_hat, ess


def _cost(paths: Paths) -> dict[str, int]:
    parts = {"accepted": paths.accepted, "rejected": ~paths.accepted & ~paths.failed, "failed": paths.failed}
    return {name: int(paths.n_force[chosen].sum()) for name, chosen in parts.items()}


def hardly_proposed(name: str, share: float) -> str:
    """The warning of a set to which a proposal sends too few paths."""
    return (
        f"the proposal sends {100 * share:.2g} % of paths to basin {name}: it covers one basin only; train it on walkers in both, or mix "
        "in a broad density"
    )


def _warnings(found: PathDiagnostics, n_paths: int, names: tuple[str, str], variables: Sequence[str | int]) -> tuple[str, ...]:
    doubts = []
    if not found.crossings.any():
        doubts.append(
            "no walker went from one basin to the other: averages over both are unknown; the difference between them may be known, from "
            "rejected paths"
        )
    doubts += [hardly_proposed(name, share) for name, share in zip(names, found.proposed, strict=True) if share < MIN_PROPOSED]
    if found.n_blown_up > MAX_FAILED * n_paths:
        doubts.append(
            f"{found.n_blown_up} of {n_paths} paths failed or did more than {MAX_WORK:.0e} kT of work: take a smaller time step or a "
            "softer restraint"
        )
    if float(np.abs(found.identity.value)) > MAX_IDENTITY_SIGMA * float(found.identity.stderr):
        doubts.append(
            f"acceptance and 2 P(w < 0) differ by {found.identity.value:.2g} +- {found.identity.stderr:.2g}: walkers are not in "
            "equilibrium, or the works are wrong"
        )
    for j, r_hat, ess in zip(variables, found.r_hat, found.ess, strict=True):
        if not r_hat <= MAX_R_HAT:
            doubts.append(f"walkers do not agree on variable {j}: R-hat {r_hat:.3g}, at most {MAX_R_HAT} is wanted; sample longer")
        if not ess >= MIN_CHAIN_ESS:
            doubts.append(f"walkers are worth {ess:.3g} independent draws of variable {j}, {MIN_CHAIN_ESS:.0f} are wanted; sample longer")
    return tuple(doubts)
