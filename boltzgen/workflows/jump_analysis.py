"""Numbers of a run of jumping walkers, from production alone, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from boltzgen.config import JumpsConfig
from boltzgen.core import Estimate, WeightedSamples
from boltzgen.cvs import CollectiveVariables
from boltzgen.estimators.chain_convergence import MIN_DRAWS, split_r_hat
from boltzgen.estimators.path_works import unrolled
from boltzgen.estimators.reweighting import free_energy_difference, mean
from boltzgen.estimators.timeseries import time_blocks
from boltzgen.estimators.verdict import Verdict
from boltzgen.paths import Periods
from boltzgen.workflows.analysis import with_caution
from boltzgen.workflows.coordinates import Ranges, inside
from boltzgen.workflows.jump_records import JumpHistory

N_BOOTSTRAP = 200
#: What a reliable run has: accepted jumps, agreement of the walkers, round trips between basins.
MIN_ACCEPTANCE, MAX_R_HAT, MIN_ROUND_TRIPS = 0.01, 1.05, 10


@dataclass(frozen=True)
class JumpFindings:
    """What production says.

    Attributes:
        estimates: Free energies of basins, and the mean energy.
        diagnostics: Acceptance, round trips, agreement of the walkers.
        verdict: What may be concluded.
    """

    estimates: tuple[Estimate, ...]
    diagnostics: Mapping[str, Any]
    verdict: Verdict


@dataclass(frozen=True)
class Weighted:
    """Weighted samples with their variables ``[n, k]``."""

    samples: WeightedSamples
    xi: np.ndarray


def analyse_jumps(
    config: JumpsConfig, production: JumpHistory, adaptation: JumpHistory, *, variables: CollectiveVariables, regions: Mapping[str, Ranges]
) -> JumpFindings:
    """Estimate everything that the configuration asks for; adaptation enters no estimate.

    Args:
        config: Settings.
        production: Cycles with the flow frozen.
        adaptation: Cycles before; only their acceptance is told.
        variables: Coordinates.
        regions: Basin → coordinate → range.
    """
    first = config.production.n_discarded(len(production))
    walkers, recycled = (make(production, first, variables.periods) for make in (walker_samples, recycled_samples))
    estimates = _free_energies(config, walkers, recycled, variables=variables, regions=regions)
    estimates.append(
        mean(walkers.samples, walkers.samples.u, name="mean reduced potential", unit="kT", n_bootstrap=N_BOOTSTRAP, seed=config.seed)
    )
    labels = {name: membership(production.xi, ranges, variables) for name, ranges in regions.items()}
    r_hats = _r_hats(production, first, variables=variables, labels=labels)
    trips = {name: round_trips(inside_it[first:]) for name, inside_it in labels.items()}
    jumps = jump_acceptance(adaptation)
    diagnostics: dict[str, Any] = {
        "jump_acceptance": float(production.accepted[first:].mean()),
        "local_acceptance": float(np.nanmean(production.local_acceptance[first:])),
        "acceptance_by_round": [None if math.isnan(value) else value for value in jumps],
        "round_trips": trips,
        "fewest_round_trips": min(trips.values(), default=None),
        "r_hat": r_hats,
        "largest_r_hat": max((value for value in r_hats.values() if value is not None), default=None),
        "walkers": production.u.shape[1],
        "production_cycles": len(production) - first,
        "discarded_cycles": first,
    }
    verdict = _verdict(diagnostics, production, adaptation, first=first, variables=variables, regions=regions)
    return JumpFindings(tuple(with_caution(estimate) for estimate in estimates), diagnostics, verdict)


def walker_samples(production: JumpHistory, first: int, periods: Periods | None = None) -> Weighted:
    """Walkers after every cycle from ``first`` on, equally weighted."""
    xi, u = production.xi[first:], production.u[first:]
    chain, block = _units(xi, periods)
    samples = WeightedSamples.unweighted(
        torch.zeros(u.size, 0), torch.from_numpy(u.reshape(-1)), role="evaluate", block=block.reshape(-1), chain=chain.reshape(-1)
    )
    return Weighted(samples, xi.reshape(u.size, -1))


def recycled_samples(production: JumpHistory, first: int, periods: Periods | None = None) -> Weighted:
    """Both ends of every jump: the start with weight 1 − α, the proposal with weight α = min(1, e^ratio), whether it was accepted or not.

    The mean over the accept/reject step is taken exactly, so that a basin of low weight is seen in every proposal that goes there.

    References:
        Frenkel, PNAS 101, 17571 (2004).
    """
    log_alpha = torch.from_numpy(production.log_ratio[first:]).clamp(max=0.0)
    stays = torch.where(log_alpha > -1e-300, -torch.inf, torch.log(-torch.expm1(log_alpha)))
    u = torch.from_numpy(np.concatenate([production.u_between[first:], production.u_proposed[first:]]))
    xi = np.concatenate([production.xi_between[first:], production.xi_proposed[first:]])
    chain, block = (torch.cat([labels, labels]).reshape(-1) for labels in _units(production.xi_between[first:], periods))
    samples = WeightedSamples(
        x=torch.zeros(u.numel(), 0), u=u.reshape(-1), log_w=torch.cat([stays, log_alpha]).reshape(-1), log_q=None, block=block, chain=chain,
        role="evaluate",
    )  # fmt: skip
    return Weighted(samples, xi.reshape(u.numel(), -1))


def membership(xi: np.ndarray, ranges: Ranges, variables: CollectiveVariables) -> np.ndarray:
    """Whether walkers with these variables ``[c, w, k]`` are in a basin, bool ``[c, w]``."""
    return inside(ranges, xi.reshape(-1, xi.shape[2]), variables).numpy().reshape(xi.shape[:2])


def round_trips(inside_it: np.ndarray) -> int:
    """How often walkers, all together, left a basin and came back, or entered it and left ``[c, w]``: half the number of changes."""
    changes = (inside_it[1:] != inside_it[:-1]).sum(axis=0)
    return int((changes // 2).sum())


def jump_acceptance(history: JumpHistory) -> list[float]:
    """Share of accepted jumps in every round; NaN in rounds without jumps."""
    shares = []
    for number in range(int(history.round.max()) + 1):
        rows = (history.round == number) & np.isfinite(history.log_ratio).any(axis=1)
        shares.append(float(history.accepted[rows].mean()) if rows.any() else math.nan)
    return shares


def _units(xi: np.ndarray, periods: Periods | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Walker and independent stretch of every row ``[c, w]``, by the memory of the variables ``xi`` ``[c, w, k]``."""
    c, w, k = xi.shape
    values, walker = xi.reshape(c * w, k), np.tile(np.arange(w), c)
    block = time_blocks(walker, np.repeat(np.arange(c), w), unrolled(values, periods))
    return torch.from_numpy(walker).reshape(c, w), torch.from_numpy(block).reshape(c, w)


