"""Internal coordinates: round trips, the Jacobian with its frame, domains and gradients."""

from __future__ import annotations

import math

import mdtraj
import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.errors import DomainError, ShapeError, TopologyError
from boltzgen.transforms.internal import LOG_FRAME, InternalCoordinates, _Generations, _Placement
from boltzgen.transforms.zmatrix import ZMatrix, build_zmatrix
from tests import molecules
from tests.assertions import assert_z
from tests.test_zmatrix import MOLECULES

EULER_BETA = 0.7


def random_q(transform: InternalCoordinates, n: int, generator: torch.Generator) -> Tensor:
    """Internal coordinates anywhere inside their domain."""
    uniform = torch.rand(n, transform.n_internal, generator=generator, dtype=torch.float64)
    q = torch.empty_like(uniform)
    q[:, transform.bond_columns] = 0.1 + 0.1 * uniform[:, transform.bond_columns]
    q[:, transform.angle_columns] = 0.3 + (math.pi - 0.6) * uniform[:, transform.angle_columns]
    q[:, transform.torsion_columns] = math.pi * (2 * uniform[:, transform.torsion_columns] - 1)
    return q


def rotation(angles: Tensor) -> Tensor:
    """Rotation matrix of the Euler angles (α, β, γ), z–y–z; its Haar measure is dα sin β dβ dγ with the volume 8π²."""

    def about(axis: int, angle: Tensor) -> Tensor:
        one, zero, c, s = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
        rows = [[c, -s, zero], [s, c, zero], [zero, zero, one]] if axis == 2 else [[c, zero, s], [zero, one, zero], [-s, zero, c]]
        return torch.stack([torch.stack(row) for row in rows])

    alpha, beta, gamma = angles
    return about(2, alpha) @ about(1, beta) @ about(2, gamma)


def distances(x: Tensor) -> Tensor:
    return (x.unsqueeze(1) - x.unsqueeze(2)).norm(dim=-1)


def assert_same_coordinates(transform: InternalCoordinates, left: Tensor, right: Tensor) -> None:
    """Equal up to full turns of torsions."""
    difference = left - right
    turned = difference[:, transform.torsion_columns]
    difference[:, transform.torsion_columns] = turned - 2 * math.pi * torch.round(turned / (2 * math.pi))
    assert difference.abs().max() < 1e-9


def check_round_trip(transform: InternalCoordinates, q: Tensor) -> None:
    x, log_det = transform(q)
    moved = x @ rotation(torch.tensor([0.3, 1.1, -2.0], dtype=torch.float64)).T + torch.tensor([1.0, -2.0, 0.5])
    back, inverse_log_det = transform.inverse(moved)
    assert_same_coordinates(transform, back, q)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-8, rtol=0)
    again, _ = transform(back)
    torch.testing.assert_close(distances(again), distances(moved), atol=1e-9, rtol=0)


def check_complete_jacobian(transform: InternalCoordinates, q: Tensor) -> None:
    """ln|∂x/∂(t, α, β, γ, q)| = ln sin β + log_det − ln 8π² when no bond is constrained."""
    n = transform.zmatrix.n_atoms

    def complete(y: Tensor) -> Tensor:
        x, _ = transform(y[6:].unsqueeze(0))
        return (x[0] @ rotation(y[3:6]).T + y[:3]).flatten()

    for row in q:
        y = torch.cat([torch.tensor([0.1, 0.2, 0.3, 0.5, EULER_BETA, -1.0], dtype=torch.float64), row])
        jacobian = torch.autograd.functional.jacobian(complete, y)
        assert jacobian.shape == (3 * n, 3 * n)
        expected = torch.linalg.slogdet(jacobian).logabsdet - math.log(math.sin(EULER_BETA)) + math.log(8 * math.pi**2)
        torch.testing.assert_close(transform(row.unsqueeze(0))[1][0], expected, atol=1e-7, rtol=0)


