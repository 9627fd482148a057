"""Collective variables against mdtraj and against their definitions, their gradients and refusals."""

from __future__ import annotations

import itertools
import math

import mdtraj
import numpy as np
import pytest
import torch
from mdtraj.core.element import carbon

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
from boltzgen.errors import ConfigError, ShapeError

REFERENCES = {"distance": mdtraj.compute_distances, "angle": mdtraj.compute_angles, "dihedral": mdtraj.compute_dihedrals}
INTERNALS = {
    "distance": Distance("cv", (3, 0)),
    "angle": Angle("cv", (4, 1, 2)),
    "dihedral": Dihedral("cv", (0, 3, 1, 4)),
}
BOX = np.array([[1.5, 0.0, 0.0], [0.3, 1.4, 0.0], [-0.2, 0.5, 1.3]])
RECTANGLE = np.diag([1.5, 1.4, 1.3])


def configurations(generator: torch.Generator, n_atoms: int = 5) -> torch.Tensor:
    return torch.randn(200, n_atoms, 3, generator=generator, dtype=torch.float64)


def agree_with_mdtraj(cv: CollectiveVariable, kind: str, x: torch.Tensor) -> None:
    trajectory = mdtraj.Trajectory(x.numpy(), topology=None)
    expected = REFERENCES[kind](trajectory, np.array([cv.atoms]), periodic=False, opt=False)[:, 0]
    difference = cv(x).numpy() - expected
    if cv.period is not None:
        difference = (difference + cv.period / 2) % cv.period - cv.period / 2
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize("kind", REFERENCES)
def test_values_agree_with_mdtraj(kind: str, generator: torch.Generator) -> None:
    agree_with_mdtraj(INTERNALS[kind], kind, configurations(generator))


def test_a_dihedral_of_the_other_sign_is_caught(generator: torch.Generator) -> None:
    class Mirrored(Dihedral):
        def _value(self, x: torch.Tensor) -> torch.Tensor:
            return -super()._value(x)

    with pytest.raises(AssertionError):
        agree_with_mdtraj(Mirrored("cv", (0, 3, 1, 4)), "dihedral", configurations(generator))


@pytest.mark.parametrize(
    "cv",
    [
        *INTERNALS.values(),
        Distance("d", (0, 1), box=BOX),
        RadiusOfGyration("rg", (0, 2, 3), masses=[1.0, 12.0, 16.0]),
        RMSD("rmsd", (0, 2, 3, 4), reference=np.random.default_rng(1).normal(size=(5, 3))),
        Coordination("c", (0, 1), (2, 4), r0=1.1, n=4, m=6),
        Combination("s", [Cosine(INTERNALS["dihedral"]), Sine(INTERNALS["dihedral"]), INTERNALS["distance"]], [0.4, -2.0, 0.7]),
    ],
    ids=lambda cv: type(cv).__name__,
)
def test_gradients_are_those_of_finite_differences(cv: CollectiveVariable, generator: torch.Generator) -> None:
    x = configurations(generator)[:5].requires_grad_(True)
    assert torch.autograd.gradcheck(cv, (x,))
    assert torch.autograd.gradgradcheck(cv, (x,))


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


@pytest.mark.parametrize(("box", "reach"), [(RECTANGLE, math.inf), (BOX, 0.5 * 1.1)])
def test_distances_of_nearest_images_are_the_smallest_of_all(box: np.ndarray, reach: float, generator: torch.Generator) -> None:
    """In a leaning box, of all distances below half its smallest width; the rule of OpenMM promises no more."""
    x = configurations(generator)
    shifts = torch.tensor(list(itertools.product(range(-9, 10), repeat=3)), dtype=torch.float64) @ torch.from_numpy(box)
    smallest = ((x[:, 1] - x[:, 0])[:, None] + shifts).norm(dim=-1).min(1).values
    near = smallest < reach
    assert int(near.sum()) > 20
    found = Distance("d", (0, 1), box=box)(x)
    torch.testing.assert_close(found[near], smallest[near])
    assert not torch.allclose(Distance("d", (0, 1))(x)[near], smallest[near])


def test_the_end_to_end_distance_is_that_of_the_first_and_the_last_atom(generator: torch.Generator) -> None:
    x = configurations(generator)
    torch.testing.assert_close(Distance.between_ends("ends", (1, 2, 4, 3))(x), (x[:, 3] - x[:, 1]).norm(dim=-1))


