"""The walker of the reference is exact at a large time step, and MBAR over windows gives back a density that is known."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import openmm
import pytest

from tests.assertions import assert_z

sys.path.append(str(Path("benchmarks").resolve()))  # they share code with each other
UMBRELLA, HYBRID, BASELINES, ORDER = (
    importlib.import_module(name) for name in ("umbrella", "hybrid_monte_carlo", "path_baselines", "liquid_order")
)
POLYMER = UMBRELLA.POLYMER


def dimer_in_vacuum(*, dt: float, planar: bool) -> object:
    """Two particles on a spring of 40 kT/σ² around 1.5 σ, no window: −ln density of r is 20 (r − 1.5)² − (d − 1) ln r + const."""

    class Vacuum(UMBRELLA.Distance):
        def load(self) -> tuple[openmm.System, np.ndarray]:
            system, spring = openmm.System(), openmm.HarmonicBondForce()
            spring.addBond(0, 1, 1.5 * self.sigma, 40 * self.kt / self.sigma**2)
            for _ in range(2):
                system.addParticle(39.948)
            system.addForce(spring)
            return system, np.array([[0.0, 0.0, 0.0], [1.5 * self.sigma, 0.0, 0.0]])

    settings = {field.name: getattr(UMBRELLA.DIMER_2D, field.name) for field in dataclasses.fields(UMBRELLA.DIMER_2D)}
    return Vacuum(**settings | {"stiffness": 0.0, "dt": dt, "planar": planar, "friction": 1.0})


def check_second_moment(*, planar: bool) -> None:
    """⟨(r − 1.5)²⟩ against quadrature, at a time step where many trajectories are rejected."""
    walker = HYBRID.HybridWalker(dimer_in_vacuum(dt=0.19, planar=planar), seed=1)
    walker.trace(200)
    blocks = ((walker.trace(6_000) - 1.5) ** 2).reshape(30, -1).mean(axis=1)
    r = np.linspace(0.4, 2.6, 4001)
    p = np.exp(-20 * (r - 1.5) ** 2) * r ** (1 if planar else 2)
    assert 0.3 < walker.accepted / walker.proposed < 0.97
    assert_z(blocks.mean(), float((p * (r - 1.5) ** 2).sum() / p.sum()), blocks.std(ddof=1) / np.sqrt(len(blocks)))


@pytest.mark.parametrize("planar", [False, True])
def test_the_walker_is_exact_at_a_large_time_step(planar: bool) -> None:
    check_second_moment(planar=planar)


def test_a_walker_that_rejects_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HYBRID.np, "log", lambda _: -np.inf)
    with pytest.raises(AssertionError):
        check_second_moment(planar=False)


def windows(seed: int) -> dict[int, np.ndarray]:
    """Draws of every window of the polymer for a density that is known: two Gaussians of 0.2 σ, weights 0.8 and 0.2."""
    rng, grid, out = np.random.default_rng(seed), np.linspace(2.5, 6.7, 8401), {}
    density = 0.8 * np.exp(-0.5 * ((grid - 3.5) / 0.2) ** 2) + 0.2 * np.exp(-0.5 * ((grid - 5.7) / 0.2) ** 2)
    for k, centre in enumerate(POLYMER.centres):
        p = density * np.exp(-POLYMER.bias(grid, centre))
        out[k] = rng.choice(grid, size=400, p=p / p.sum())
    return out


def test_windows_give_back_the_density_they_were_drawn_from() -> None:
    found = [UMBRELLA.solve(POLYMER, windows(seed), 18) for seed in range(8)]
    values = np.array([one.delta_f for one in found])
    assert_z(values.mean(), np.log(4), values.std(ddof=1) / np.sqrt(len(values)))
    assert 0.02 < values.std(ddof=1) < 0.3
    well = np.mean([one.profile[3] - one.profile[14] for one in found])  # both bins are centred 0.1 σ from a minimum
    assert well == pytest.approx(-np.log(4), abs=0.15)


def test_the_estimate_from_a_bias_at_rest_is_that_of_the_bias() -> None:
    grid = np.linspace(2.4, 6.8, 441)
    free_energy = -np.log(0.8 * np.exp(-0.5 * ((grid - 3.5) / 0.2) ** 2) + 0.2 * np.exp(-0.5 * ((grid - 5.7) / 0.2) ** 2) + 1e-9)
    method = BASELINES.WellTempered()
    bias = (method.gamma - 1) / method.gamma * (free_energy.max() - free_energy)
    assert BASELINES.difference(method.gamma / (method.gamma - 1) * bias, grid > POLYMER.barrier) == pytest.approx(np.log(4), abs=1e-3)
    p = np.exp(-free_energy - bias)
    r = np.random.default_rng(1).choice(grid, size=40_000, p=p / p.sum())
    log_w = method._log_weights(r, np.zeros(len(r), dtype=int), grid, bias[None])
    assert BASELINES.difference(log_w, r > POLYMER.barrier) == pytest.approx(np.log(4), abs=0.1)


def test_metadynamics_in_the_plane_moves_and_stays_there() -> None:
    distance = UMBRELLA.DIMER_2D
    x = distance.load()[1]
    simulation, metadynamics, _ = BASELINES.WellTempered(width=0.3, pace=5)._simulation(distance, x, 1)
    metadynamics.step(simulation, 10)
    moved = np.abs(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value - x)
    assert moved[:, :2].min() > 0
    assert moved[:, 2].max() == 0


def test_a_crystal_is_told_from_a_liquid() -> None:
    lattice = np.stack(np.meshgrid(*3 * [np.arange(6.0)], indexing="ij"), axis=-1).reshape(-1, 3)
    rng = np.random.default_rng(1)
    warm = lattice + rng.normal(scale=0.1, size=lattice.shape) + 6 * rng.integers(-1, 2, size=lattice.shape)
    assert ORDER.largest_structure_factor(lattice, 6.0) == pytest.approx(216)
    assert ORDER.largest_structure_factor(warm, 6.0) > 100
    assert ORDER.largest_structure_factor(6 * rng.random(lattice.shape), 6.0) < 20
    assert ORDER.largest_structure_factor(lattice[lattice[:, 2] == 0], 6.0) == pytest.approx(36)


def test_stored_references_meet_their_error_goals() -> None:
    results = json.loads(Path("benchmarks/results/reference_umbrella.json").read_text())
    for name, one in results.items():
        slow = name == "wca_dimer_3d"  # a dense liquid
        assert one["stderr_kT"] < (0.15 if slow else 0.1)
        assert one["largest_profile_stderr_below_6_kT"] < (0.25 if slow else 0.2)
        assert max(one.get("largest_structure_factor_of_sweeps", [0.0])) < 50, "a crystal has 100 and more"
        assert abs(one["up_kT"] - one["down_kT"]) < 5 * one["stderr_kT"]