def check_gaussian_chain(transform: InternalCoordinates, generator: torch.Generator) -> None:
    """With u = ½ Σ |bond|²/s², Z per volume is the Cartesian Gaussian (2π s²)^{3(n−1)/2}.

    Drawn exactly in q, every single weight must equal Z.
    """
    n, b, s = transform.zmatrix.n_atoms, 50, 0.15
    bonds = s * torch.randn(b, n - 1, 3, generator=generator, dtype=torch.float64).norm(dim=-1)
    angles = torch.arccos(2 * torch.rand(b, n - 2, generator=generator, dtype=torch.float64) - 1)
    torsions = math.pi * (2 * torch.rand(b, n - 3, generator=generator, dtype=torch.float64) - 1)
    maxwell = math.log(4 * math.pi) - 1.5 * math.log(2 * math.pi * s**2) + 2 * bonds.log() - 0.5 * (bonds / s).square()
    log_q = maxwell.sum(1) + (0.5 * angles.sin()).log().sum(1) - (n - 3) * math.log(2 * math.pi)
    x, log_det = transform(torch.cat([bonds, angles, torsions], dim=1))
    rows = torch.from_numpy(transform.zmatrix.rows)
    u = 0.5 * ((x[:, rows[1:, 0]] - x[:, rows[1:, 1]]) / s).square().sum((1, 2))
    log_w = -u + log_det - log_q
    torch.testing.assert_close(log_w, torch.full_like(log_w, 1.5 * (n - 1) * math.log(2 * math.pi * s**2)), atol=1e-8, rtol=0)


