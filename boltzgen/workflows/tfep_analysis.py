"""Works of held-out configurations of two states, and what they say of the free energy difference."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from boltzgen.config import Joining
from boltzgen.core import Bridge, Chain, Estimate, Target, Transform
from boltzgen.errors import NoOverlapError
from boltzgen.estimators.perturbation import (
    AcceptanceRatio,
    Convergence,
    acceptance_ratio,
    bound,
    convergence,
    exponential_average,
    perturbation_verdict,
)
from boltzgen.estimators.verdict import Verdict
from boltzgen.estimators.works import Works
from boltzgen.md.trajectory import Trajectory
from boltzgen.transforms.one_to_one import OneToOne
from boltzgen.workflows.joining import Ensemble

#: What is said of one-sided averages through Runge-Kutta steps that are not one to one everywhere (:class:`OneToOne`).
_LEAVES_OUT = "not exact: it misses the configurations of the other state that the map leaves out"
#: Rows of one call for energies.
_ENERGY_ROWS = 2000


@dataclass(frozen=True)
class WorkAnalysis:
    """What works say.

    Attributes:
        estimates: The difference by the map, its bounds, and the same without a map for comparison.
        diagnostics: Overlaps, effective numbers, convergence.
        verdict: What may be concluded.
        works: Every work as CSV: map, direction, chain, work in kT.
    """

    estimates: tuple[Estimate, ...]
    diagnostics: Mapping[str, Any]
    verdict: Verdict
    works: str


@dataclass(frozen=True)
class Judged:
    """Maps and the ensembles whose held-out frames judge them.

    Attributes:
        ends: A and B.
        transforms: Maps from A to B, whose works are taken together; the last one is the trained map.
    """

    ends: Sequence[Ensemble]
    transforms: Sequence[Transform]


def analyse_works(settings: Joining, judged: Sequence[Judged], *, warnings: tuple[str, ...]) -> WorkAnalysis:
    """Estimate the difference with a map from held-out frames, and without one from all frames.

    What uses no map has nothing to train: it gets all frames of both states, so that the comparison is with the best that plain
    perturbation can do with these simulations.

    Args:
        settings: Settings of the evaluation.
        judged: Maps and their data; the two halves of cross-fitting in the order of time.
        warnings: Reasons to doubt the coverage of the data.
    """
    (a, b), evaluation, seed = judged[-1].ends, settings.evaluation, settings.seed
    forward, reverse = _held_out_works(judged)
    found = acceptance_ratio(forward, reverse, name="F_B - F_A", n_bootstrap=evaluation.n_bootstrap, seed=seed)
    drift = _convergence(settings, forward, reverse)
    if drift is None:
        warnings = (*warnings, "too few independent works to look at their convergence: sample longer")
    verdict = perturbation_verdict(found, drift=drift, warnings=warnings)
    leaves_out = any(isinstance(transform, OneToOne) for one in judged for transform in one.transforms)
    estimates = [found.difference, *_one_sided(settings, forward, reverse, "", leaves_out=leaves_out)]
    works = {"learned": (forward, reverse)}
    try:
        works["none"] = plain = _works_without_map(a, b)
        plainly = acceptance_ratio(*plain, name="F_B - F_A, without a map, all data", n_bootstrap=evaluation.n_bootstrap, seed=seed)
        estimates += [plainly.difference, *_one_sided(settings, *plain, ", without a map")]
        without = _numbers(plainly, *plain) | {"verdict": perturbation_verdict(plainly).word}
    except NoOverlapError:  # two basins: no configuration of one lies in the other
        without = {"overlap": 0.0, "n_forward": len(a.trajectory), "n_reverse": len(b.trajectory), "verdict": "low overlap"}
    diagnostics = {
        **_numbers(found, forward, reverse),
        "without_map": without,
        "log_det_error": forward.log_det_error,
        "n_maps": forward.n_maps,
    }
    if drift is not None:
        diagnostics["convergence"] = {name: getattr(drift, name) for name in drift.__dataclass_fields__}
    return WorkAnalysis(tuple(estimates), diagnostics, verdict, _table(works))


def _held_out_works(judged: Sequence[Judged]) -> tuple[Works, Works]:
    """Works of all held-out frames, forward and reverse; of equally many in each part, as :meth:`Works.joined` asks for."""
    found = []
    for k, reverse in enumerate((False, True)):
        parts = []
        for one in judged:
            a, b = one.ends
            parts.append(_works(a.target, b.target, one.transforms, one.ends[k].held_out, reverse=reverse))
        n = min(len(works) for works in parts)
        found.append(_blocked(Works.joined([works.rows(np.arange(n)) for works in parts]), judged[-1].ends[k]))
    return found[0], found[1]


def _works_without_map(a: Ensemble, b: Ensemble) -> tuple[Works, Works]:
    """Energy differences of all frames, forward and reverse."""
    forward = _works(a.target, b.target, [Chain()], a.trajectory, reverse=False)
    reverse = _works(a.target, b.target, [Chain()], b.trajectory, reverse=True)
    return _blocked(forward, a), _blocked(reverse, b)


@torch.no_grad()
def _works(a: Target, b: Target, transforms: Sequence[Transform], frames: Trajectory, *, reverse: bool) -> Works:
    """Works in kT through maps from A to B of frames of A, or the other way round of frames of B; every frame its own unit."""
    several, rows = [], torch.as_tensor(frames.x, dtype=torch.float64)
    for transform in transforms:
        bridge = Bridge(a, b, transform)
        work = bridge.reverse_works if reverse else bridge.works
        w = torch.cat([work(some) for some in rows.split(_ENERGY_ROWS)])
        exact = a.is_exact and b.is_exact
        several.append(Works.of(w, role=frames.role, log_det_error=transform.log_det_error, is_exact=exact, chain=frames.chain))
    return several[0] if len(several) == 1 else Works.union(several)


def _blocked(works: Works, end: Ensemble) -> Works:
    """The works in units that are longer than their memory and that of the frames."""
    return works.blocked(at_least=end.held_out.statistical_inefficiency)


def _one_sided(settings: Joining, forward: Works, reverse: Works, suffix: str, *, leaves_out: bool = False) -> list[Estimate]:
    """Exponential averages from both sides and the two bounds; of a map that leaves configurations out the averages miss those."""
    n_bootstrap, seed = settings.evaluation.n_bootstrap, settings.seed
    averages = [
        exponential_average(works, reverse=back, name=f"F_B - F_A, from {side} alone{suffix}", n_bootstrap=n_bootstrap, seed=seed)
        for works, back, side in ((forward, False, "A"), (reverse, True, "B"))
    ]
    if leaves_out:
        averages = [replace(average, note="; ".join(filter(None, (average.note, _LEAVES_OUT)))) for average in averages]
    bounds = [bound(reverse, reverse=True), bound(forward)]
    return [*averages, *(replace(estimate, name=f"{estimate.name}{suffix}") for estimate in bounds)]


def _convergence(settings: Joining, forward: Works, reverse: Works) -> Convergence | None:
    """Growing shares of the data; None where there are too few for the smallest share."""
    n_shares = settings.evaluation.n_shares
    if min(forward.n_units, reverse.n_units) < 4 * n_shares:
        return None
    return convergence(forward, reverse, n_shares=n_shares, seed=settings.seed)


def _numbers(found: AcceptanceRatio, forward: Works, reverse: Works) -> dict[str, Any]:
    return {
        "overlap": found.overlap,
        "n_forward": len(forward),
        "n_reverse": len(reverse),
        "carriers_forward": found.n_forward,
        "carriers_reverse": found.n_reverse,
        "mismatch": found.mismatch.value,
        "mismatch_stderr": found.mismatch.stderr,
        "spread_forward": _spread(forward.w),
        "spread_reverse": _spread(reverse.w),
    }


def _spread(w: np.ndarray) -> float:
    """Standard deviation of the finite works."""
    return float(np.std(w[np.isfinite(w)]))


def _table(works: Mapping[str, tuple[Works, Works]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["map", "direction", "chain", "work_kT"])
    for name, pair in works.items():
        for direction, one in zip(("forward", "reverse"), pair, strict=True):
            writer.writerows([name, direction, chain, f"{w:.8g}"] for chain, w in zip(one.chain, one.w, strict=True))
    return out.getvalue()
