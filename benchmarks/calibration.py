"""Do error bars of free energy differences hold? Analytic problems, 1,000 independent repeats of each.

    python benchmarks/calibration.py [--out benchmarks/results/calibration.json]

For every problem: how often the verdict is ``reliable``, and how often the 95 % interval, value ± 1.96 errors, then covers the truth.
Twins that leave out what makes the error right must fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.signal import lfilter
from stored import out_path, store

from boltzgen.core import Estimate
from boltzgen.estimators.mbar import mbar_free_energies
from boltzgen.estimators.multistate import multistate_free_energies, multistate_verdict
from boltzgen.estimators.perturbation import acceptance_ratio, exponential_average, perturbation_verdict
from boltzgen.estimators.state_potentials import StatePotentials
from boltzgen.estimators.works import Works

REPEATS, RESAMPLES, DIFFERENCE = 1000, 200, 1.3
#: The share of covered repeats that is asked for.
ASKED = (0.93, 0.97)
Problem = Callable[[int], tuple[Estimate, float, bool]]


def works(w: np.ndarray, chain: np.ndarray | None = None) -> Works:
    return Works.of(w, role="evaluate", log_det_error=0.0, chain=chain)


def ratio(forward: Works, reverse: Works, truth: float, seed: int) -> tuple[Estimate, float, bool]:
    found = acceptance_ratio(forward, reverse, n_bootstrap=RESAMPLES, seed=seed)
    return found.difference, truth, perturbation_verdict(found).word == "reliable"


def normal(seed: int, *, sigma: float, n: int, n_reverse: int) -> tuple[Estimate, float, bool]:
    """Works of a normal distribution, as of two harmonic states shifted against each other."""
    rng = np.random.default_rng(seed)
    forward = rng.normal(DIFFERENCE + sigma**2 / 2, sigma, n)
    return ratio(works(forward), works(rng.normal(-DIFFERENCE + sigma**2 / 2, sigma, n_reverse)), DIFFERENCE, seed)


def harmonic(seed: int, *, stiffness: float, dimension: int, n: int) -> tuple[Estimate, float, bool]:
    """u_A = |x|²/2 and u_B = k|x|²/2: another stiffness, or the temperature 1/k; the works have heavy tails."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dimension)), rng.normal(size=(n, dimension)) / stiffness**0.5
    change = 0.5 * (stiffness - 1)
    forward, reverse = change * np.square(x).sum(1), -change * np.square(y).sum(1)
    return ratio(works(forward), works(reverse), 0.5 * dimension * np.log(stiffness), seed)


def correlated(seed: int, *, memory: float, n: int, treated: Callable[[Works], Works]) -> tuple[Estimate, float, bool]:
    """Two chains of each harmonic state, shifted against each other, whose positions remember ``memory`` of their last."""
    rng, shift, chains = np.random.default_rng(seed), 1.5, 2
    noise = rng.normal(size=(2 * chains, n + 400)) * (1 - memory**2) ** 0.5
    x = lfilter([1.0], [1.0, -memory], noise, axis=1)[:, 400:].reshape(2, -1)
    chain = np.repeat(np.arange(chains), n)
    forward = works(0.5 * shift**2 - shift * x[0] + DIFFERENCE, chain)
    reverse = works(0.5 * shift**2 + shift * x[1] - DIFFERENCE, chain)
    return ratio(treated(forward), treated(reverse), DIFFERENCE, seed)


def one_sided(seed: int, *, sigma: float, n: int) -> tuple[Estimate, float, bool]:
    """The exponential average of normal works; reliable where it carries no note."""
    forward = works(np.random.default_rng(seed).normal(DIFFERENCE + sigma**2 / 2, sigma, n))
    found = exponential_average(forward, n_bootstrap=RESAMPLES, seed=seed)
    return found, DIFFERENCE, not found.note


def several(seed: int, *, n: int) -> tuple[Estimate, float, bool]:
    """MBAR over five harmonic states in a row."""
    rng, centres = np.random.default_rng(seed), np.arange(5.0)
    x = np.concatenate([rng.normal(centre, 1.0, n) for centre in centres])
    found = mbar_free_energies(0.5 * np.square(x - centres[:, None]) + DIFFERENCE * centres[:, None], np.full(5, n))
    covariance = np.asarray(found.covariance)
    stderr = float(np.sqrt(covariance[4, 4] + covariance[0, 0] - 2 * covariance[0, 4]))
    return Estimate("F_5 - F_1", float(found.f[4] - found.f[0]), stderr, "kT", 5.0 * n), 4 * DIFFERENCE, found.overlap >= 0.05


