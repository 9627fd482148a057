"""Maps between two states, and the loss that trains them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.core import Bridge, Chain, Context, Estimate, Inverse, Transform
from boltzgen.errors import InputError, ShapeError
from boltzgen.estimators.perturbation import acceptance_ratio, exponential_average
from boltzgen.estimators.works import Works
from boltzgen.recipes import CouplingSize, internal_coordinate_map, matched_domains
from boltzgen.targets.analytic import DoubleWell, Gaussian
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.targeted import EndState, TargetedPerturbation
from boltzgen.transforms.coupling import BoundedSplineCoupling
from boltzgen.transforms.domains import Domains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.internal_map import InternalMap, OnAtoms
from boltzgen.transforms.low_rank import LowRankAffine
from boltzgen.transforms.triangular import ConditionalTriangular
from boltzgen.transforms.zmatrix import build_zmatrix
from tests import molecules
from tests.assertions import assert_z
from tests.registry import internal_map, noise, on_atoms, seeded
from tests.test_contract_transforms import check_log_det, stir

A = Gaussian(torch.tensor([0.3, -0.2]), covariance=torch.tensor([[1.0, 0.3], [0.3, 0.5]]))
B = Gaussian(torch.tensor([-1.0, 2.0]), covariance=torch.tensor([[0.4, -0.3], [-0.3, 0.9]]))
DIFFERENCE = A.log_z - B.log_z  # type: ignore[operator]


def drawn(target: Gaussian, n: int, seed: int) -> Tensor:
    return target.sample(n, generator=seeded(seed))


def affine(*, exact: bool = False) -> ConditionalTriangular:
    """An affine map of the plane; the exact one carries A onto B."""
    mean, scale = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    if exact:
        scale = B.cholesky @ torch.linalg.inv(A.cholesky)
        mean = B.mean - scale @ A.mean
    return ConditionalTriangular(0, mean=mean, scale=scale, hidden=(), generator=seeded()).double()


def objective(n: int = 400, *, batch_size: int = 50, **weights: float) -> TargetedPerturbation:
    return TargetedPerturbation(EndState.of(A, drawn(A, n, 1)), EndState.of(B, drawn(B, n, 2)), batch_size=batch_size, **weights)


def works(transform: Transform, *, role: str = "evaluate", n: int = 500) -> tuple[Works, Works]:
    bridge = Bridge(A, B, transform)
    with torch.no_grad():
        forward, reverse = bridge.works(drawn(A, n, 11)), bridge.reverse_works(drawn(B, n, 12))
    return tuple(Works.of(w, role=role, log_det_error=transform.log_det_error) for w in (forward, reverse))  # type: ignore[return-value, arg-type]


def test_with_the_exact_map_every_work_is_the_difference() -> None:
    forward, reverse = works(affine(exact=True))
    np.testing.assert_allclose(forward.w, DIFFERENCE, atol=1e-10)
    np.testing.assert_allclose(reverse.w, -DIFFERENCE, atol=1e-10)
    assert abs(float(acceptance_ratio(forward, reverse, seed=1).difference.value) - DIFFERENCE) < 1e-10


def test_the_gradient_vanishes_row_by_row_at_the_exact_map() -> None:
    model = affine(exact=True)
    loss, numbers = objective(batch_size=1)(model, generator=seeded())
    assert all(float(g.abs().max()) < 1e-9 for g in torch.autograd.grad(loss, list(model.parameters())))
    assert numbers["forward_work"] == pytest.approx(DIFFERENCE, abs=1e-10)
    assert numbers["reverse_work"] == pytest.approx(-DIFFERENCE, abs=1e-10)


def plain_gradient(model: Transform, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of both mean works, differentiated as they stand."""
    bridge = Bridge(A, B, model)
    loss = bridge.works(x).mean() + bridge.reverse_works(y).mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_path_gradient_has_the_mean_of_the_plain_one(forgotten: bool) -> None:
    """The mutant forgets the force of the state that rows start from."""
    model = affine()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise(*parameter.shape, scale=0.2)
    n = 100_000
    a, b = (EndState.of(target, drawn(target, n, k)) for k, target in ((1, A), (2, B)))
    if forgotten:
        a = EndState(a.target, a.x, a.u, 0 * a.u_gradient)
    samples = []
    for k in range(20):
        loss, _ = TargetedPerturbation(a, b, batch_size=1000)(model, generator=seeded(k))
        samples.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    plain = []
    for k in range(20):
        rows = slice(1000 * k, 1000 * (k + 1))
        plain.append(torch.cat([g.flatten() for g in plain_gradient(model, a.x[rows], b.x[rows])]))
    path, usual = torch.stack(samples), torch.stack(plain)
    error = torch.sqrt((path.var(0) + usual.var(0)) / 20)
    z = ((path.mean(0) - usual.mean(0)).abs() / error.clamp_min(1e-12))[usual.abs().amax(0) > 0]
    assert bool((z > 8).any()) if forgotten else bool((z < 4.5).all())


