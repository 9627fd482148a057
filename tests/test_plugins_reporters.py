"""The reporter of collective variables and log weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from boltzgen.cvs import CollectiveVariables, Dihedral, Distance
from boltzgen.errors import InputError
from boltzgen.md.colvar import read_colvar
from boltzgen.units import thermal_energy
from boltzgen.workflows.plugins.distributions import normal_mixture
from boltzgen.workflows.plugins.reporters import CollectiveVariableReporter
from tests.assertions import assert_z
from tests.dimers import BOND, TRAP, Dimer

ROOT = Path(__file__).parents[1]

CLOUD = normal_mixture([[[0.0] * 3] * 2], [[[0.16] * 3] * 2])


def dimer_simulation(*, temperature: float = 300.0, timestep_fs: float = 0.5) -> app.Simulation:
    integrator = openmm.LangevinMiddleIntegrator(temperature * unit.kelvin, 5 / unit.picosecond, timestep_fs * unit.femtosecond)
    integrator.setRandomNumberSeed(3)
    simulation = app.Simulation(Dimer().topology, Dimer().system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(Dimer().draw(1, np.random.default_rng(1))[0])
    return simulation


class Frames:
    """A reporter that keeps what the other one saw."""

    def __init__(self, interval: int) -> None:
        self.interval, self.x, self.u = interval, [], []

    def describeNextReport(self, simulation: app.Simulation) -> dict:
        return {"steps": self.interval - simulation.currentStep % self.interval, "periodic": False, "include": ["positions", "energy"]}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        self.x.append(state.getPositions(asNumpy=True)._value.copy())
        self.u.append(state.getPotentialEnergy()._value)


def test_the_file_holds_every_frame(tmp_path: Path) -> None:
    simulation, frames = dimer_simulation(), Frames(5)
    simulation.reporters += [CollectiveVariableReporter(tmp_path / "COLVAR", 5, [BOND], flow=CLOUD), frames]
    simulation.step(100)
    found = read_colvar(tmp_path / "COLVAR")
    x, u = np.array(frames.x), np.array(frames.u) / thermal_energy(300.0)
    assert found.fields == ("time", "bond", "log_weight")
    np.testing.assert_allclose(found.column("time"), 0.0025 * np.arange(1, 21))
    np.testing.assert_allclose(found.column("bond"), np.linalg.norm(x[:, 1] - x[:, 0], axis=1), rtol=1e-14)
    log_q = -0.5 * (x**2).sum((1, 2)) / 0.16**2 - 6 * math.log(0.16 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(found.column("log_weight"), -u - log_q, rtol=1e-12)


@pytest.mark.slow
def test_log_weights_along_a_simulation_give_the_partition_function(tmp_path: Path) -> None:
    """⟨e^{−log w}⟩ = 1/Z, with Z from quadrature."""
    simulation = dimer_simulation(temperature=600.0)
    simulation.reporters.append(CollectiveVariableReporter(tmp_path / "COLVAR", 100, [BOND], flow=CLOUD))
    simulation.step(400_000)
    kt = thermal_energy(600.0)
    r = np.linspace(0, 1, 20001)
    u = (15.0 * (((r - 0.3) / 0.1) ** 2 - 1) ** 2 + 0.25 * TRAP * r**2) / kt
    log_z = math.log((4 * math.pi * r**2 * np.exp(-u)).sum() * (r[1] - r[0])) + 1.5 * math.log(math.pi * kt / TRAP)
    ratios = np.exp(-read_colvar(tmp_path / "COLVAR").column("log_weight") + log_z)[200:].reshape(20, -1).mean(1)
    assert_z(float(ratios.mean()), 1.0, float(ratios.std(ddof=1)) / math.sqrt(20))


def alanine() -> app.Simulation:
    folder = ROOT / "systems/alanine_dipeptide_vacuum"
    pdb = app.PDBFile(str(folder / "topology.pdb"))
    system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, 1 * unit.femtosecond)
    simulation = app.Simulation(pdb.topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(pdb.positions)
    return simulation


def test_periodic_variables_have_bounds_and_a_file_is_gone_on_with(tmp_path: Path) -> None:
    simulation, phi = alanine(), Dihedral("phi", (4, 6, 8, 14))
    path = tmp_path / "COLVAR"
    simulation.reporters.append(CollectiveVariableReporter(path, 4, [phi]))
    simulation.step(8)
    simulation.reporters[0].close()
    simulation.reporters[:] = [CollectiveVariableReporter(path, 4, [phi], append=True)]
    simulation.step(8)
    found = read_colvar(path)
    assert found.bounds == {"phi": (-math.pi, math.pi)}
    np.testing.assert_allclose(found.column("time"), [0.004, 0.008, 0.012, 0.016])
    x = torch.from_numpy(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value.copy())[None]
    assert found.column("phi")[-1] == pytest.approx(float(CollectiveVariables([phi])(x)))
    with pytest.raises(InputError, match="or with append=False"):
        CollectiveVariableReporter(path, 4, [Dihedral("psi", (6, 8, 14, 16))], append=True)
    CollectiveVariableReporter(path, 4, [phi]).close()
    assert len(read_colvar(path).values) == 0


def test_a_variable_takes_the_box_of_the_frame(tmp_path: Path) -> None:
    system = openmm.System()
    force = openmm.NonbondedForce()
    for _ in range(2):
        system.addParticle(40.0)
        force.addParticle(0.0, 0.3, 0.0)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    system.addForce(force)
    simulation = app.Simulation(
        Dimer().topology, system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )  # fmt: skip
    simulation.context.setPeriodicBoxVectors(*(4.0 * np.eye(3)))
    simulation.context.setPositions(np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))
    simulation.reporters.append(CollectiveVariableReporter(tmp_path / "COLVAR", 1, [Distance("d", (0, 1), box=3.5 * np.eye(3))]))
    simulation.step(1)
    np.testing.assert_allclose(read_colvar(tmp_path / "COLVAR").column("d"), 1.0)


def test_a_simulation_without_temperature_is_refused(tmp_path: Path) -> None:
    simulation = app.Simulation(
        Dimer().topology, Dimer().system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )  # fmt: skip
    simulation.context.setPositions(Dimer().draw(1, np.random.default_rng(1))[0])
    simulation.reporters.append(CollectiveVariableReporter(tmp_path / "COLVAR", 1, [BOND], flow=CLOUD))
    with pytest.raises(InputError, match="a VerletIntegrator has no temperature"):
        simulation.step(1)
    warm = CollectiveVariableReporter(tmp_path / "COLVAR", 1, [BOND], flow=CLOUD, temperature=300 * unit.kelvin)
    simulation.reporters[:] = [warm]
    simulation.step(1)
    assert np.isfinite(read_colvar(tmp_path / "COLVAR").values).all()
