"""Langevin chains and the temperature ladder against harmonic oscillators, whose averages are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import openmm
import pytest

from boltzgen.errors import EnergyError, InputError, PlatformError
from boltzgen.md import ladder
from boltzgen.md.ladder import SeededExchange, temperature_ladder
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.simulate import DynamicsSettings, heavy_torsions, langevin, run_chains, with_hydrogens_of
from boltzgen.md.trajectory import Trajectory
from boltzgen.units import thermal_energy
from tests.assertions import assert_z

N_PARTICLES, STIFFNESS = 6, 5000.0
TEMPERATURES = (300.0, 400.0, 533.0)


def oscillators(*, stiffness: float = STIFFNESS) -> openmm.System:
    """Independent particles of 12 Da, U = k r²/2."""
    system, force = openmm.System(), openmm.CustomExternalForce(f"0.5*{stiffness}*(x^2+y^2+z^2)")
    for index in range(N_PARTICLES):
        system.addParticle(12.0)
        force.addParticle(index)
    system.addForce(force)
    return system


REFERENCE = PlatformChoice(name="Reference")
SHORT = DynamicsSettings(n_steps=10, save_every=1, timestep_ps=0.001, friction_per_ps=1.0, seed=1, platform=REFERENCE)


def run_langevin(*, temperature_kelvin: float = 300.0, **changes: Any) -> Trajectory:
    settings = replace(SHORT, **({"n_steps": 20_000, "timestep_ps": 0.004, "friction_per_ps": 20.0, "save_every": 20} | changes))
    start = np.zeros((N_PARTICLES, 3))
    return langevin(oscillators(), start, temperature_kelvin=temperature_kelvin, settings=settings, progress=False)


def run_ladder(*, temperatures_kelvin: tuple[float, ...] = TEMPERATURES, **changes: Any) -> Trajectory:
    settings = replace(SHORT, **({"n_steps": 12_000, "timestep_ps": 0.004, "friction_per_ps": 2.0, "save_every": 20} | changes))
    return temperature_ladder(
        oscillators(), np.zeros((N_PARTICLES, 3)), temperatures_kelvin=temperatures_kelvin, exchange_every=20, settings=settings,
        progress=False,
    )  # fmt: skip


def check_equipartition(trajectory: Trajectory, temperature_kelvin: float) -> None:
    """⟨x²⟩ = kT/k per coordinate (exact for this integrator, Zhang et al. 2019) and ⟨u⟩ = 3N/2."""
    x2 = (trajectory.x.reshape(len(trajectory), -1) ** 2).mean(axis=1)
    n = len(trajectory) / trajectory.statistical_inefficiency
    assert_z(float(x2.mean()), thermal_energy(temperature_kelvin) / STIFFNESS, float(x2.std() / np.sqrt(n)))
    assert_z(float(trajectory.u.mean()), 1.5 * N_PARTICLES, float(trajectory.u.std() / np.sqrt(n)))


def test_langevin_samples_the_boltzmann_distribution() -> None:
    trajectory = run_langevin()
    assert trajectory.x.dtype == trajectory.u.dtype == np.float64
    assert len(trajectory) == 2000
    assert trajectory.n_force_evaluations == 2 * (22_000 + 1000)
    check_equipartition(trajectory, 300.0)
    with pytest.raises(AssertionError):
        check_equipartition(run_langevin(temperature_kelvin=330.0), 300.0)


def test_heavier_hydrogens_sample_the_same_density_and_nothing_else_changes() -> None:
    system = oscillators()
    for i in (0, 3):
        system.setParticleMass(i, 1.008)
    heavier = with_hydrogens_of(system, 4.0)
    assert [heavier.getParticleMass(i)._value for i in range(N_PARTICLES)] == [4.0, 12.0, 12.0, 4.0, 12.0, 12.0]
    assert system.getParticleMass(0)._value == 1.008
    settings = replace(SHORT, n_steps=40_000, timestep_ps=0.004, friction_per_ps=20.0, save_every=20)
    x = langevin(heavier, np.zeros((N_PARTICLES, 3)), temperature_kelvin=300.0, settings=settings, progress=False).x
    blocks = (STIFFNESS * x[:, [0, 3]] ** 2 / thermal_energy(300.0)).mean(axis=(1, 2)).reshape(40, -1).mean(axis=1)
    assert_z(blocks.mean(), 1.0, blocks.std(ddof=1) / np.sqrt(len(blocks)))
    with pytest.raises(InputError, match="positive mass"):
        with_hydrogens_of(system, 0.0)
    system.addConstraint(0, 1, 0.1)
    with pytest.raises(InputError, match="1 bonds are constrained"):
        with_hydrogens_of(system, 4.0)


def test_rows_are_ordered_by_chain_and_time() -> None:
    trajectory = run_langevin(n_steps=400)
    assert trajectory.chain.tolist() == [0] * 20 + [1] * 20
    assert trajectory.block.tolist() == [b for _ in range(2) for b in range(10) for _ in range(2)]
    u = 0.5 * STIFFNESS * (trajectory.x**2).sum(axis=(1, 2)) / thermal_energy(300.0)
    np.testing.assert_allclose(trajectory.u, u, rtol=1e-10)


def test_every_level_of_the_ladder_samples_its_own_temperature() -> None:
    trajectory = run_ladder()
    assert [level.temperature_kelvin for level in trajectory.hot] == [400.0, 533.0]
    for level, temperature in zip((trajectory, *trajectory.hot), TEMPERATURES, strict=True):
        check_equipartition(level, temperature)
        assert len(level) == 1200


def test_exchanges_that_ignore_the_energies_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(SeededExchange):
        def exchangeReplicas(self) -> None:
            self.replicaStateIndex = [int(i) for i in self.rng.permutation(len(self.states))]

    monkeypatch.setattr(ladder, "SeededExchange", Careless)
    with pytest.raises(AssertionError):
        check_equipartition(run_ladder(), 300.0)


@pytest.mark.parametrize("run", [run_langevin, run_ladder])
def test_equal_seeds_give_equal_bits_on_reference(run) -> None:
    first, second, other = (run(seed=seed, n_steps=400) for seed in (3, 3, 4))
    assert np.array_equal(first.x, second.x)
    assert np.array_equal(first.u, second.u)
    assert not np.array_equal(first.x, other.x)
    assert not np.array_equal(first.x[:20], first.x[20:]), "chains must differ"


def test_the_cpu_platform_runs_chains_in_parallel() -> None:
    trajectory = run_langevin(platform=PlatformChoice(name="CPU"), n_steps=400)
    assert np.isfinite(trajectory.u).all()
    assert "CPU" in trajectory.notes[0]


def test_precision_and_device_of_the_dynamics_are_obeyed_or_refused() -> None:
    with pytest.raises(PlatformError, match="Reference has no Precision, so 'double' cannot be obeyed"):
        run_langevin(platform=PlatformChoice(name="Reference", precision="double"), n_steps=400)
    with pytest.raises(PlatformError, match="CPU has no DeviceIndex"):
        run_ladder(platform=PlatformChoice(name="CPU", device="1"), n_steps=400)


def test_a_poor_ladder_says_so() -> None:
    trajectory = run_ladder(temperatures_kelvin=(300.0, 3000.0), n_steps=2000)
    assert any("put a temperature in between" in note for note in trajectory.notes)


def test_constraints_hold() -> None:
    system = oscillators()
    system.addConstraint(0, 1, 0.1)
    start = np.zeros((N_PARTICLES, 3))
    start[1, 0] = 0.1
    settings = replace(SHORT, n_steps=400, timestep_ps=0.002, friction_per_ps=5.0, save_every=20)
    trajectory = langevin(system, start, temperature_kelvin=300, settings=settings, progress=False)
    np.testing.assert_allclose(np.linalg.norm(trajectory.x[:, 0] - trajectory.x[:, 1], axis=-1), 0.1, rtol=1e-7)


@pytest.mark.parametrize("run", [run_langevin, run_ladder])
def test_dynamics_that_blow_up_raise_with_advice(run) -> None:
    with pytest.raises(EnergyError, match="smaller time step"):
        run(timestep_ps=0.5)


def test_a_start_without_an_energy_is_refused() -> None:
    system = oscillators()
    system.getForce(0).setEnergyFunction("sqrt(x-1e9)")
    with pytest.raises(EnergyError, match="blew up"):
        langevin(system, np.zeros((N_PARTICLES, 3)), temperature_kelvin=300, settings=SHORT, progress=False)


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (run_langevin, {"n_steps": 5}, "n_steps ≥ save_every"),
        (run_langevin, {"timestep_ps": -1.0}, "positive time step"),
        (run_ladder, {"temperatures_kelvin": (300.0,)}, "two or more"),
        (run_ladder, {"temperatures_kelvin": (400.0, 300.0)}, "ascending"),
        (run_ladder, {"save_every": 30}, "multiple of exchange_every"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(run, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_positions_of_another_molecule_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[6, 3\] in nm, got shape \(5, 3\)"):
        langevin(oscillators(), np.zeros((5, 3)), temperature_kelvin=300, settings=SHORT)


def test_a_failing_chain_stops_the_others_and_is_the_error_raised() -> None:
    def chain(index: int, advance) -> int:
        if index == 1:
            raise EnergyError("this one")
        while True:
            advance(1)

    with pytest.raises(EnergyError, match="this one"):
        run_chains(chain, n_chains=3, parallel=True, total=10, label="", progress=False)


def test_torsions_of_heavy_atoms_are_found_from_the_force_field() -> None:
    from pathlib import Path

    system = openmm.XmlSerializer.deserialize(Path("systems/alanine_dipeptide_vacuum/system.xml").read_text())
    axes = {tuple(sorted(t[1:3])) for t in heavy_torsions(system)}
    assert {(6, 8), (8, 14), (4, 6), (14, 16)} <= axes
    assert not any(hydrogen in axis for axis in axes for hydrogen in (0, 2, 3, 7, 9, 11, 12, 13, 17, 19, 20, 21))
