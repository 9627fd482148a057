"""Collective variables and restraints are the same in torch and in OpenMM, to 1e-8."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping, Sequence

import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from torch import Tensor

from boltzgen.cvs import (
    RMSD,
    Angle,
    CollectiveVariable,
    CollectiveVariables,
    Combination,
    Coordination,
    Cosine,
    Dihedral,
    Distance,
    RadiusOfGyration,
    Sine,
)
from boltzgen.errors import EnergyError, InputError
from boltzgen.md.cv_forces import center_name, cv_force, restraint_forces, stiffness_name
from boltzgen.md.force_variable import ForceVariable, variable_of_cvpack

N = 9
BOX = np.array([[1.5, 0.0, 0.0], [0.3, 1.4, 0.0], [-0.2, 0.5, 1.3]])
RECTANGLE = np.diag([1.5, 1.4, 1.3])
REFERENCE = np.random.default_rng(5).normal(size=(N, 3))


def bond(expression: str = "r") -> openmm.Force:
    force = openmm.CustomBondForce(expression)
    force.addBond(0, 1)
    return force


def torsion() -> openmm.Force:
    force = openmm.CustomTorsionForce("theta")
    force.addTorsion(0, 1, 2, 3)
    return force


def product() -> openmm.CustomCVForce:
    """A user's own variable: r θ."""
    force = openmm.CustomCVForce("a*b")
    force.addCollectiveVariable("a", bond())
    force.addCollectiveVariable("b", torsion())
    return force


def variables(box: np.ndarray | None) -> list[CollectiveVariable]:
    phi, psi, d = Dihedral("phi", (0, 4, 2, 8)), Dihedral("psi", (4, 2, 8, 1)), Distance("d", (0, 3), box=box)
    heavy = RadiusOfGyration("heavy", (1, 3, 5, 8), masses=[1.0, 12.0, 16.0, 3.0])
    mixed = Combination(
        "mixed", [Cosine(phi), Sine(phi), Cosine(psi), Sine(Angle("a", (1, 2, 3))), d, Distance("e", (1, 2)), heavy],
        [0.3, -0.2, 0.5, 0.9, 0.7, 1.1, 0.4], offset=0.25,
    )  # fmt: skip
    theta = ForceVariable("theta", torsion(), n_particles=N, period=2 * math.pi, unit="rad")
    return [
        d, Angle("angle", (1, 2, 5)), phi, RadiusOfGyration("rg", (1, 3, 5, 8)), heavy,
        RMSD("rmsd", (0, 1, 3, 4, 7), reference=REFERENCE),
        Coordination("c", (0, 1, 2), (4, 5), r0=0.8, box=box), Coordination("c46", (0, 1, 2), (4, 5), r0=0.8, n=4, m=6, box=box),
        Coordination("c37", (0, 1, 2, 6), r0=0.8, n=3, m=7, box=box),
        Cosine(phi), Sine(phi), Cosine(theta), mixed, Combination("nested", [mixed, heavy], [2.0, -0.5], offset=1.0),
        ForceVariable("product", product(), n_particles=N), theta,
    ]  # fmt: skip


def reference(
    forces: Sequence[openmm.Force], x: Tensor, *, box: np.ndarray | None, parameters: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Energies ``[b]`` and forces ``[b, n, 3]`` of OpenMM's Reference platform."""
    system = openmm.System()
    for _ in range(x.shape[1]):
        system.addParticle(1.0)
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*box)
    for force in forces:
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for name, value in parameters.items():
        context.setParameter(name, value)
    energies, gradients = [], []
    for row in x.numpy():
        context.setPositions(row)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        gradients.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return torch.tensor(energies, dtype=torch.float64), torch.from_numpy(np.array(gradients))