def trained(loss: TargetedPerturbation) -> ConditionalTriangular:
    model = affine()
    settings = FitSettings(steps=400, learning_rate=0.03, gradient_clip=10.0, ema_decay=0.95, checkpoint_every=1000, evaluate_every=400)
    fit(model, loss, settings=settings, generator=seeded(), progress=False)
    return model


@pytest.mark.parametrize("weights", [{}, {"reverse_weight": 0.0}, {"forward_weight": 0.0}])
def test_a_learned_map_gives_the_difference(weights: dict[str, float]) -> None:
    learned = trained(objective(**weights))
    forward, reverse = works(learned)
    found = acceptance_ratio(forward, reverse, seed=1).difference
    plain = acceptance_ratio(*works(affine()), seed=1).difference
    assert float(plain.stderr) > 5 * float(found.stderr)
    assert_z(float(found.value), DIFFERENCE, float(found.stderr))
    for work, back in ((forward, False), (reverse, True)):
        one = exponential_average(work, reverse=back, seed=1)
        assert_z(float(one.value), DIFFERENCE, float(one.stderr))


def test_a_learned_map_between_double_wells_gives_the_difference_of_quadrature() -> None:
    """Two basins on either side, of other places and populations; the same works without the log determinant are wrong."""
    a, b = DoubleWell(2, barrier=4.0, width=1.0, tilt=0.5), DoubleWell(2, barrier=5.0, width=1.6, tilt=-0.7)
    truth = a.log_z - b.log_z
    model = Chain(
        BoundedSplineCoupling(2, transformed=(0,), angles=(), linear=(1,), bins=12, hidden=(8,), generator=seeded(1), compiled=False),
        ConditionalTriangular(
            0, mean=torch.zeros(2, dtype=torch.float64), scale=torch.eye(2, dtype=torch.float64), hidden=(), generator=seeded()
        ),
    ).double()
    ends = [EndState.of(state, state.sample(2000, generator=seeded(k))) for k, state in enumerate((a, b))]
    loss = TargetedPerturbation(*ends, batch_size=128)
    settings = FitSettings(steps=400, learning_rate=0.03, gradient_clip=10.0, ema_decay=0.95, checkpoint_every=1000, evaluate_every=400)
    fit(model, loss, settings=settings, generator=seeded(), progress=False)
    x, y = a.sample(2000, generator=seeded(11)), b.sample(2000, generator=seeded(12))

    def found(transform: Transform) -> Estimate:
        bridge = Bridge(a, b, transform)
        with torch.no_grad():
            pair = [Works.of(w, role="evaluate", log_det_error=0.0) for w in (bridge.works(x), bridge.reverse_works(y))]
        return acceptance_ratio(*(works.decorrelated() for works in pair), seed=1).difference

    learned, plain, wrong = found(model), found(Chain()), found(Forgetful(model))
    assert_z(float(learned.value), truth, float(learned.stderr))
    assert_z(float(plain.value), truth, float(plain.stderr))
    assert float(learned.stderr) < 0.5 * float(plain.stderr)
    with pytest.raises(AssertionError):
        assert_z(float(wrong.value), truth, float(wrong.stderr))