class WithoutFirstTerm(InternalCoordinates):
    """Mutant: b₁² b₂² sin θ₁ forgotten."""

    def forward(self, z: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z)
        first, second = self._bonds_of_frame(z)
        return x, log_det - 2 * torch.log(first * second) - torch.log(torch.sin(z[:, self.angle_columns[0]]))

    def _bonds_of_frame(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return q[:, 0], q[:, 1]


class WithoutFrameVolume(InternalCoordinates):
    """Mutant: 8π² forgotten."""

    def forward(self, z: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z)
        return x, log_det - LOG_FRAME


@pytest.mark.parametrize("name", MOLECULES)
def test_round_trip(name: str, generator: torch.Generator) -> None:
    transform = InternalCoordinates(build_zmatrix(MOLECULES[name]()))
    assert transform.n_internal == 3 * transform.zmatrix.n_atoms - 6
    check_round_trip(transform, random_q(transform, 20, generator))


@pytest.mark.parametrize("name", ["capped_proline", "capped_phenylalanine", "alanine_dipeptide_vacuum"])
def test_round_trip_of_structures_keeps_distances(name: str) -> None:
    molecule, x = molecules.read(name)
    transform = InternalCoordinates(build_zmatrix(molecule))
    again, _ = transform(transform.inverse(x)[0])
    torch.testing.assert_close(distances(again), distances(x), atol=1e-9, rtol=0)
    check_round_trip(transform, transform.inverse(x)[0])


@pytest.mark.parametrize("name", ["water", "methanol", "cyclopropane", "capped_serine", "capped_proline"])
def test_log_det_is_that_of_the_complete_map(name: str, generator: torch.Generator) -> None:
    transform = InternalCoordinates(build_zmatrix(MOLECULES[name]()))
    check_complete_jacobian(transform, random_q(transform, 2, generator))


@pytest.mark.parametrize("name", ["water", "methanol", "neopentane", "capped_phenylalanine"])
def test_weights_of_a_gaussian_chain_are_its_partition_function(name: str, generator: torch.Generator) -> None:
    check_gaussian_chain(InternalCoordinates(build_zmatrix(MOLECULES[name]())), generator)


@pytest.mark.parametrize("mutant", [WithoutFirstTerm, WithoutFrameVolume])
@pytest.mark.parametrize("name", ["water", "methanol", "capped_proline"])
def test_checks_catch_a_lost_term(mutant: type[InternalCoordinates], name: str, generator: torch.Generator) -> None:
    transform = mutant(build_zmatrix(MOLECULES[name]()))
    with pytest.raises(AssertionError):
        check_complete_jacobian(transform, random_q(transform, 1, generator))
    with pytest.raises(AssertionError):
        check_gaussian_chain(transform, generator)


def water_partition_function_by_sampling(transform: InternalCoordinates, generator: torch.Generator) -> tuple[float, float]:
    """Z of a harmonic water, sampled from a Gaussian in q: (mean weight, its standard error)."""
    mean, spread = torch.tensor([0.1, 0.1, 1.9], dtype=torch.float64), torch.tensor([0.006, 0.006, 0.15], dtype=torch.float64)
    noise = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    q = mean + 1.2 * spread * noise
    log_q = -0.5 * noise.square().sum(1) - torch.log(1.2 * spread).sum() - 1.5 * math.log(2 * math.pi)
    log_det = transform(q)[1]
    weights = torch.exp(-0.5 * ((q - mean) / spread).square().sum(1) + log_det - log_q)
    return float(weights.mean()), float(weights.std()) / math.sqrt(len(weights))


def water_partition_function_by_quadrature() -> float:
    """The same by the trapezoid rule of the textbook integral 8π² ∫ b₁² b₂² sin θ exp(−u)."""
    bond, angle = np.linspace(0.04, 0.16, 400), np.linspace(0.4, math.pi, 800)
    radial = np.trapezoid(bond**2 * np.exp(-0.5 * ((bond - 0.1) / 0.006) ** 2), bond)
    angular = np.trapezoid(np.sin(angle) * np.exp(-0.5 * ((angle - 1.9) / 0.15) ** 2), angle)
    return float(8 * math.pi**2 * radial**2 * angular)


def test_partition_function_of_water(generator: torch.Generator) -> None:
    exact = water_partition_function_by_quadrature()
    zmatrix = build_zmatrix(molecules.water())
    assert_z(*_with_exact(water_partition_function_by_sampling(InternalCoordinates(zmatrix), generator), exact))
    for mutant in (WithoutFirstTerm, WithoutFrameVolume):
        with pytest.raises(AssertionError):
            assert_z(*_with_exact(water_partition_function_by_sampling(mutant(zmatrix), generator), exact))


def _with_exact(sampled: tuple[float, float], exact: float) -> tuple[float, float, float]:
    return sampled[0], exact, sampled[1]


def test_standard_frame(generator: torch.Generator) -> None:
    transform = InternalCoordinates(build_zmatrix(molecules.methanol()))
    first, second, third = transform.zmatrix.rows[:3, 0].tolist()
    x, _ = transform(random_q(transform, 8, generator))
    assert x[:, first].abs().max() == 0
    assert x[:, second, 1:].abs().max() == 0
    assert (x[:, second, 0] > 0).all()
    assert x[:, third, 2].abs().max() == 0
    assert (x[:, third, 1] > 0).all()


def test_torsions_agree_with_mdtraj() -> None:
    molecule, x = molecules.read("capped_phenylalanine")
    transform = InternalCoordinates(build_zmatrix(molecule))
    trajectory = mdtraj.load(molecules.SYSTEMS / "capped_phenylalanine" / "topology.pdb")
    expected = mdtraj.compute_dihedrals(trajectory, transform.zmatrix.rows[transform.torsion_rows], opt=False)
    difference = transform.inverse(x)[0][:, transform.torsion_columns].numpy() - expected
    assert np.abs((difference + np.pi) % (2 * np.pi) - np.pi).max() < 1e-5


def test_gradients_are_those_of_finite_differences(generator: torch.Generator) -> None:
    for name, n in (("water", 2), ("methanol", 2), ("cyclopropane", 2), ("capped_proline", 1)):
        transform = InternalCoordinates(build_zmatrix(MOLECULES[name]()))
        q = random_q(transform, n, generator).requires_grad_(True)
        assert torch.autograd.gradcheck(transform, (q,))
        x = transform(q)[0].detach().requires_grad_(True)
        assert torch.autograd.gradcheck(transform.inverse, (x,))


def test_a_gradient_lost_at_the_atom_that_closes_a_ring_is_caught(generator: torch.Generator) -> None:
    molecule = MOLECULES["capped_proline"]()
    transform = InternalCoordinates(build_zmatrix(molecule))
    rows = transform.zmatrix.rows.tolist()
    (closing,) = [i for i, (atom, _, second, _) in enumerate(rows) if i > 2 and second in molecule.neighbours(atom)]
    q = random_q(transform, 1, generator).requires_grad_(True)
    for columns, first in ((transform.bond_columns, 1), (transform.angle_columns, 2), (transform.torsion_columns, 3)):
        lost = torch.arange(transform.n_internal) == columns[closing - first]
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(lambda q, lost=lost: transform(torch.where(lost, q.detach(), q)), (q,))


def test_atoms_are_placed_on_the_device_of_their_coordinates() -> None:
    zmatrix = build_zmatrix(molecules.methanol())
    n = zmatrix.n_atoms
    q = [torch.empty(m, 2, dtype=torch.float64, device="meta", requires_grad=True) for m in (n, n - 2, n - 3)]
    x = _Placement.apply(*q, _Generations(zmatrix).to("meta"))
    gradients = torch.autograd.grad(x.sum(), q)
    assert {x.device.type, *(gradient.device.type for gradient in gradients)} == {"meta"}


def test_gradients_are_finite_at_planar_and_wrapped_torsions() -> None:
    transform = InternalCoordinates(build_zmatrix(molecules.methanol()))
    for torsion in (0.0, math.pi, -math.pi, 7 * math.pi):
        q = torch.full((1, transform.n_internal), 0.1, dtype=torch.float64)
        q[:, transform.angle_columns], q[:, transform.torsion_columns] = 1.9, torsion
        q.requires_grad_(True)
        x, log_det = transform(q)
        back, _ = transform.inverse(x)
        (x.square().sum() + log_det.sum() + back.sum()).backward()
        assert torch.isfinite(q.grad).all()
        assert (back[:, transform.torsion_columns] < math.pi).all()
        torch.testing.assert_close(back[:, transform.torsion_columns].cos(), q[:, transform.torsion_columns].cos())


def test_rows_do_not_depend_on_their_batch(generator: torch.Generator) -> None:
    transform = InternalCoordinates(build_zmatrix(molecules.neopentane()))
    q = random_q(transform, 6, generator)
    x, log_det = transform(q)
    one, one_log_det = transform(q[2:3])
    torch.testing.assert_close(x[2:3], one, atol=1e-14, rtol=0)
    torch.testing.assert_close(log_det[2:3], one_log_det, atol=1e-12, rtol=0)


def test_float32_coordinates_are_computed_in_float64(generator: torch.Generator) -> None:
    transform = InternalCoordinates(build_zmatrix(molecules.water()))
    x, log_det = transform(random_q(transform, 2, generator).float())
    assert x.dtype == log_det.dtype == transform.inverse(x.float())[0].dtype == torch.float64


def test_constrained_bonds_are_constants(generator: torch.Generator) -> None:
    molecule, _ = molecules.read("alanine_dipeptide_vacuum", constrain_hydrogens=True)
    transform = InternalCoordinates(build_zmatrix(molecule))
    assert transform.n_internal == 3 * 22 - 6 - 12
    assert len(transform.bond_columns) == len(transform.bond_rows) == 21 - 12
    q = random_q(transform, 10, generator)
    check_round_trip(transform, q)
    placed, log_det = transform(q)
    a, b = molecule.constraints.T
    lengths = torch.from_numpy(molecule.constraint_lengths).expand(10, -1)
    torch.testing.assert_close((placed[:, a] - placed[:, b]).norm(dim=-1), lengths)
    free = InternalCoordinates(build_zmatrix(molecules.read("alanine_dipeptide_vacuum")[0]))
    torch.testing.assert_close(free.inverse(placed)[1], -log_det)
    assert torch.autograd.gradcheck(lambda q: transform(q), (q[:1].requires_grad_(True),))


def test_coordinates_outside_their_domain_are_refused_by_name(generator: torch.Generator) -> None:
    transform = InternalCoordinates(build_zmatrix(molecules.water()))
    good = torch.tensor([[0.1, 0.1, 1.8]], dtype=torch.float64)
    for column, value, match in [
        (0, -0.1, r"column 0 \(the bond 0–1\) is -0.1 in row 1.*positive length"),
        (1, 0.0, "column 1"),
        (2, 3.2, r"column 2 \(the angle 2–0–1\) is 3.2 in row 1.*inside \(0, π\)"),
        (2, -0.1, "column 2"),
        (0, math.nan, "column 0.*nan"),
    ]:
        bad = good.clone()
        bad[0, column] = value
        with pytest.raises(DomainError, match=match):
            transform(torch.cat([good, bad]))
    with pytest.raises(ShapeError, match=r"\[b, 3\]"):
        transform(good[:, :2])
    with pytest.raises(ShapeError, match=r"\[b, 3, 3\]"):
        transform.inverse(torch.zeros(2, 4, 3))


@pytest.mark.parametrize("reference", [-1, 4, 5])
def test_a_row_that_refers_to_an_atom_not_yet_placed_is_refused(reference: int) -> None:
    zmatrix = build_zmatrix(molecules.methanol())
    rows = zmatrix.rows.copy()
    rows[4, 3] = rows[reference, 0] if reference > 0 else reference
    with pytest.raises(TopologyError, match="make the Z-matrix with build_zmatrix"):
        InternalCoordinates(ZMatrix(rows, zmatrix.improper, zmatrix.chiral, zmatrix.rotor_fold, zmatrix.fixed_bond))


def test_it_has_no_state_to_save() -> None:
    assert not InternalCoordinates(build_zmatrix(molecules.water())).state_dict()