def assert_same(energy: Tensor, x: Tensor, forces: Sequence[openmm.Force], *, box: np.ndarray | None, **parameters: float) -> None:
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    expected, force = reference(forces, x.detach(), box=box, parameters=parameters)
    torch.testing.assert_close(energy.detach(), expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(gradient, -force, atol=1e-8, rtol=1e-8)


def configurations(generator: torch.Generator) -> Tensor:
    return torch.randn(6, N, 3, generator=generator, dtype=torch.float64).requires_grad_(True)


@pytest.mark.parametrize("box", [None, RECTANGLE, BOX], ids=["free", "rectangular", "triclinic"])
def test_every_variable_is_its_force(box: np.ndarray | None, generator: torch.Generator) -> None:
    for cv in variables(box):
        x = configurations(generator)
        assert_same(cv(x), x, [cv_force(cv)], box=box)


def energy_of(cvs: CollectiveVariables, x: Tensor, centers: Tensor, stiffnesses: Tensor) -> Tensor:
    """The restraints as the docstring of ``restraint_forces`` defines them."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for value, period, c, k in zip(cvs(x).unbind(1), cvs.periods, centers, stiffnesses, strict=True):
        turn = None if period is None else period / (2 * math.pi)
        total = total + (0.5 * k * (value - c) ** 2 if turn is None else k * turn**2 * (1 - ((value - c) / turn).cos()))
    return total


@pytest.mark.parametrize("box", [None, BOX], ids=["free", "triclinic"])
def test_restraints_are_their_energy(box: np.ndarray | None, generator: torch.Generator) -> None:
    periodic = ForceVariable("length", bond(), n_particles=N, period=0.7, unit="nm")
    cvs = CollectiveVariables([*variables(box), periodic])
    x = configurations(generator)
    centers = torch.randn(len(cvs), generator=generator, dtype=torch.float64)
    stiffnesses = 10 * torch.rand(len(cvs), generator=generator, dtype=torch.float64)
    forces = restraint_forces(cvs, group=7)
    assert [type(force).__name__ for force in forces] == ["CustomBondForce", "CustomAngleForce", "CustomTorsionForce", "CustomCVForce"]
    assert {force.getForceGroup() for force in forces} == {7}
    names = {center_name(k): c for k, c in enumerate(centers.tolist())} | {stiffness_name(k): c for k, c in enumerate(stiffnesses.tolist())}
    assert_same(energy_of(cvs, x, centers, stiffnesses), x, forces, box=box, **names)


def test_restraints_are_off_at_first_and_named_by_their_variable(generator: torch.Generator) -> None:
    assert (center_name(3), stiffness_name(0)) == ("boltzgen_center_3", "boltzgen_stiffness_0")
    energies, _ = reference(
        restraint_forces(CollectiveVariables(variables(None)), group=0), configurations(generator).detach(), box=None, parameters={}
    )
    assert energies.abs().max() == 0


def test_more_variables_than_one_force_may_hold(generator: torch.Generator) -> None:
    cvs = CollectiveVariables(RadiusOfGyration(f"rg{k}", (k % N, (k + 1 + k // N) % N)) for k in range(40))
    forces, x = restraint_forces(cvs, group=0), configurations(generator)
    assert [force.getNumCollectiveVariables() for force in forces] == [32, 8]
    ones = torch.ones(40, dtype=torch.float64)
    assert_same(energy_of(cvs, x, 0 * ones, ones), x, forces, box=None, **{stiffness_name(k): 1.0 for k in range(40)})


def test_terms_of_one_kind_share_a_force() -> None:
    dihedrals = [Dihedral(f"d{k}", (k, k + 1, k + 2, k + 3)) for k in range(5)]
    learned = Combination("learned", [f(d) for d in dihedrals for f in (Cosine, Sine)], np.arange(10.0))
    assert cv_force(learned).getNumCollectiveVariables() == 2


class Mirrored(Dihedral):
    """Of the other sign."""

    def _value(self, x: Tensor) -> Tensor:
        return -super()._value(x)


class Degrees(Angle):
    """In the wrong unit."""

    def _value(self, x: Tensor) -> Tensor:
        return torch.rad2deg(super()._value(x))


class AsItLies(RMSD):
    """Without the superposition."""

    def _value(self, x: Tensor) -> Tensor:
        reference = torch.as_tensor(self.reference)[list(self.atoms)]
        return (self._positions(x) - reference).square().sum(-1).mean(-1).sqrt()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (Mirrored("phi", (0, 4, 2, 8)), Dihedral("phi", (0, 4, 2, 8))),
        (Degrees("a", (1, 2, 5)), Angle("a", (1, 2, 5))),
        (AsItLies("r", (0, 1, 3), reference=REFERENCE), RMSD("r", (0, 1, 3), reference=REFERENCE)),
        (RadiusOfGyration("rg", (1, 3, 5)), RadiusOfGyration("rg", (1, 3, 5), masses=[1, 12, 16])),
        (Distance("d", (0, 3)), Distance("d", (0, 3), box=BOX)),
        (Coordination("c", (0, 1, 2), (4, 5), r0=0.8, n=4), Coordination("c", (0, 1, 2), (4, 5), r0=0.8)),
    ],
    ids=["sign", "degrees", "not superposed", "not weighted", "not periodic", "exponent"],
)  # fmt: skip
def test_wrong_twins_are_caught(wrong: CollectiveVariable, right: CollectiveVariable, generator: torch.Generator) -> None:
    x = configurations(generator)
    assert_same(right(x), x, [cv_force(right)], box=BOX)
    with pytest.raises(AssertionError):
        assert_same(wrong(x), x, [cv_force(right)], box=BOX)


def test_a_harmonic_restraint_of_an_angle_that_goes_around_is_caught(generator: torch.Generator) -> None:
    cvs, x = CollectiveVariables([Dihedral("phi", (0, 4, 2, 8))]), configurations(generator)
    with pytest.raises(AssertionError):
        assert_same(0.5 * (cvs(x)[:, 0] - 2.0) ** 2, x, restraint_forces(cvs, group=0), box=None,
                    boltzgen_center_0=2.0, boltzgen_stiffness_0=1.0)  # fmt: skip


def test_an_unknown_variable_is_refused() -> None:
    class Height(CollectiveVariable):
        def _value(self, x: Tensor) -> Tensor:
            return x[:, 0, 2]

    with pytest.raises(InputError, match="'z' is a Height, which boltzgen cannot express"):
        cv_force(Height("z", (0,)))


def test_a_force_variable_survives_pickling_and_copying(generator: torch.Generator) -> None:
    cv, x = ForceVariable("product", product(), n_particles=N), configurations(generator).detach()
    value = cv(x)
    for twin in (pickle.loads(pickle.dumps(cv)), copy.deepcopy(cv)):
        torch.testing.assert_close(twin(x), value)
    assert cv(x.float()).dtype == torch.float32


def test_a_force_variable_names_the_row_that_it_cannot_compute(generator: torch.Generator) -> None:
    x = configurations(generator).detach()
    x[3, 0] = math.nan
    with pytest.raises(EnergyError, match="'r' cannot be computed in row 3"):
        ForceVariable("r", bond(), n_particles=N)(x)


def test_force_variables_that_do_not_fit_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(InputError, match="for a system of 3 particles"):
        ForceVariable("theta", torsion(), n_particles=3)
    with pytest.raises(InputError, match="made for 4 particles, got configurations of 9"):
        ForceVariable("theta", torsion(), n_particles=4)(configurations(generator))
    periodic = bond()
    periodic.setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(InputError, match="was given no box"):
        ForceVariable("r", periodic, n_particles=N)


class LikeCvpack(openmm.CustomTorsionForce):
    """What is used of a cvpack object: its name, its unit and its periodic bounds."""

    def __init__(self) -> None:
        super().__init__("theta")
        self.addTorsion(0, 1, 2, 3)
        self.setName("torsion")

    def getUnit(self) -> unit.Unit:
        return unit.radian

    def getPeriodicBounds(self) -> unit.Quantity | None:
        return unit.Quantity((-math.pi, math.pi), unit.radian)

    def __deepcopy__(self, memo: dict) -> LikeCvpack:
        raise AssertionError("cvpack objects copy themselves through YAML")


def test_cvpack_objects_are_variables(generator: torch.Generator) -> None:
    cv, x = variable_of_cvpack(LikeCvpack(), n_particles=N), configurations(generator).detach()
    assert (cv.name, cv.unit, cv.period) == ("torsion", "rad", pytest.approx(2 * math.pi))
    torch.testing.assert_close(cv(x), Dihedral("phi", (0, 1, 2, 3))(x))
    with pytest.raises(InputError, match="CustomBondForce, which lacks getUnit, getPeriodicBounds"):
        variable_of_cvpack(bond(), n_particles=N)