def mapped(
    seed: int, *, memory: float, n: int, chains: int, treated: Callable[[StatePotentials], StatePotentials]
) -> tuple[Estimate, float, bool]:
    """Learned MBAR: three harmonic states in five dimensions, two chains of each, pulled back by maps x = s z + m that are off by a third.

    ũ_k(z) = Σ_i (s_k z_i + m_k − c_k)²/2w_k² − 5 ln s_k, and F_k − F_0 = −5 ln w_k/w_0.
    """
    rng, d, width, centre = np.random.default_rng(seed), 5, np.array([1.0, 0.5, 1.6]), np.array([0.0, 2.0, -1.5])
    scale, shift = np.array([1.0, 0.6, 1.3]), np.array([0.0, 1.7, -1.1])
    noise = rng.normal(size=(3, chains, d, n + 300)) * (1 - memory**2) ** 0.5
    z = lfilter([1.0], [1.0, -memory], noise, axis=3)[..., 300:].transpose(0, 2, 1, 3).reshape(3, d, -1)
    x = centre[:, None, None] + width[:, None, None] * z
    u = []
    for k in range(3):
        back = (x[k] - shift[k]) / scale[k]
        pushed = scale[:, None, None] * back + (shift - centre)[:, None, None]
        u.append(0.5 * np.square(pushed / width[:, None, None]).sum(axis=1) - d * np.log(scale)[:, None])
    chain = np.repeat(np.arange(chains), n)
    rows = treated(StatePotentials.of(u, role="evaluate", log_det_error=0.0, chain=[chain] * 3))
    found = multistate_free_energies(rows, n_bootstrap=RESAMPLES, seed=seed)
    return found.between(1, 2), -d * float(np.log(width[2] / width[1])), multistate_verdict(found).word == "reliable"


PROBLEMS: dict[str, Problem] = {
    "normal works, sigma 1, 400 + 400": partial(normal, sigma=1.0, n=400, n_reverse=400),
    "normal works, sigma 2, 1000 + 300": partial(normal, sigma=2.0, n=1000, n_reverse=300),
    "normal works, sigma 3.5, 1000 + 1000": partial(normal, sigma=3.5, n=1000, n_reverse=1000),
    "normal works, sigma 5, 1000 + 1000": partial(normal, sigma=5.0, n=1000, n_reverse=1000),
    "normal works, sigma 3.5, 100 + 100": partial(normal, sigma=3.5, n=100, n_reverse=100),
    "harmonic, twice as stiff, 10-D, 500 + 500": partial(harmonic, stiffness=2.0, dimension=10, n=500),
    "harmonic, 1.2 times as hot, 30-D, 500 + 500": partial(harmonic, stiffness=1 / 1.2, dimension=30, n=500),
    "correlated, memory 0.7, blocks": partial(correlated, memory=0.7, n=3000, treated=lambda one: one.blocked(at_least=1.0)),
    "correlated, memory 0.9, decorrelated": partial(correlated, memory=0.9, n=3000, treated=lambda one: one.decorrelated()),
    "exponential average, sigma 1, 2000": partial(one_sided, sigma=1.0, n=2000),
    "exponential average, sigma 2, 2000": partial(one_sided, sigma=2.0, n=2000),
    "exponential average, sigma 2.5, 20000": partial(one_sided, sigma=2.5, n=20_000),
    "MBAR, five states of 300": partial(several, n=300),
    "learned MBAR, three states of 400": partial(mapped, memory=0.0, n=400, chains=1, treated=lambda rows: rows),
    "learned MBAR, three correlated states, blocks": partial(mapped, memory=0.7, n=1500, chains=2, treated=lambda rows: rows.blocked()),
}
TWINS: dict[str, Problem] = {
    "correlated, memory 0.9, every row by itself": partial(correlated, memory=0.9, n=3000, treated=lambda one: one),
    "learned MBAR, three correlated states, every row by itself": partial(mapped, memory=0.7, n=1500, chains=2, treated=lambda rows: rows),
}


def coverage(problem: Problem, repeats: int) -> dict[str, float | int | None]:
    started, z = time.perf_counter(), []
    for seed in range(repeats):
        estimate, truth, is_reliable = problem(seed)
        if is_reliable:
            z.append((float(estimate.value) - truth) / float(estimate.stderr))
    covered = float(np.mean(np.abs(z) < 1.96)) if z else None
    return {
        "repeats": repeats,
        "reliable": len(z),
        "covered": covered,
        "spread_of_z": float(np.std(z)) if z else None,
        "mean_of_z": float(np.mean(z)) if z else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    out, results = out_path(__doc__), {}
    for name, problem in (PROBLEMS | TWINS).items():
        results[name] = coverage(problem, REPEATS if name in PROBLEMS else REPEATS // 5)
        print(f"{name}: {results[name]}", flush=True)
    store(out, {"seed": "0 to repeats - 1", "asked": ASKED, "problems": {name: results[name] for name in PROBLEMS},
                "twins": {name: results[name] for name in TWINS}})  # fmt: skip


if __name__ == "__main__":
    main()