@pytest.mark.parametrize("masses", [None, [1.0, 12.0, 16.0, 3.0]])
def test_the_radius_of_gyration_follows_from_all_distances(masses: list[float] | None, generator: torch.Generator) -> None:
    """Lagrange: Σ m_i |x_i − x̄|² / M = Σ_{i<j} m_i m_j r_ij² / M²."""
    x, atoms = configurations(generator), (0, 1, 3, 4)
    m = np.ones(4) if masses is None else np.array(masses)
    squared = sum(m[i] * m[j] * (x[:, atoms[i]] - x[:, atoms[j]]).square().sum(-1) for i, j in itertools.combinations(range(4), 2))
    expected = (squared / m.sum() ** 2).sqrt()
    torch.testing.assert_close(RadiusOfGyration("rg", atoms, masses=masses)(x), expected)
    other = [16.0, 1.0, 3.0, 12.0]
    assert not torch.allclose(RadiusOfGyration("rg", atoms, masses=other)(x), expected, atol=1e-3)


def kabsch(x: np.ndarray, reference: np.ndarray) -> float:
    """RMSD by singular values, the independent route."""
    moved, fixed = x - x.mean(0), reference - reference.mean(0)
    left, values, right = np.linalg.svd(moved.T @ fixed)
    values[-1] *= np.sign(np.linalg.det(left @ right))
    return math.sqrt((np.sum(moved**2) + np.sum(fixed**2) - 2 * values.sum()) / len(x))


def test_the_rmsd_is_that_of_the_best_superposition(generator: torch.Generator) -> None:
    x, atoms = configurations(generator, 6), (0, 1, 3, 4, 5)
    reference = configurations(generator, 6)[0].numpy()
    found = RMSD("rmsd", atoms, reference=reference)(x)
    expected = [kabsch(row[list(atoms)], reference[list(atoms)]) for row in x.numpy()]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for _ in range(6):
        topology.add_atom("C", carbon, residue)
    frames, target = (mdtraj.Trajectory(rows, topology) for rows in (x.numpy(), reference[None]))
    np.testing.assert_allclose(found.numpy(), mdtraj.rmsd(frames, target, atom_indices=list(atoms)), atol=1e-4)
    as_they_lie = (x[:, atoms] - torch.from_numpy(reference[list(atoms)])).square().sum(-1).mean(-1).sqrt()
    assert not torch.allclose(found, as_they_lie, atol=0.1)


def test_the_rmsd_of_a_moved_reference_is_zero_and_its_gradient_too(generator: torch.Generator) -> None:
    reference = configurations(generator)[0]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    turn *= torch.linalg.det(turn)
    x = torch.stack([reference, reference @ turn + 0.7, reference * torch.tensor([1.0, 1.0, -1.0])]).requires_grad_(True)
    values = RMSD("rmsd", range(5), reference=reference.numpy())(x)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert values[:2].max() < 1e-7
    assert values[2] > 0.1  # a mirror image cannot be superposed
    assert gradient[:1].abs().max() == 0
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("n", "m"), [(6, 12), (4, 6), (3, 7), (1, 2)])
def test_coordination_is_the_sum_of_its_switching_function(n: int, m: int, generator: torch.Generator) -> None:
    x = configurations(generator)
    q = torch.stack([(x[:, i] - x[:, j]).norm(dim=-1) for i in (0, 1) for j in (2, 3, 4)]) / 0.9
    torch.testing.assert_close(Coordination("c", (0, 1), (2, 3, 4), r0=0.9, n=n, m=m)(x), ((1 - q**n) / (1 - q**m)).sum(0))


def test_coordination_within_a_group_counts_a_pair_once(generator: torch.Generator) -> None:
    x = configurations(generator)
    apart = [Coordination("c", (i,), (j,), r0=0.9)(x) for i, j in ((0, 2), (0, 3), (2, 3))]
    torch.testing.assert_close(Coordination("c", (0, 2, 3), r0=0.9)(x), sum(apart))


