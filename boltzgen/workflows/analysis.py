"""Numbers of a trained generator, each from the estimator that vouches for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from boltzgen.config import EvaluationConfig, MoleculeConfig
from boltzgen.core import Distribution, Estimate, WeightedSamples
from boltzgen.cvs import CollectiveVariables
from boltzgen.estimators.profiles import profile_2d, total_variation
from boltzgen.estimators.reweighting import free_energy_difference, log_z, log_z_lower, log_z_upper, mean
from boltzgen.estimators.verdict import MIN_EFFECTIVE, Verdict, generator_verdict
from boltzgen.estimators.weights import (
    clipped_effective_sample_size,
    effective_sample_size,
    ess_by_batch,
    forward_effective_sample_size,
    negative_share,
    pareto_k,
)
from boltzgen.md.trajectory import Trajectory
from boltzgen.sampling.chains import acceptance, run_chain
from boltzgen.sampling.importance import log_ratios
from boltzgen.workflows.coordinates import Ranges, inside

_CHAIN_LEAVES_OUT = (
    "some samples have a negative weight, since the flow's steps fold space there: estimates count them with their sign and stay exact; "
    "chain.xtc leaves them out, so that it is as far from exact as their share of the weight, negative_weight"
)


@dataclass(frozen=True)
class Analysis:
    """What the weighted samples and the data say.

    Attributes:
        estimates: Free energies and averages.
        diagnostics: Effective sample sizes and bounds.
        verdict: What may be concluded.
        notes: What a reader must know.
        chain: Exact samples from the independence chain.
        sample_arrays: Coordinates of the samples, for ``weights.npz``.
        data_arrays: Coordinates of the MD frames, for ``data.npz``.
    """

    estimates: tuple[Estimate, ...]
    diagnostics: Mapping[str, Any]
    verdict: Verdict
    notes: tuple[str, ...]
    chain: WeightedSamples
    sample_arrays: Mapping[str, np.ndarray]
    data_arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Judgement:
    """What every job says of its weighted samples.

    Attributes:
        estimates: ln Z, its bounds, and the mean energy.
        diagnostics: Effective sample sizes and bounds.
        verdict: What may be concluded.
    """

    estimates: tuple[Estimate, ...]
    diagnostics: Mapping[str, Any]
    verdict: Verdict


def judge(
    samples: WeightedSamples, ratios: torch.Tensor, *, settings: EvaluationConfig, seed: int, warnings: tuple[str, ...] = ()
) -> Judgement:
    """Judge weighted samples by themselves and by rows that follow the target.

    Args:
        samples: Fresh weighted samples of a flow.
        ratios: ln p̃ − ln q of independent held-out rows ``[m]``; NaN where it is not known.
        settings: Settings of the evaluation.
        seed: Seed of the bootstrap.
        warnings: Reasons to doubt the coverage of the data.
    """
    unknown = torch.isnan(ratios)
    if bool(unknown.any()):
        warnings = (
            *warnings,
            f"the flow's density is not known at {int(unknown.sum())} of {len(ratios)} held-out rows: they judge nothing",
        )
        ratios = ratios[~unknown]
    ln_z = log_z(samples, n_bootstrap=settings.n_bootstrap, seed=seed)
    lower, upper = log_z_lower(samples), log_z_upper(ratios)
    energy = mean(samples, samples.u, name="mean reduced potential", unit="kT", n_bootstrap=settings.n_bootstrap, seed=seed)
    batch = min(settings.batch_size, len(samples))
    per_batch = ess_by_batch(samples, batch_size=batch)
    diagnostics = {
        "ess_raw": effective_sample_size(samples),
        "ess_batch_median": float(np.median(per_batch)),
        "ess_batches": per_batch.tolist(),
        "ess_batch_size": batch,
        "ess_clipped": clipped_effective_sample_size(samples, fraction=settings.clip_fraction),
        "clip_fraction": settings.clip_fraction,
        "pareto_k": pareto_k(samples),
        "forward_ess": forward_effective_sample_size(ratios),
        "held_out_rows": len(ratios),
        "elbo": lower.value,
        "eubo": upper.value,
        "n_samples": len(samples),
        "negative_weight": negative_share(samples),
    }
    verdict = generator_verdict(
        ess_raw=diagnostics["ess_raw"], pareto_k=diagnostics["pareto_k"], n_samples=len(samples), forward_ess=diagnostics["forward_ess"],
        n_forward_effective=float(len(ratios)), elbo=float(lower.value), eubo=float(upper.value), log_z=float(ln_z.value),
        warnings=warnings,
    )  # fmt: skip
    return Judgement(tuple(with_caution(estimate) for estimate in (ln_z, lower, upper, energy)), diagnostics, verdict)


def analyse(
    config: MoleculeConfig,
    flow: Distribution,
    samples: WeightedSamples,
    held_out: Trajectory,
    *,
    md: Trajectory,
    variables: CollectiveVariables,
    basins: Mapping[str, Ranges],
    warnings: tuple[str, ...],
    normalisation: str,
    more: Mapping[str, Any] | None = None,
) -> Analysis:
    """Estimate everything that the configuration asks for.

    Args:
        config: Settings of the evaluation.
        flow: The trained flow.
        samples: Fresh weighted samples of it.
        held_out: Decorrelated MD frames that trained nothing (only early stopping of the first stage watches them): they judge the flow.
        md: All MD frames at the target temperature: what the simulation alone says, with errors over its time blocks.
        variables: Coordinates.
        basins: Basin → coordinate → range.
        warnings: Reasons to doubt the coverage of the data.
        normalisation: What ln Z counts.
        more: Further diagnostics of the job.

    Returns:
        Estimates, diagnostics and the verdict.
    """
    u_data = torch.as_tensor(held_out.u, dtype=torch.float64)
    ratios = log_ratios(flow, torch.as_tensor(held_out.x, dtype=torch.float64), u_data)
    values, md_values = (_values(variables, torch.as_tensor(x, dtype=torch.float64)) for x in (samples.x, md.x))
    md_samples = _unweighted(md)
    chain = run_chain(samples, generator=torch.Generator().manual_seed(config.seed))
    judged = judge(samples, ratios, settings=config.evaluation, seed=config.seed, warnings=warnings)
    diagnostics = {
        **judged.diagnostics,
        **(more or {}),
        "acceptance": acceptance(chain),
        "data_statistical_inefficiency": held_out.statistical_inefficiency,
    }
    pair = [k for k, v in enumerate(variables) if v.period is not None][:2]
    if len(pair) == 2:
        diagnostics["ramachandran_total_variation"] = _total_variation(samples, values[:, pair], md_samples, md_values[:, pair])
    differences = _free_energies(config, samples, md_samples, values, md_values, variables=variables, basins=basins)
    names = np.array([v.name for v in variables], dtype=np.str_)
    units = np.array([v.unit for v in variables], dtype=np.str_)
    notes = (normalisation,) if chain.log_det_error == samples.log_det_error else (normalisation, _CHAIN_LEAVES_OUT)
    return Analysis(
        estimates=(*map(with_caution, differences), *judged.estimates),
        diagnostics=diagnostics, verdict=judged.verdict, notes=notes,
        chain=chain,
        sample_arrays={"cvs": values, "cv_names": names, "cv_units": units},
        data_arrays={"cvs": md_values, "u": md.u, "block": md.block, "chain": md.chain},
    )  # fmt: skip


def with_caution(estimate: Estimate) -> Estimate:
    """An estimate that says so where too few samples stand behind it for its error bar to be trusted."""
    if estimate.n_effective >= MIN_EFFECTIVE or not math.isfinite(estimate.value):
        return estimate
    caution = f"{estimate.n_effective:.0f} effective samples are too few to trust the error bar"
    return replace(estimate, note=f"{estimate.note}; {caution}" if estimate.note else caution)


def _free_energies(
    config: MoleculeConfig,
    samples: WeightedSamples,
    md: WeightedSamples,
    values: np.ndarray,
    md_values: np.ndarray,
    *,
    variables: CollectiveVariables,
    basins: Mapping[str, Ranges],
) -> list[Estimate]:
    """Every basin against everything else, every pair of basins, and the same from MD alone for comparison."""
    n_bootstrap, seed = config.evaluation.n_bootstrap, config.seed
    rows = {name: inside(ranges, values, variables) for name, ranges in basins.items()}
    estimates = []
    for name, ranges in basins.items():
        visited = inside(ranges, md_values, variables)
        for source, inner, suffix in ((samples, rows[name], ""), (md, visited, ", MD alone")):
            estimates.append(
                free_energy_difference(
                    source,
                    ~inner,
                    inner,
                    name=f"F({name}) - F(rest){suffix}",
                    labels=("the rest", name),
                    n_bootstrap=n_bootstrap,
                    seed=seed,
                )
            )
    ordered = list(rows)
    for k, a in enumerate(ordered):
        for b in ordered[k + 1 :]:
            estimates.append(
                free_energy_difference(
                    samples, rows[a], rows[b], name=f"F({b}) - F({a})", labels=(a, b), n_bootstrap=n_bootstrap, seed=seed
                )
            )
    return estimates


def _values(variables: CollectiveVariables, x: torch.Tensor) -> np.ndarray:
    """Values ``[n, k]`` of the coordinates."""
    with torch.no_grad():
        return variables(x).numpy()


def _unweighted(md: Trajectory) -> WeightedSamples:
    """MD frames as samples of equal weight; correlated within a time block of a chain."""
    u, block, chain = (torch.as_tensor(values) for values in (md.u, md.block, md.chain))
    return WeightedSamples.unweighted(torch.zeros(len(md), 0), u, role="evaluate", block=block, chain=chain)


def _total_variation(samples: WeightedSamples, values: np.ndarray, md: WeightedSamples, md_values: np.ndarray) -> float:
    """Total variation distance between the reweighted and the MD map of two angles, on 50 × 50 bins."""
    edges = np.linspace(-math.pi, math.pi, 51)
    maps = [
        profile_2d(rows, columns, edges=(edges, edges), name="", n_bootstrap=20, seed=0)
        for rows, columns in ((samples, values), (md, md_values))
    ]
    return total_variation(*maps)
