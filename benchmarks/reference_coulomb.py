"""Reference free energies F = −ln Z/β of n charges in a trap, E = Σ 1/|x_i − x_j| + Σ|x_i|², β = 10, labelled particles.

    python benchmarks/reference_coulomb.py 6 2
    python benchmarks/reference_coulomb.py 20 2 --states 24

No flow is involved. States interpolate between a Gaussian as wide as the quenched gas and the gas, u_λ = (1 − λ) β κ Σ|x|² + λ β E, at
λ_k = (k/K)³, fine near 0, where close pairs make the Coulomb energy vary most. The Gaussian has the exact ln Z = (n d / 2) ln(π/βκ) and is
sampled exactly. Walkers go up from there state by state, equilibrating in each by Hamiltonian Monte Carlo; MBAR over all states gives ln Z
and ⟨E⟩ at λ = 1. Walkers form ten independent groups: the error is that of the groups' mean or MBAR's own, whichever is larger. Two charges
are compared with quadrature. Results go to ``benchmarks/results/reference_coulomb.json``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from boltzgen import __version__
from boltzgen.estimators.mbar import mbar_free_energies
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo, relaxed, sample_walkers, tuned_step_size
from boltzgen.targets.clusters import CoulombGas

RESULT = Path(__file__).parent / "results" / "reference_coulomb.json"
BETA, GROUPS = 10.0, 10

#: F and ⟨E⟩ of two charges by quadrature (``tests/test_clusters.py``).
EXACT = {(2, 2): (1.576789, 1.652604), (2, 3): (1.593734, 1.708547)}


def softness(n: int, d: int) -> float:
    """κ: the trap, relative to that of the gas, of a Gaussian that is as wide as the quenched gas."""
    gas = CoulombGas(n, d, beta=BETA)
    x = relaxed(gas, torch.randn(100, n, d, generator=torch.Generator().manual_seed(0)), n_steps=1000)
    return n * d / (2 * BETA * float(x[gas.reduced_potential(x).argmin()].square().sum()))


def gas_at(n: int, d: int, strength: float, *, kappa: float) -> CoulombGas:
    """The state λ = ``strength``."""
    trap = (1 - strength) * kappa + strength
    return CoulombGas(n, d, beta=BETA * trap, strength=strength / trap)


def switched_on(n: int, d: int, strengths: np.ndarray, *, kappa: float, walkers: int, times: int, thin: int, seed: int) -> Tensor:
    """Samples of every state, ``[K, times, walkers, n, d]`` in float64: one ascent of all walkers."""
    generator = torch.Generator().manual_seed(seed)
    width = 1 / math.sqrt(2 * BETA * kappa)
    found = [width * torch.randn(times, walkers, n, d, generator=generator, dtype=torch.float64)]
    x, step = found[0][-1], 0.2 * width
    for strength in tqdm(strengths[1:], desc="switching on", mininterval=5):
        target = gas_at(n, d, float(strength), kappa=kappa)
        move = HamiltonianMonteCarlo(target, step_size=step, n_leapfrog=10)
        apart = relaxed(target, x, reach=0.1 * width, n_steps=50)  # pairs that are close from the state before would stay stuck
        move, state = tuned_step_size(move, move.init(apart), generator=generator, n_moves=100)
        state = sample_walkers(move, state, n_times=1, thin=200, generator=generator, progress=False).state
        run = sample_walkers(move, state, n_times=times, thin=thin, generator=generator, progress=False)
        found.append(run.samples.x.reshape(times, walkers, n, d))
        x, step = run.state.x, move.step_size
    return torch.stack(found)


def solved(u_0: np.ndarray, u_1: np.ndarray, strengths: np.ndarray, *, log_z_0: float) -> tuple[float, float, float, float]:
    """F, its MBAR error, ⟨E⟩ and the overlap, of the energies in the first and the last state, ``[K, m]`` in kT."""
    counts = np.full(len(strengths), u_0.shape[1])
    u_0, u_1 = u_0.reshape(-1), u_1.reshape(-1)
    result = mbar_free_energies(u_0 + strengths[:, None] * (u_1 - u_0), counts)
    energy = float(np.exp(result.log_weights(u_1)) @ u_1) / BETA
    return (float(result.f[-1]) - log_z_0) / BETA, math.sqrt(result.covariance[-1, -1]) / BETA, energy, result.overlap


@click.command()
@click.argument("n", type=int)
@click.argument("d", type=int)
@click.option("--states", default=16, show_default=True, help="States with a Coulomb term.")
@click.option("--walkers", default=500, show_default=True, help="A multiple of 10.")
@click.option("--times", default=20, show_default=True, help="Recorded configurations of every walker and state.")
@click.option("--thin", default=10, show_default=True, help="Moves per recorded configuration.")
@click.option("--seed", default=1, show_default=True)
def main(n: int, d: int, states: int, walkers: int, times: int, thin: int, seed: int) -> None:
    begun = time.perf_counter()
    strengths = (np.arange(states + 1) / states) ** 3
    kappa = softness(n, d)
    x = switched_on(n, d, strengths, kappa=kappa, walkers=walkers, times=times, thin=thin, seed=seed)
    gaussian, gas = (gas_at(n, d, strength, kappa=kappa) for strength in (0.0, 1.0))
    u_0, u_1 = (target.reduced_potential(x.flatten(0, 2)).reshape(x.shape[:3]).numpy() for target in (gaussian, gas))
    assert gaussian.log_z is not None

    def part(u: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return u[:, :, columns].reshape(len(u), -1)

    free_energy, mbar_error, energy, overlap = solved(part(u_0, np.arange(walkers)), part(u_1, np.arange(walkers)), strengths,
                                                      log_z_0=gaussian.log_z)  # fmt: skip
    groups = np.array([
        solved(part(u_0, columns), part(u_1, columns), strengths, log_z_0=gaussian.log_z)
        for columns in np.split(np.arange(walkers), GROUPS)
    ])  # fmt: skip
    errors = groups.std(axis=0, ddof=1) / math.sqrt(GROUPS)
    result = {
        "command": shlex.join(["python", "benchmarks/reference_coulomb.py", *sys.argv[1:]]),
        "definition": "F = -ln Z / beta, labelled particles (no 1/n!), beta = 10",
        "free_energy": free_energy,
        "free_energy_stderr": max(float(errors[0]), mbar_error),
        "free_energy_stderr_mbar": mbar_error,
        "free_energy_of_groups": groups[:, 0].tolist(),
        "energy": energy,
        "energy_stderr": float(errors[2]),
        "exact": dict(zip(("free_energy", "energy"), EXACT.get((n, d), ()), strict=False)),
        "kappa": kappa,
        "mbar_overlap": overlap,
        "wall_seconds": round(time.perf_counter() - begun),
        "versions": {"boltzgen": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "cpus": os.cpu_count(),
    }
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(stored | {f"{n}_{d}": result}, indent=1, sort_keys=True) + "\n")
    print(f"({n}, {d}): F = {free_energy:.5f} ± {result['free_energy_stderr']:.5f}, <E> = {energy:.5f} ± {errors[2]:.5f}, "
          f"overlap {overlap:.2f}, exact {result['exact'] or 'not known'}")  # fmt: skip


if __name__ == "__main__":
    main()