class Forgetful(Transform):
    """Mutant: a map that reports no Jacobian."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        return self.transform.log_det_error

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.transform(z, context)
        return x, 0 * log_det

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform.inverse(x, context)
        return z, 0 * log_det


def test_a_forgotten_jacobian_is_wrong_by_it() -> None:
    forward, reverse = works(Forgetful(affine(exact=True)))
    found = acceptance_ratio(forward, reverse, seed=1).difference
    assert abs(float(found.value) - DIFFERENCE) > 0.1
    with pytest.raises(AssertionError):
        assert_z(float(found.value), DIFFERENCE, max(float(found.stderr), 1e-3))


def test_losses_are_refused_that_cannot_be_right() -> None:
    with pytest.raises(InputError, match="weights"):
        objective(forward_weight=0.0, reverse_weight=0.0)
    x = drawn(A, 5, 1)
    with pytest.raises(ShapeError, match="one energy"):
        EndState(A, x, torch.zeros(4), x)


# --- maps of molecules


def test_a_map_of_internal_coordinates_keeps_the_placement() -> None:
    transform, x = internal_map()
    stir(transform)
    y, log_det = transform(x)
    first, second, third = (int(atom) for atom in transform.coordinates.zmatrix.rows[:3, 0])
    torch.testing.assert_close(y[:, first], x[:, first])

    def unit(v: Tensor) -> Tensor:
        return v / v.norm(dim=1, keepdim=True)

    torch.testing.assert_close(unit(y[:, second] - y[:, first]), unit(x[:, second] - x[:, first]))
    normals = [unit(torch.linalg.cross(z[:, second] - z[:, first], z[:, third] - z[:, first])) for z in (x, y)]
    torch.testing.assert_close(*normals)
    turn = torch.linalg.qr(noise(3, 3)).Q
    turn = turn * torch.linalg.det(turn)
    turned, same = transform(x @ turn + 0.7)
    torch.testing.assert_close(turned, y @ turn + 0.7)
    torch.testing.assert_close(same, log_det)
    assert not torch.allclose(y, x, atol=1e-4)


class WithoutFrame(InternalMap):
    """Mutant: counts the atoms that are placed by the first three only, as if those could not move."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, context)
        return x, log_det + self._of_frame(z) - self._of_frame(x)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().inverse(x, context)
        return z, log_det + self._of_frame(x) - self._of_frame(z)

    def _of_frame(self, x: Tensor) -> Tensor:
        q, _ = self.coordinates.inverse(x)
        bonds, angles = q[:, self.coordinates.bond_columns], q[:, self.coordinates.angle_columns]
        return 2 * bonds[:, :2].log().sum(1) + angles[:, 0].sin().log()


def test_a_frame_without_its_jacobian_is_found_out() -> None:
    transform, x = internal_map()
    check_log_det(stir(InternalMap(transform.coordinates, transform.transform)), x)
    with pytest.raises(AssertionError):
        check_log_det(stir(WithoutFrame(transform.coordinates, transform.transform)), x)


def test_carried_atoms_stay() -> None:
    transform, x = on_atoms()
    y, _ = stir(transform)(x)
    assert torch.equal(y[:, [0, 4]], x[:, [0, 4]])
    with pytest.raises(ShapeError, match="8, 3"):
        transform(x[:, :7])
    for atoms in ((), (1, 1), (8,), (-1,)):
        with pytest.raises(InputError, match="different atom indices"):
            OnAtoms(transform.transform, atoms=atoms, n_atoms=8)


def test_constrained_bonds_are_not_mapped() -> None:
    molecule = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): 0.1, (0, 2): 0.1})
    with pytest.raises(InputError, match="constraints=None"):
        InternalMap(InternalCoordinates(build_zmatrix(molecule)), Chain())


