"""What the frozen production of steered paths says: free energies of basins, profiles, averages, how well walkers mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from boltzgen.config import PathsConfig
from boltzgen.core import Estimate
from boltzgen.estimators.chain_convergence import chain_effective_sample_size, split_r_hat
from boltzgen.estimators.path_averages import acceptance_probability, path_profile, recycled_average
from boltzgen.estimators.path_diagnostics import (
    MIN_CHAIN_ESS,
    MIN_PROPOSED,
    PathDiagnostics,
    hardly_proposed,
    mean_over_paths,
    path_diagnostics,
)
from boltzgen.estimators.path_free_energy import PathFreeEnergy, basin_free_energy
from boltzgen.estimators.path_works import unrolled
from boltzgen.estimators.profiles import Profile
from boltzgen.estimators.profiles_along import profile_along_paths
from boltzgen.estimators.verdict import Verdict, Word
from boltzgen.paths import Paths, Restraint
from boltzgen.workflows.path_basins import memberships, sent_between
from boltzgen.workflows.path_records import History, Recorder

_BINS, _BOOTSTRAP = 40, 200
_MEANING = "free energies are -ln of the probability of a basin of configurations, at fixed volume"
_WASTE = "averages and profiles need walkers that go between the basins; free energies between basins need equilibrium within each only"
_ALONG = "averages need walkers that go between the basins; the profile and free energies between basins need equilibrium within each only"
_STOPPED = (
    "production ended after {n} of {most} cycles, with {trips} or more round trips and R-hat below {r_hat:g}: a rule that looks at data "
    "leaves a bias of the order of the squared error, which no error bar holds"
)
_TIME_STEP = "local moves are plain MD and not tested: results have the error of its time step; take local.kind: metropolised to be exact"

#: Verdicts, the gravest first.
_GRAVITY: tuple[Word, ...] = ("not exact", "missing modes", "low overlap", "not converged", "reliable")


@dataclass(frozen=True)
class PathAnalysis:
    """Everything that is reported of a run.

    Attributes:
        estimates: Numbers with errors.
        diagnostics: Named numbers.
        verdict: What a reader may conclude.
        evaluations: Force evaluations by purpose.
        works: Pair of basins → arrays ``forward reverse difference``, for the histogram of works.
        notes: What a reader must know.
    """

    estimates: tuple[Estimate, ...]
    diagnostics: Mapping[str, Any]
    verdict: Verdict
    evaluations: Mapping[str, int]
    works: Mapping[str, PathFreeEnergy]
    notes: tuple[str, ...]


def analyse_paths(config: PathsConfig, production: History, adaptation: History | None, *, restraint: Restraint) -> PathAnalysis:
    """Estimates, diagnostics and verdict from the cycles of a run; nothing of adaptation, and of what is discarded, enters one.

    Args:
        config: What was done.
        production: The frozen production.
        adaptation: What came before, None where nothing did.
        restraint: r of the paths.
    """
    kept = production.kept(config.production)
    paths, periods = kept.paths, config.periods
    seed, regions = config.seed, memberships(config)
    found = {
        f"{a} to {b}": basin_free_energy(paths, regions[a], regions[b], periods=periods, name=f"F({b}) - F({a})", seed=seed)
        for a, b in combinations(config.basins, 2)
    }  # fmt: skip
    first, second = list(regions)[:2]
    mixing = path_diagnostics(
        paths, regions[first], regions[second], periods=periods, names=(first, second), variables=config.names, n_bootstrap=_BOOTSTRAP,
        seed=seed,
    )  # fmt: skip
    proposed = {name: float(inside(paths.end).mean()) for name, inside in regions.items()}
    along = len(kept.looks) > 0 and all(np.isfinite(float(one.difference.value)) for one in found.values())
    profiles = {config.names[0]: _profile_along(config, kept, restraint)} if along else {
        name: _profile(config, paths, j, periods, seed=seed) for j, name in enumerate(config.names)
    }  # fmt: skip
    means = [
        recycled_average(paths, paths.xi_start[:, j], paths.xi_end[:, j], name=f"mean {name}", unit=_unit(config, name), periods=periods,
                         n_bootstrap=_BOOTSTRAP, seed=seed)
        for j, name in enumerate(config.names) if periods[j] is None and mixing.inefficiency.size
    ]  # fmt: skip
    estimates = [one.difference for one in found.values()] + [one.flux for one in found.values()] + [mixing.acceptance, *means]
    return PathAnalysis(
        estimates=tuple(estimates),
        diagnostics={
            **_diagnostics(config, kept, mixing, profiles, proposed, found),
            "production_cycles": len(kept),
            "discarded_cycles": len(production) - len(kept),
        },
        verdict=_verdict(config, found, mixing, proposed),
        evaluations=_evaluations(production, kept, adaptation),
        works=found,
        notes=(
            _MEANING,
            _ALONG if along else _WASTE,
            *((_TIME_STEP,) if _has_time_step_error(config) else ()),
            *_stopped_early(config, len(production)),
        ),
    )


def enough(config: PathsConfig, recorder: Recorder) -> bool:
    """Whether production may stop before its last cycle: round trips, agreement of the walkers and effective draws say so."""
    history = recorder.history("production").kept(config.production)
    a, b = list(memberships(config).values())[:2]
    seen = np.concatenate([history.xi_between, history.xi[-1:]])  # as paths start, and where the last ones ended
    trips = sum(_round_trips(a(seen[:, w]), b(seen[:, w])) for w in range(seen.shape[1]))
    if trips < config.production.round_trips or len(history) < 8:
        return False
    rolled = unrolled(history.xi_between.reshape(-1, history.xi_between.shape[2]), config.periods)
    columns = [column.reshape(history.xi_between.shape[:2]).T for column in rolled.T]
    return all(split_r_hat(one) < config.production.r_hat and chain_effective_sample_size(one) >= MIN_CHAIN_ESS for one in columns)


def _round_trips(in_a: np.ndarray, in_b: np.ndarray) -> int:
    visits = in_b[in_a | in_b].astype(np.int64)
    return int(np.count_nonzero(np.diff(visits))) // 2


def _profile(config: PathsConfig, paths: Paths, j: int, periods: tuple[float | None, ...], *, seed: int) -> Profile:
    edges = np.linspace(*config.limits[j], _BINS + 1)
    return path_profile(paths, edges, variable=j, periods=periods, name=config.names[j], n_bootstrap=_BOOTSTRAP, seed=seed)


def _profile_along(config: PathsConfig, production: History, restraint: Restraint) -> Profile:
    return profile_along_paths(
        production.paths, production.looks, restraint, list(memberships(config).values()), edges=np.linspace(*config.limits[0], _BINS + 1),
        visited=production.visited[:, :, 0], name=config.names[0], n_bootstrap=_BOOTSTRAP, seed=config.seed,
    )  # fmt: skip


def _unit(config: PathsConfig, name: str) -> str:
    return {"nanometer": "nm", "radian": "rad", "dimensionless": "1"}[config.collective_variables[name].unit]


def _acceptance_between(config: PathsConfig, paths: Paths) -> Estimate | None:
    """Mean acceptance of paths that are sent to another basin; None where none is."""
    across = paths.rows(np.flatnonzero(sent_between(paths, config)))
    if not len(across):
        return None
    return mean_over_paths(
        across, acceptance_probability(across), name="acceptance between basins", periods=config.periods, n_bootstrap=_BOOTSTRAP,
        seed=config.seed,
    )  # fmt: skip


def _diagnostics(
    config: PathsConfig,
    production: History,
    mixing: PathDiagnostics,
    profiles: Mapping[str, Profile],
    proposed: Mapping[str, float],
    found: Mapping[str, PathFreeEnergy],
) -> dict[str, Any]:
    paths = production.paths
    sent = _acceptance_between(config, paths)
    return {
        "acceptance": mixing.acceptance.value, "acceptance_stderr": mixing.acceptance.stderr,
        "acceptance_between_basins": None if sent is None else sent.value,
        "acceptance_between_basins_stderr": None if sent is None else sent.stderr,
        "local_acceptance": float(np.nanmean(production.local_acceptance)) if np.isfinite(production.local_acceptance).any() else None,
        "identity": mixing.identity.value, "identity_stderr": mixing.identity.stderr,
        "identity_z": float(mixing.identity.value / mixing.identity.stderr) if mixing.identity.stderr else None,
        "accepted_crossings": mixing.accepted_crossings,
        "crossings_per_million": 1e6 * mixing.accepted_crossings / _n_force(production),
        "round_trips": int(mixing.round_trips.sum()), "round_trips_by_walker": mixing.round_trips,
        "proposed": proposed,
        "r_hat": dict(zip(config.names, mixing.r_hat, strict=True)), "ess_cv": dict(zip(config.names, mixing.ess, strict=True)),
        "n_paths": len(paths), "blown_up_paths": mixing.n_blown_up,
        "overlap": {pair: None if one.bennett is None else one.bennett.overlap for pair, one in found.items()},
        "profiles": {
            name: {"edges": p.edges[0], "centers": p.centers[0], "free_energy": p.free_energy, "stderr": p.stderr,
                   "stderr_normalised": p.stderr_normalised, "unit": _unit(config, name)} for name, p in profiles.items()
        },
    }  # fmt: skip


def _has_time_step_error(config: PathsConfig) -> bool:
    return config.local.kind == "langevin" and config.local.per_cycle > 0


def _stopped_early(config: PathsConfig, n_done: int) -> tuple[str, ...]:
    p = config.production
    if n_done >= p.cycles:
        return ()
    return (_STOPPED.format(n=n_done, most=p.cycles, trips=p.round_trips, r_hat=p.r_hat),)


def _verdict(
    config: PathsConfig, found: Mapping[str, PathFreeEnergy], mixing: PathDiagnostics, proposed: Mapping[str, float]
) -> Verdict:  # fmt: skip
    doubts: list[tuple[Word, str]] = []
    for pair, one in found.items():
        if one.verdict.word != "reliable":
            doubts += [(one.verdict.word, f"{pair}: {reason}") for reason in one.verdict.reasons]
    doubts += [("not converged", warning) for warning in mixing.warnings]
    doubts += [("not converged", hardly_proposed(name, share)) for name, share in list(proposed.items())[2:] if share < MIN_PROPOSED]
    if _has_time_step_error(config):
        doubts.append(("not exact", _TIME_STEP))
    if doubts:
        return Verdict(min((word for word, _ in doubts), key=_GRAVITY.index), tuple(reason for _, reason in doubts))
    trips = int(mixing.round_trips.sum())
    return Verdict("reliable", (f"{trips} round trips between the first two basins, and walkers agree",))


def _evaluations(production: History, kept: History, adaptation: History | None) -> dict[str, int]:
    stages = (("adaptation", adaptation), ("production", kept))
    spent = {}
    for name, history in stages:
        if history is not None:
            spent[f"{name}, local"] = int(history.n_force_local.sum())
            spent[f"{name}, paths"] = int(history.paths.n_force.sum())
    spent["production, discarded"] = _n_force(production) - _n_force(kept)
    return spent


def _n_force(history: History) -> int:
    return int(history.paths.n_force.sum() + history.n_force_local.sum())