def _free_energies(
    config: JumpsConfig, walkers: Weighted, recycled: Weighted, *, variables: CollectiveVariables, regions: Mapping[str, Ranges]
) -> list[Estimate]:
    """Every basin against everything else, and every pair of basins; from both ends of all jumps, and from the walkers alone."""
    estimates = []
    for source, suffix in ((recycled, ""), (walkers, ", walkers alone")):
        rows = {name: inside(ranges, source.xi, variables) for name, ranges in regions.items()}
        pairs = [("rest", name, ~rows[name], rows[name]) for name in rows]
        names = list(rows)
        pairs += [(a, b, rows[a], rows[b]) for k, a in enumerate(names) for b in names[k + 1 :]]
        estimates += [
            free_energy_difference(
                source.samples, in_a, in_b, name=f"F({b}) - F({a}){suffix}", labels=("the rest" if a == "rest" else a, b),
                n_bootstrap=N_BOOTSTRAP, seed=config.seed,
            )
            for a, b, in_a, in_b in pairs
        ]  # fmt: skip
    return estimates


def _r_hats(
    production: JumpHistory, first: int, *, variables: CollectiveVariables, labels: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """Split R̂ of every variable (of cosine and sine of a periodic one, the larger) and of the energy."""
    if len(production) - first < MIN_DRAWS:
        return {}
    series = {"energy": [production.u[first:]]}
    for column, variable in enumerate(variables):
        values = production.xi[first:, :, column]
        series[variable.name] = [seen.reshape(values.shape) for seen in unrolled(values.reshape(-1, 1), (variable.period,)).T]
    found = {name: max(split_r_hat(values.T) for values in several) for name, several in series.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _verdict(
    diagnostics: Mapping[str, Any],
    production: JumpHistory,
    adaptation: JumpHistory,
    *,
    first: int,
    variables: CollectiveVariables,
    regions: Mapping[str, Ranges],
) -> Verdict:
    """``missing modes`` if a basin was never left, or never found again; ``low overlap`` if hardly a jump was accepted; ``not converged``
    if walkers disagree or round trips are few."""
    missing: list[str] = []
    for name, ranges in regions.items():
        whole = np.concatenate([membership(adaptation.xi, ranges, variables), membership(production.xi, ranges, variables)])
        for label, known in ((name, whole), (f"everything but {name}", ~whole)):
            missing += _basin_doubts(label, known, known[len(adaptation) + first :])
    acceptance, trips = diagnostics["jump_acceptance"], diagnostics["round_trips"]
    low = []
    if acceptance < MIN_ACCEPTANCE:
        low.append(
            f"only {100 * acceptance:.2g} % of the jumps are accepted: the flow hardly overlaps with the system; learn longer "
            "(learning.steps, adaptation.rounds)"
        )
    few = [
        f"only {n} round trips between {name} and the rest, {MIN_ROUND_TRIPS} are needed; run longer"
        for name, n in trips.items()
        if n < MIN_ROUND_TRIPS
    ]
    for name, value in diagnostics["r_hat"].items():
        if value is None or value > MAX_R_HAT:
            shown = "infinite" if value is None else f"{value:.2f}"
            few.append(f"the walkers disagree about {name} (R-hat = {shown}, {MAX_R_HAT} at most): run longer")
    reasons = (*missing, *low, *few)
    if reasons:
        return Verdict("missing modes" if missing else "low overlap" if low else "not converged", reasons)
    told = "".join(f", {n} round trips of {name}" for name, n in trips.items())
    return Verdict("reliable", (f"{100 * acceptance:.0f} % of the jumps are accepted{told}, and the walkers agree",))


def _basin_doubts(label: str, known: np.ndarray, now: np.ndarray) -> tuple[str, ...]:
    """What is wrong with a region, from where walkers were in it ``[c, w]``, ever and in production."""
    if not known.any():
        return (f"no walker ever was in {label}: start some there (walkers.files), or the region is empty",)
    if not now.any():
        return (f"{label} was visited before production and never in it: run longer, or its weight is too small",)
    if not (now[:-1] & ~now[1:]).any():
        return (f"no walker ever left {label} in production: its population is that of the starts",)
    return ()
