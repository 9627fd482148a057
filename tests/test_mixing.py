"""Mixtures of two OpenMM systems: energies, forces, and the ensembles that are sampled from them."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import app, unit

from boltzgen.errors import InputError
from boltzgen.md.mixing import GROUP_A, GROUP_B, MixedLangevinIntegrator, end_energies, mixed_system
from boltzgen.units import thermal_energy
from tests.assertions import assert_z
from tests.molecules import SYSTEMS

KT = thermal_energy(300.0)
STIFFNESS = (300.0, 1500.0)


def stored(name: str) -> openmm.System:
    return openmm.XmlSerializer.deserialize((SYSTEMS / name / "system.xml").read_text())


def start(name: str) -> np.ndarray:
    x = app.PDBFile(str(SYSTEMS / name / "topology.pdb")).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return np.array(x) + np.random.default_rng(1).normal(scale=0.002, size=x.shape)


def at(system: openmm.System, x: np.ndarray, integrator: openmm.Integrator | None = None) -> openmm.Context:
    integrator = integrator or openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    return context


def energy_and_force(context: openmm.Context, **groups: object) -> tuple[float, np.ndarray]:
    state = context.getState(energy=True, forces=True, **groups)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def trap(stiffness: float, *, n: int = 40) -> openmm.System:
    """Independent particles in a harmonic trap whose global parameter ``k`` is the stiffness."""
    system, force = openmm.System(), openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    force.addGlobalParameter("k", stiffness)
    for _ in range(n):
        force.addParticle(system.addParticle(10.0))
    system.addForce(force)
    return system


def nested(scale: float) -> openmm.System:
    """Forces of many kinds that share names of global parameters, one of them inside another force."""
    system, bond = openmm.System(), openmm.CustomBondForce("lambda*k*r^2; k=2*scale_1")
    bond.addGlobalParameter("lambda", scale)
    bond.addGlobalParameter("scale_1", 1.0 + scale)
    charges = openmm.NonbondedForce()
    charges.addGlobalParameter("lambda", scale)
    for k in range(3):
        system.addParticle(12.0)
        charges.addParticle(0.1 * k, 0.3, 0.4)
        charges.addParticleParameterOffset("lambda", k, 0.2, 0.0, 0.1)
    bond.addBond(0, 1, [])
    outer = openmm.CustomCVForce("lambda*(inner-1)^2")
    outer.addGlobalParameter("lambda", scale)
    outer.addCollectiveVariable("inner", bond)
    outer.setForceGroup(7)
    system.addForce(outer)
    system.addForce(charges)
    system.addForce(openmm.CMMotionRemover())
    return system


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("alanine_dipeptide_vacuum", "alanine_dipeptide_amber14_vacuum"),
        ("alanine_dipeptide_implicit", "alanine_dipeptide_amber99sbildn_obc"),
    ],
)
def test_groups_have_the_energies_and_forces_of_both_systems(a: str, b: str) -> None:
    """Also those of two generalised Born forces in one system, a custom one and OpenMM's own."""
    x, ends = start(a), (stored(a), stored(b))
    mixed = at(mixed_system(*ends), x)
    for system, group, energy in zip(ends, (GROUP_A, GROUP_B), end_energies(mixed), strict=True):
        expected, found = energy_and_force(at(system, x)), energy_and_force(mixed, groups={group})
        assert found[0] == pytest.approx(expected[0], abs=1e-8)
        assert energy == found[0]
        np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-6)


def test_global_parameters_of_the_same_name_keep_their_values() -> None:
    x = np.array([[0.0, 0, 0], [0.3, 0, 0], [0, 0.4, 0.1]])
    mixed = at(mixed_system(nested(0.3), nested(0.8)), x)
    assert dict(mixed.getParameters()) == {"lambda": 0.3, "scale_1": 1.3, "lambda_of_b": 0.8, "scale_1_of_b": 1.8}
    for scale, energy in zip((0.3, 0.8), end_energies(mixed), strict=True):
        assert energy == pytest.approx(energy_and_force(at(nested(scale), x))[0], abs=1e-10)
    same = at(mixed_system(nested(0.3), nested(0.3)), x)
    assert set(same.getParameters()) == {"lambda", "scale_1"}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_step_takes_the_weighed_force(weight: float) -> None:
    """Without friction a step from rest is v = h f/m, x → x + h v."""
    a, b = (stored(name) for name in ("alanine_dipeptide_vacuum", "alanine_dipeptide_amber14_vacuum"))
    x, h = start("alanine_dipeptide_vacuum"), 0.0005
    integrator = MixedLangevinIntegrator(temperature_kelvin=300.0, friction_per_ps=0.0, timestep_ps=h)
    context = at(mixed_system(a, b), x, integrator)
    integrator.set_weights(1 - weight, weight)
    integrator.step(1)
    force = sum(w * energy_and_force(at(system, x))[1] for w, system in ((1 - weight, a), (weight, b)))
    mass = np.array([a.getParticleMass(i)._value for i in range(len(x))])[:, None]
    moved = context.getState(positions=True).getPositions(asNumpy=True)._value - x
    np.testing.assert_allclose(moved, h**2 * force / mass, rtol=0, atol=1e-10)


