"""The density of constrained dynamics: the determinant identity, and the dynamics itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.core import Molecule, Target
from boltzgen.errors import TopologyError
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.transforms.internal import LOG_FRAME, InternalCoordinates
from boltzgen.transforms.zmatrix import build_zmatrix
from tests import molecules
from tests.assertions import assert_z
from tests.test_internal import EULER_BETA, random_q, rotation


class Springs(Target):
    """u = ½ T₀/T Σ |x|²."""

    def __init__(self, n: int, *, temperature_kelvin: float = 300.0) -> None:
        self.event_shape = (n, 3)
        self.labels = tuple("H" * n)
        self.is_exact = False
        self.temperature_kelvin = temperature_kelvin

    def reduced_potential(self, x: Tensor) -> Tensor:
        return 150.0 / self.temperature_kelvin * x.to(torch.float64).square().sum((1, 2))

    def at(self, temperature_kelvin: float) -> Springs:
        return Springs(self.event_shape[0], temperature_kelvin=temperature_kelvin)


class WithoutMetric(ConstrainedTarget):
    """Mutant: the Fixman factor forgotten."""

    def metric_potential(self, x: Tensor) -> Tensor:
        return 0 * super().metric_potential(x)


class WithFlippedMetric(ConstrainedTarget):
    """Mutant: the Fixman factor inverted."""

    def metric_potential(self, x: Tensor) -> Tensor:
        return -super().metric_potential(x)


def methylamine_like() -> Molecule:
    """Clusters of one, two and three constraints; the bond that joins the first two clusters is free."""
    rigid = {(0, 3): 0.109, (0, 4): 0.109, (0, 5): 0.109, (6, 1): 0.101, (1, 7): 0.101, (2, 8): 0.096}
    return molecules.graph("CNOHHHHHH", [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 6), (1, 7), (2, 8)], constraints=rigid)


def check_determinant_identity(kind: type[ConstrainedTarget], molecule: Molecule, generator: torch.Generator) -> None:
    """½ ln det(∂x/∂yᵀ M ∂x/∂y) = log_det − ln 8π² + ln sin β + ½ ln det H + 3/2 Σ ln m, y = (translation, Euler angles, q)."""
    transform = InternalCoordinates(build_zmatrix(molecule))
    target = kind(Springs(molecule.n_atoms), molecule)
    mass = torch.from_numpy(molecule.masses).repeat_interleave(3)

    def complete(y: Tensor) -> Tensor:
        return (transform(y[6:].unsqueeze(0))[0][0] @ rotation(y[3:6]).T + y[:3]).flatten()

    for q in random_q(transform, 3, generator):
        y = torch.cat([torch.tensor([0.1, 0.2, 0.3, 0.5, EULER_BETA, -1.0], dtype=torch.float64), q])
        jacobian = torch.autograd.functional.jacobian(complete, y)
        metric = jacobian.T @ (mass.unsqueeze(1) * jacobian)
        x, log_det = transform(q.unsqueeze(0))
        fixman = -(target.reduced_potential(x) - target.target.reduced_potential(x))[0]
        expected = log_det[0] - LOG_FRAME + math.log(math.sin(EULER_BETA)) + fixman + 0.5 * mass.log().sum()
        torch.testing.assert_close(0.5 * torch.linalg.slogdet(metric).logabsdet, expected, atol=1e-7, rtol=0)


def test_determinant_identity(generator: torch.Generator) -> None:
    check_determinant_identity(ConstrainedTarget, methylamine_like(), generator)
    check_determinant_identity(ConstrainedTarget, molecules.read("capped_serine", constrain_hydrogens=True)[0], generator)
    for mutant in (WithoutMetric, WithFlippedMetric):
        with pytest.raises(AssertionError):
            check_determinant_identity(mutant, methylamine_like(), generator)


def test_values_and_gradients_agree(generator: torch.Generator) -> None:
    molecule = methylamine_like()
    target = ConstrainedTarget(Springs(9), molecule)
    x = InternalCoordinates(build_zmatrix(molecule))(random_q(InternalCoordinates(build_zmatrix(molecule)), 4, generator))[0]
    u, gradient = target.value_and_grad(x)
    torch.testing.assert_close(u, target.reduced_potential(x))
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(target.reduced_potential(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(target.metric_potential, (leaf,))
    torch.testing.assert_close(target.metric_potential(x[1:2]), target.metric_potential(x)[1:2])


def test_two_bonds_on_one_atom_by_hand() -> None:
    molecule = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): 0.1, (2, 0): 0.1})
    theta = 1.3
    x = 0.1 * torch.tensor([[[0, 0, 0], [1, 0, 0], [math.cos(theta), math.sin(theta), 0]]], dtype=torch.float64)
    oxygen, hydrogen = 1 / molecule.masses[0], 1 / molecule.masses[1]
    expected = -0.5 * math.log((oxygen + hydrogen) ** 2 - (oxygen * math.cos(theta)) ** 2)
    assert ConstrainedTarget(Springs(3), molecule).metric_potential(x).item() == pytest.approx(expected, rel=1e-12)


def test_other_temperatures_keep_the_metric() -> None:
    molecule = methylamine_like()
    target = ConstrainedTarget(Springs(9), molecule)
    x = torch.randn(3, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hot = target.at(600.0)
    torch.testing.assert_close(hot.reduced_potential(x), target.target.reduced_potential(x) / 2 + target.metric_potential(x))
    both = target.reduced_potentials(x, [300.0, 600.0])
    torch.testing.assert_close(both, torch.stack([target.reduced_potential(x), hot.reduced_potential(x)]))


def test_attributes_are_those_of_the_target() -> None:
    inner = Springs(9)
    target = ConstrainedTarget(inner, methylamine_like())
    assert (target.event_shape, target.labels, target.is_exact, target.log_z) == (inner.event_shape, inner.labels, False, None)


def test_without_constraints_nothing_changes() -> None:
    molecule = molecules.water()
    target, x = ConstrainedTarget(Springs(3), molecule), torch.ones(2, 3, 3)
    assert torch.equal(target.reduced_potential(x), Springs(3).reduced_potential(x))
    assert torch.equal(target.value_and_grad(x)[1], Springs(3).value_and_grad(x)[1])


def test_impossible_constraints_are_refused() -> None:
    twice = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): 0.1, (1, 0): 0.1})
    with pytest.raises(TopologyError, match="constrained twice"):
        ConstrainedTarget(Springs(3), twice)
    rigid = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): 0.1})
    massless = Molecule(rigid.elements, rigid.bonds, np.zeros(3), rigid.names, rigid.constraints, rigid.constraint_lengths)
    with pytest.raises(TopologyError, match="atom 0 is constrained but has no mass"):
        ConstrainedTarget(Springs(3), massless)


# A molecule H–X–H with both bonds rigid, a light centre (the metric factor then matters) and a soft angle, against dynamics.

KT = 2.494338785445972  # kJ/mol at 300 K
ANGLE_STIFFNESS, ANGLE_0 = 2.0, 1.6  # kJ/mol/rad², rad
CENTRE_MASS, END_MASS, BOND = 2.0, 10.0, 0.1


def simulated_cosines(n_molecules: int, n_frames: int) -> np.ndarray:
    """cos θ of independent copies of the molecule under constrained Langevin dynamics, ``[frames, molecules]``."""
    import openmm

    system, angle = openmm.System(), openmm.HarmonicAngleForce()
    start = []
    for m in range(n_molecules):
        for mass in (CENTRE_MASS, END_MASS, END_MASS):
            system.addParticle(mass)
        system.addConstraint(3 * m, 3 * m + 1, BOND)
        system.addConstraint(3 * m, 3 * m + 2, BOND)
        angle.addAngle(3 * m + 1, 3 * m, 3 * m + 2, ANGLE_0, ANGLE_STIFFNESS)
        start += [(0, 0, 0), (BOND, 0, 0), (BOND * math.cos(ANGLE_0), BOND * math.sin(ANGLE_0), 0)]
    system.addForce(angle)
    integrator = openmm.LangevinMiddleIntegrator(300, 20, 0.002)
    integrator.setConstraintTolerance(1e-8)
    integrator.setRandomNumberSeed(11)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(start)
    context.setVelocitiesToTemperature(300, 5)
    integrator.step(2000)
    cosines = []
    for _ in range(n_frames):
        integrator.step(100)
        r = context.getState(getPositions=True).getPositions(asNumpy=True)._value.reshape(n_molecules, 3, 3)
        cosines.append(((r[:, 1] - r[:, 0]) * (r[:, 2] - r[:, 0])).sum(1) / BOND**2)
    return np.array(cosines)


class SoftAngle(Target):
    """The energy of one such molecule in kT."""

    event_shape = (3, 3)

    def reduced_potential(self, x: Tensor) -> Tensor:
        left, right = x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]
        angle = torch.atan2(torch.linalg.cross(left, right).norm(dim=-1), (left * right).sum(-1))
        return 0.5 * ANGLE_STIFFNESS / KT * (angle - ANGLE_0).square()


def check_angle_distribution(kind: type[ConstrainedTarget], cosines: np.ndarray) -> None:
    """Means of cos θ and cos² θ against the quadrature of exp(−u) exp(log_det) over the one free coordinate."""
    graph = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): BOND, (0, 2): BOND})
    masses = np.array([CENTRE_MASS, END_MASS, END_MASS])
    molecule = Molecule(graph.elements, graph.bonds, masses, graph.names, graph.constraints, graph.constraint_lengths)
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)[1:-1].unsqueeze(1)
    x, log_det = InternalCoordinates(build_zmatrix(molecule))(theta)
    weight = torch.exp(log_det - kind(SoftAngle(), molecule).reduced_potential(x))
    for power in (1, 2):
        exact = float((weight * theta[:, 0].cos() ** power).sum() / weight.sum())
        per_molecule = (cosines**power).mean(axis=0)
        assert_z(per_molecule.mean(), exact, per_molecule.std(ddof=1) / math.sqrt(len(per_molecule)))


@pytest.mark.slow
def test_constrained_dynamics_samples_the_density_with_the_metric_factor() -> None:
    cosines = simulated_cosines(100, 500)
    check_angle_distribution(ConstrainedTarget, cosines)
    for mutant in (WithoutMetric, WithFlippedMetric):
        with pytest.raises(AssertionError):
            check_angle_distribution(mutant, cosines)