def test_the_map_of_a_molecule_starts_as_shift_and_scale() -> None:
    molecule = molecules.methanol()
    coordinates, q = molecules_q()
    warmer = q.mean(0) + 1.5 * (q - q.mean(0)) + 0.01
    x, y = coordinates(q)[0], coordinates(warmer)[0]
    a, b = matched_domains(molecule, [x.numpy(), y.numpy()])
    size = CouplingSize(torsion_layers=2, torsion_bins=4, stiff_layers=2, stiff_bins=4, hidden=(8,), compiled=False)
    made = internal_coordinate_map(molecule, a, b, size=size, generator=seeded())
    standardised, _ = made.fixed_a.inverse(x)
    torch.testing.assert_close(made.learned(standardised)[0], standardised)
    moved, log_det = made.transform(x)
    found, _ = coordinates.inverse(moved)
    torch.testing.assert_close(found[:, coordinates.bond_columns].mean(0), warmer[:, coordinates.bond_columns].mean(0), atol=1e-3, rtol=0)
    plain = internal_coordinate_map(molecule, a, b, size=None, generator=seeded())
    torch.testing.assert_close(plain.transform(x)[0], moved)
    composed = Chain(Inverse(made.fixed_a), made.learned, made.fixed_b)
    torch.testing.assert_close(composed(x)[1], log_det, atol=1e-9, rtol=0)
    assert math.isfinite(float(log_det.detach().sum()))
    other = _with_a_soft_angle_less(b)
    with pytest.raises(InputError, match="matched_domains"):
        internal_coordinate_map(molecule, a, other, size=None, generator=seeded())


def molecules_q() -> tuple[InternalCoordinates, Tensor]:
    transform = InternalCoordinates(build_zmatrix(molecules.methanol()))
    q = torch.full((300, transform.n_internal), 0.1, dtype=torch.float64)
    q[:, transform.angle_columns] = 1.9
    q[:, transform.torsion_columns] = torch.tensor([0.4, 2.1, -2.0], dtype=torch.float64)
    return transform, q + noise(*q.shape, scale=0.01)


def _with_a_soft_angle_less(domains: Domains) -> Domains:
    return replace(domains, soft=domains.soft[:-1], fold=domains.fold[:-1])


def test_a_low_rank_map_learns_the_few_directions_in_which_two_states_differ() -> None:
    """30 coordinates that differ in two directions: works get several times narrower, and a Jacobian that is dropped is seen."""
    n, generator = 30, seeded(5)
    directions = torch.linalg.qr(torch.randn(n, 2, generator=generator, dtype=torch.float64))[0]
    a = Gaussian(torch.zeros(n), covariance=torch.eye(n))
    b = Gaussian(
        2.0 * directions[:, 0], covariance=torch.eye(n) + directions @ torch.diag(torch.tensor([3.0, -0.8])).double() @ directions.T
    )
    model = LowRankAffine(0, n, rank=4, generator=seeded(6))
    ends = [EndState.of(target, target.sample(500, generator=seeded(7 + k))) for k, target in enumerate((a, b))]
    x, y = (target.sample(1000, generator=seeded(17 + k)) for k, target in enumerate((a, b)))

    def overlap(made: Transform) -> tuple[Estimate, float]:
        bridge = Bridge(a, b, made)
        with torch.no_grad():
            pair = [Works.of(w, role="evaluate", log_det_error=0.0) for w in (bridge.works(x), bridge.reverse_works(y))]
        found = acceptance_ratio(*pair, seed=1)
        return found.difference, found.overlap

    _, before = overlap(Chain())
    settings = FitSettings(
        steps=300, learning_rate=2e-2, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=1000, evaluate_every=1000
    )  # fmt: skip
    fit(model, TargetedPerturbation(*ends, batch_size=64), settings=settings, generator=seeded(), progress=False)
    found, after = overlap(model)
    assert before < 0.55
    assert after > 0.9
    truth = float(a.log_z) - float(b.log_z)  # type: ignore[arg-type]
    assert_z(float(found.value), truth, float(found.stderr))

    wrong, _ = overlap(Forgetful(model))
    assert abs(float(wrong.value) - truth) > 8 * float(wrong.stderr)