def variance(mixed: openmm.System, weights: tuple[float, float], *, seed: int) -> tuple[float, float]:
    """⟨x²⟩ with its error over the independent coordinates of a trap, at a time step that a less exact scheme would show."""
    integrator = MixedLangevinIntegrator(temperature_kelvin=300.0, friction_per_ps=5.0, timestep_ps=0.04, weights=weights)
    integrator.setRandomNumberSeed(seed)
    context = at(mixed, np.zeros((mixed.getNumParticles(), 3)), integrator)
    integrator.step(200)
    square = np.zeros((mixed.getNumParticles(), 3))
    for _ in range(400):
        integrator.step(5)
        square += context.getState(positions=True).getPositions(asNumpy=True)._value ** 2 / 400
    return float(square.mean()), float(square.std(ddof=1) / np.sqrt(square.size))


def test_a_mixture_of_two_harmonic_traps_is_the_trap_in_between() -> None:
    """k_λ = (1 − λ) k_A + λ k_B, ⟨x²⟩ = kT/k_λ; B at another temperature counts by kT/kT_B; swapped weights are caught."""
    mixed, weight, ratio = mixed_system(trap(STIFFNESS[0]), trap(STIFFNESS[1])), 0.3, 0.8
    expected = KT / ((1 - weight) * STIFFNESS[0] + weight * ratio * STIFFNESS[1])
    found, error = variance(mixed, (1 - weight, weight * ratio), seed=3)
    assert_z(found, expected, error)
    with pytest.raises(AssertionError):
        assert_z(*(variance(mixed, (weight * ratio, 1 - weight), seed=3)[0], expected, error))


def test_constraints_are_kept() -> None:
    ends = []
    for stiffness in STIFFNESS:
        system = trap(stiffness)
        for k in range(0, 40, 2):
            system.addConstraint(k, k + 1, 0.1)
        ends.append(system)
    x = np.zeros((40, 3))
    x[1::2, 0] = 0.1
    integrator = MixedLangevinIntegrator(temperature_kelvin=300.0, friction_per_ps=5.0, timestep_ps=0.01, weights=(0.5, 0.5))
    context = at(mixed_system(*ends), x, integrator)
    integrator.step(50)
    x = context.getState(positions=True).getPositions(asNumpy=True)._value
    np.testing.assert_allclose(np.linalg.norm(x[1::2] - x[::2], axis=1), 0.1, atol=1e-5)


def test_systems_that_do_not_belong_together_are_refused() -> None:
    system = trap(1.0)
    with pytest.raises(InputError, match="over the same atoms, got 40 and 39"):
        mixed_system(system, trap(1.0, n=39))
    rigid = trap(1.0)
    rigid.addConstraint(0, 1, 0.1)
    with pytest.raises(InputError, match="constrain different bonds"):
        mixed_system(system, rigid)
    held = trap(1.0)
    held.setParticleMass(3, 0.0)
    with pytest.raises(InputError, match="hold other atoms fixed"):
        mixed_system(system, held)
    sites = [trap(1.0), trap(1.0)]
    for share, one in zip((0.5, 0.4), sites, strict=True):
        one.setParticleMass(2, 0.0)
        one.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, share, 1 - share))
    with pytest.raises(InputError, match="virtual sites"):
        mixed_system(*sites)
    boxes = [nested(0.1), nested(0.1)]
    for edge, one in zip((3.0, 3.1), boxes, strict=True):
        one.setDefaultPeriodicBoxVectors(*(edge * np.eye(3)))
        one.getForce(1).setNonbondedMethod(openmm.NonbondedForce.PME)
    with pytest.raises(InputError, match="other boxes"):
        mixed_system(*boxes)
