"""Reference samples of small clusters by Hamiltonian Monte Carlo; no flow is involved.

    python benchmarks/reference_clusters.py dw4 --n 100000 --out dw4.npz --seed 1
    python benchmarks/reference_clusters.py lj13 --n 300000 --out lj13.npz --seed 1

Many walkers side by side: half of them start from random places, half from the lowest minimum found by quenching random starts. After
equilibration both halves must agree, which is checked on the energy and on structure, with errors from the spread of independent walkers.
For the Coulomb gas the virial identity 2⟨Σx²⟩ − ⟨V_C⟩ = d n / β and the exact variance of the centre, 1/(2βn) per axis, are checked too.

Writes ``x`` (float32, ``[n, particles, d]``), ``u`` (float64, of the walkers before rounding), ``chain`` and ``block`` to the npz file; the
numbers go to ``benchmarks/results/reference_clusters.json``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from boltzgen import __version__
from boltzgen.core import Target
from boltzgen.estimators.timeseries import statistical_inefficiency
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo, WalkerRun, relaxed, sample_walkers, tuned_step_size
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster, LennardJonesCluster

RESULT = Path(__file__).parent / "results" / "reference_clusters.json"


@dataclass(frozen=True)
class Job:
    """A system and how to sample it.

    Attributes:
        make: Makes the target.
        spread: Width in nm of the random starts.
        walkers: Number of walkers.
        equilibration: Moves that are not recorded.
        thin: Moves per recorded configuration of a walker.
    """

    make: Callable[[], Target]
    spread: float
    walkers: int
    equilibration: int
    thin: int


JOBS = {
    "dw4": Job(lambda: DoubleWellCluster(), spread=2.5, walkers=1000, equilibration=4000, thin=50),
    "lj13": Job(lambda: LennardJonesCluster(13), spread=1.0, walkers=1000, equilibration=1000, thin=10),
    "lj55": Job(lambda: LennardJonesCluster(55), spread=1.5, walkers=200, equilibration=1000, thin=10),
    "coulomb_2_2": Job(lambda: CoulombGas(2, 2), spread=0.7, walkers=1000, equilibration=500, thin=5),
    "coulomb_6_2": Job(lambda: CoulombGas(6, 2), spread=0.8, walkers=1000, equilibration=1000, thin=10),
    "coulomb_20_2": Job(lambda: CoulombGas(20, 2), spread=1.2, walkers=1000, equilibration=1000, thin=10),
}


def starts(target: Target, job: Job, *, generator: torch.Generator) -> Tensor:
    """Random places in the first half of the walkers, the lowest of many quenched configurations in the second."""
    n_random = job.walkers // 2
    x = job.spread * torch.randn(job.walkers, *target.event_shape, generator=generator, dtype=torch.float64)
    x = relaxed(target, x, reach=0.1 * job.spread)
    quenched = relaxed(target, x[:200], reach=0.05 * job.spread, n_steps=2000)
    x[n_random:] = quenched[target.reduced_potential(quenched).argmin()]
    return x


def sampled(target: Target, job: Job, *, n: int, seed: int) -> tuple[WalkerRun, float, float]:
    """The recorded run, its step in nm, and gradients per second."""
    generator = torch.Generator().manual_seed(seed)
    move = HamiltonianMonteCarlo(target, step_size=0.02 * job.spread, n_leapfrog=10, mean_free=not isinstance(target, CoulombGas))
    state = move.init(starts(target, job, generator=generator))
    move, state = tuned_step_size(move, state, generator=generator)
    state = sample_walkers(move, state, n_times=1, thin=job.equilibration // 2, generator=generator).state
    move, state = tuned_step_size(move, state, generator=generator)
    state = sample_walkers(move, state, n_times=1, thin=job.equilibration // 2, generator=generator).state
    n_times, start = math.ceil(n / job.walkers), time.perf_counter()
    run = sample_walkers(move, state, n_times=n_times, thin=job.thin, generator=generator, dtype=torch.float32)
    rate = n_times * job.thin * job.walkers * move.n_leapfrog / (time.perf_counter() - start)
    return run, move.step_size, rate


def observables(target: Target, run: WalkerRun) -> dict[str, np.ndarray]:
    """What is compared, each ``[walkers, times]``: energy, size, first pair, signed area of the first triangle."""
    x = run.samples.x.to(torch.float64)
    values = {"u": run.samples.u, "size": x.square().sum((1, 2)), "r12": (x[:, 0] - x[:, 1]).norm(dim=1)}
    if x.shape[1] > 2:
        a, b = x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]
        values["area"] = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    if isinstance(target, CoulombGas):
        n, d = target.event_shape
        values["virial"] = 3 * values["size"] - values["u"] / target.beta - d * n / target.beta
        values["centre"] = 2 * target.beta * n * x.mean(1).square().mean(1)
    return {name: run.by_walker(value) for name, value in values.items()}


def summary(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean, error over walkers, statistical inefficiency in recorded times, and the difference of the two starts in standard errors."""
    found = {}
    for name, series in values.items():
        means = series.mean(axis=1)
        halves = means[: len(means) // 2], means[len(means) // 2 :]
        errors = [half.std(ddof=1) / math.sqrt(len(half)) for half in halves]
        found[name] = {
            "mean": float(means.mean()),
            "stderr": float(means.std(ddof=1) / math.sqrt(len(means))),
            "statistical_inefficiency": statistical_inefficiency(series[:200]),
            "starts_differ_by_sigma": float((halves[0].mean() - halves[1].mean()) / math.hypot(*errors)),
        }
    return found


def store(name: str, result: Mapping[str, object]) -> None:
    """Put one result into the file of results."""
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results[name] = result
    RESULT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


@click.command()
@click.argument("name", type=click.Choice(list(JOBS)))
@click.option("--n", required=True, type=int, help="Number of configurations, rounded up to whole times of all walkers.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="npz file to write.")
@click.option("--seed", default=1, show_default=True)
def main(name: str, n: int, out: Path, seed: int) -> None:
    job = JOBS[name]
    target = job.make()
    run, step, rate = sampled(target, job, n=n, seed=seed)
    samples = run.samples
    np.savez(out, x=samples.x.numpy(), u=samples.u.numpy(), chain=samples.chain.numpy(), block=samples.block.numpy())
    result = {
        "command": f"python benchmarks/reference_clusters.py {name} --n {n} --out {out.name} --seed {seed}",
        "rows": len(samples),
        "walkers": job.walkers,
        "moves_per_row": job.thin,
        "leapfrog_steps": 10,
        "step_nm": step,
        "acceptance": float(run.acceptance.mean()),
        "acceptance_of_slowest_walker": float(run.acceptance.min()),
        "observables": summary(observables(target, run)),
        "versions": {"boltzgen": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    store(name, result)
    print(f"{name}: {len(samples)} rows, acceptance {result['acceptance']:.3f} (slowest walker "
          f"{result['acceptance_of_slowest_walker']:.3f}) at h = {step:.4f} nm, {rate:,.0f} gradients per second")  # fmt: skip
    for label, numbers in result["observables"].items():
        print(f"  {label:7s} {numbers['mean']:.5f} ± {numbers['stderr']:.5f}, g = {numbers['statistical_inefficiency']:.1f} rows, "
              f"starts differ by {numbers['starts_differ_by_sigma']:+.1f} sigma")  # fmt: skip


if __name__ == "__main__":
    main()
