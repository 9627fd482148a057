"""Collective variables against mdtraj, their gradients and refusals."""

from __future__ import annotations

import math

import mdtraj
import numpy as np
import pytest
import torch

from boltzgen.cvs import Angle, CollectiveVariable, Dihedral, Distance, build_cv
from boltzgen.errors import ConfigError, ShapeError

REFERENCES = {"distance": mdtraj.compute_distances, "angle": mdtraj.compute_angles, "dihedral": mdtraj.compute_dihedrals}
ATOMS = {"distance": (3, 0), "angle": (4, 1, 2), "dihedral": (0, 3, 1, 4)}


def configurations(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(200, 5, 3, generator=generator, dtype=torch.float64)


def agree_with_mdtraj(cv: CollectiveVariable, kind: str, x: torch.Tensor) -> None:
    trajectory = mdtraj.Trajectory(x.numpy(), topology=None)
    expected = REFERENCES[kind](trajectory, np.array([cv.atoms]), periodic=False, opt=False)[:, 0]
    difference = cv(x).numpy() - expected
    if cv.period is not None:
        difference = (difference + cv.period / 2) % cv.period - cv.period / 2
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize("kind", REFERENCES)
def test_values_agree_with_mdtraj(kind: str, generator: torch.Generator) -> None:
    agree_with_mdtraj(build_cv("cv", kind, ATOMS[kind]), kind, configurations(generator))


def test_a_dihedral_of_the_other_sign_is_caught(generator: torch.Generator) -> None:
    class Mirrored(Dihedral):
        def _value(self, x: torch.Tensor) -> torch.Tensor:
            return -super()._value(x)

    with pytest.raises(AssertionError):
        agree_with_mdtraj(Mirrored("cv", ATOMS["dihedral"]), "dihedral", configurations(generator))


@pytest.mark.parametrize("kind", REFERENCES)
def test_gradients_are_those_of_finite_differences(kind: str, generator: torch.Generator) -> None:
    x = configurations(generator)[:5].requires_grad_(True)
    assert torch.autograd.gradcheck(build_cv("cv", kind, ATOMS[kind]), (x,))


def test_a_trans_dihedral_is_minus_pi_with_the_right_gradient() -> None:
    dihedral = Dihedral("omega", (0, 1, 2, 3))
    trans = torch.tensor([[[0.0, 1, 0], [0, 0, 0], [1, 0, 0], [1, -1, 0]]], dtype=torch.float64)
    assert dihedral(trans).item() == -math.pi
    tilted = trans.clone()
    tilted[0, 3, 2] = 1e-4
    leaf = trans.requires_grad_(True)
    dihedral(leaf).sum().backward()
    change = (dihedral(tilted).item() + math.pi + math.pi) % (2 * math.pi) - math.pi
    assert change / 1e-4 == pytest.approx(leaf.grad[0, 3, 2].item(), rel=1e-4)


def test_units_and_periods() -> None:
    assert (Distance.unit, Distance.period) == ("nm", None)
    assert (Angle.unit, Angle.period) == ("rad", None)
    assert (Dihedral.unit, Dihedral.period) == ("rad", 2 * math.pi)


def test_precision_follows_the_coordinates() -> None:
    assert Distance("d", (0, 1))(torch.zeros(2, 3, 3)).dtype == torch.float32


def test_bad_atoms_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match=r"angle 'bend' takes 3 atoms, got \[0, 1\]"):
        Angle("bend", (0, 1))
    with pytest.raises(ConfigError, match="different atoms"):
        Dihedral("phi", (0, 1, 1, 2))
    with pytest.raises(ConfigError, match="counted from 0"):
        Distance("d", (-1, 2))
    with pytest.raises(ConfigError, match="expected one of distance, angle, dihedral"):
        build_cv("rg", "gyration", (0, 1))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"atoms \[0, 5\].*got coordinates \[200, 5, 3\]"):
        Distance("d", (0, 5))(configurations(generator))