@pytest.mark.parametrize(("n", "m"), [(6, 12), (3, 7)])
def test_coordination_is_smooth_at_r0(n: int, m: int) -> None:
    """There s = n/m and s' = n (n − m) / (2 m r0), by l'Hôpital."""
    x = torch.tensor([[[0.0, 0.0, 0.0], [0.3, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    value = Coordination("c", (0,), (1,), r0=0.3, n=n, m=m)(x)
    value.sum().backward()
    assert value.item() == pytest.approx(n / m)
    assert x.grad[0, 1, 0].item() == pytest.approx(n * (n - m) / (2 * m * 0.3))


def test_a_combination_is_linear(generator: torch.Generator) -> None:
    x, phi, d = configurations(generator), INTERNALS["dihedral"], INTERNALS["distance"]
    inner = Combination("inner", [Cosine(phi), Sine(phi)], [0.5, 2.0], offset=0.1)
    outer = Combination("outer", [inner, d], [3.0, -1.0], offset=1.0)
    torch.testing.assert_close(outer(x), 3.0 * (0.5 * phi(x).cos() + 2.0 * phi(x).sin() + 0.1) - d(x) + 1.0)
    assert outer.atoms == (0, 1, 3, 4)
    assert (outer.unit, Combination("sum", [d, Distance("e", (1, 2))], [1, 1]).unit) == ("1", "nm")


def test_a_vector_keeps_names_units_and_periods(generator: torch.Generator) -> None:
    x = configurations(generator)
    cvs = CollectiveVariables([Dihedral("phi", (0, 1, 2, 3)), Distance("d", (0, 4)), Coordination("c", (0,), (1, 2), r0=1.0)])
    assert cvs.names == ("phi", "d", "c")
    assert cvs.units == ("rad", "nm", "1")
    assert cvs.periods == (2 * math.pi, None, None)
    assert cvs.atoms == (0, 1, 2, 3, 4)
    assert len(cvs) == 3
    torch.testing.assert_close(cvs(x), torch.stack([cv(x) for cv in cvs], dim=1))
    assert isinstance(cvs[1:], CollectiveVariables)
    assert cvs[1:].names == ("d", "c")
    assert CollectiveVariables(())(x).shape == (200, 0)
    with pytest.raises(ConfigError, match="a name of its own, got a, a"):
        CollectiveVariables([Distance("a", (0, 1)), Distance("a", (0, 2))])


def test_units_and_periods() -> None:
    assert (Distance.unit, Distance.period) == ("nm", None)
    assert (Angle.unit, Angle.period) == ("rad", None)
    assert (Dihedral.unit, Dihedral.period) == ("rad", 2 * math.pi)


@pytest.mark.parametrize("cv", [Distance("d", (0, 1), box=BOX), RMSD("r", (0, 1, 2), reference=np.eye(3)), RadiusOfGyration("g", (0, 1))])
def test_precision_follows_the_coordinates(cv: CollectiveVariable) -> None:
    assert cv(torch.rand(2, 3, 3)).dtype == torch.float32


def test_bad_atoms_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match=r"angle 'bend' takes 3 atoms, got \[0, 1\]"):
        Angle("bend", (0, 1))
    with pytest.raises(ConfigError, match="different atoms"):
        Dihedral("phi", (0, 1, 1, 2))
    with pytest.raises(ConfigError, match="counted from 0"):
        Distance("d", (-1, 2))
    with pytest.raises(ShapeError, match=r"atoms \[0, 5\].*got coordinates \[200, 5, 3\]"):
        Distance("d", (0, 5))(configurations(generator))


def test_impossible_variables_are_refused() -> None:
    phi = Dihedral("phi", (0, 1, 2, 3))
    with pytest.raises(ConfigError, match="would jump where phi passes"):
        Combination("s", [phi], [1.0])
    with pytest.raises(ConfigError, match="a finite weight for each, got 1 terms"):
        Combination("s", [Cosine(phi)], [1.0, 2.0])
    with pytest.raises(ConfigError, match="needs an angle in rad, but 'd' is in nm"):
        Cosine(Distance("d", (0, 1)))
    with pytest.raises(ConfigError, match=r"share the atoms \[2\]"):
        Coordination("c", (0, 2), (2, 3), r0=0.3)
    with pytest.raises(ConfigError, match=r"0 < n < m, got r0 = 0\.3 nm, n = 6, m = 6"):
        Coordination("c", (0, 2), r0=0.3, m=6)
    with pytest.raises(ConfigError, match="at least three atoms"):
        RMSD("r", (0, 1), reference=np.zeros((3, 3)))
    with pytest.raises(ConfigError, match=r"up to atom 4; got \[3, 3\]"):
        RMSD("r", (0, 1, 4), reference=np.zeros((3, 3)))
    with pytest.raises(ConfigError, match="as many masses"):
        RadiusOfGyration("rg", (0, 1), masses=[1.0])
    with pytest.raises(ConfigError, match="reduced form"):
        Distance("d", (0, 1), box=BOX.T)
