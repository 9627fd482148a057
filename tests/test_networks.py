"""What is particular to each network of particles; what all share is in test_contract_fields.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import e3nn
import pytest
import torch
from torch import Tensor

from boltzgen.distributions import ParticleNormal
from boltzgen.networks import gradient_field
from boltzgen.networks.egnn import EGNN, _AllPairs, _Pairs
from boltzgen.networks.embedded_layer import Computed, Derivatives, EmbeddedLayer
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.hollow_field import HollowField
from boltzgen.networks.pair_scales import PairScales, PairStatistics
from boltzgen.networks.pairs import EPSILON, RadialBasis, bounded, envelope, envelope_slope, one_hot_kinds
from boltzgen.networks.radial_field import RadialField
from boltzgen.networks.tensor_field import TensorField, _paths
from tests.registry import FIELDS, egnn, gradient, hollow, noise, seeded, tensor
from tests.test_contract_fields import TIMES, check_divergence, check_symmetry, random, stir, stirred

# what fields share


def test_labels_become_rows_of_kinds() -> None:
    assert one_hot_kinds([7, -2, 7], 3).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert one_hot_kinds(None, 2).tolist() == [[1], [1]]
    with pytest.raises(TypeError):
        one_hot_kinds([0.5, 1.0], 2)  # type: ignore[list-item]


def test_the_envelope_has_three_continuous_derivatives() -> None:
    torch.testing.assert_close(envelope(torch.tensor([0.0, 0.5, 1.0, 2.0])), torch.tensor([1.0, 0.5, 0.0, 0.0]))
    inside = torch.tensor([1e-4, 0.3, 0.9, 1 - 1e-4, 1.5], dtype=torch.float64, requires_grad=True)
    derivative = envelope(inside)
    slopes = []
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), inside, create_graph=True)
        slopes.append(derivative.detach())
    torch.testing.assert_close(slopes[0], envelope_slope(inside.detach()), atol=1e-12, rtol=0)
    for slope in slopes:
        assert slope[[0, 3, 4]].abs().max() < 0.1
        assert slope[1:3].abs().min() > 0.05


def test_slopes_of_radial_functions() -> None:
    basis = RadialBasis(6, length=0.3).double()
    rho = torch.linspace(EPSILON, 9.0, 50, dtype=torch.float64).unsqueeze(-1)
    _, exact = torch.func.jvp(basis, (rho,), (torch.ones_like(rho),))
    torch.testing.assert_close(basis.slopes(rho), exact, atol=1e-12, rtol=0)
    r = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    assert float(basis.distance(r)) == pytest.approx(math.sqrt((0.5 / 0.3) ** 2 + EPSILON**2))
    for wrong in ({"n_functions": 1, "length": 1.0}, {"n_functions": 3, "length": 0.0}):
        with pytest.raises(ValueError, match="positive length"):
            RadialBasis(**wrong)


def test_bounded_features_keep_small_values_and_limit_large_ones() -> None:
    h = random(3, 8)
    torch.testing.assert_close(bounded(1e-6 * h), 1e-6 * h, atol=1e-15, rtol=0)
    assert float(bounded(1e6 * h).square().mean(-1).max()) == pytest.approx(1.0)


# radial field


def test_radial_field_of_two_particles_in_closed_form() -> None:
    """f(r) = c exp(−½ (K − 1)² (q − c_k)²) w(ρ/R) by hand, its divergence by f' from finite differences."""
    field = RadialField(2, 3, length=0.5, n_radial=5, n_times=2, reach=6.0).double()
    with torch.no_grad():
        field.weights[0, 1, 3] = 2.0

    def f(r: float) -> float:
        rho = math.hypot(r / 0.5, EPSILON)
        s = rho / 6.0
        taper = 1 - s**4 * (35 - 84 * s + 70 * s**2 - 20 * s**3)
        return 2.0 * math.cos(math.pi * 0.2) * math.exp(-0.5 * (4 * (rho / (1 + rho) - 0.75)) ** 2) * taper

    x = torch.tensor([[[0.1, 0.2, 0.3], [0.5, -0.4, 0.9]]], dtype=torch.float64)
    way = x[0, 0] - x[0, 1]
    r, step = float(way.norm()), 1e-5
    v, divergence = field.divergence(torch.tensor(0.2, dtype=torch.float64), x)
    torch.testing.assert_close(v[0], torch.stack([way, -way]) * f(r), atol=1e-12, rtol=0)
    assert float(divergence.detach()) == pytest.approx(2 * (3 * f(r) + r * (f(r + step) - f(r - step)) / (2 * step)), rel=1e-7)


def test_radial_field_ends_exactly_at_its_reach() -> None:
    field = RadialField(2, 2, length=0.5, reach=3.0)
    stir(field)
    apart = torch.tensor([0.5 * math.sqrt(9 - EPSILON**2) + shift for shift in (-1e-3, 0.0, 1e-3, 50.0)], dtype=torch.float64)
    x = torch.zeros(4, 2, 2, dtype=torch.float64)
    x[:, 0, 0] = apart
    v, divergence = field.divergence(torch.tensor(0.3), x)
    for values in (v.detach().flatten(1).abs().amax(1), divergence.detach().abs()):
        assert 0 < float(values[0]) < 1e-6
        assert values[1] < 1e-12
        assert (values[2:] == 0).all()
    with pytest.raises(ValueError, match="positive reach"):
        RadialField(2, 2, length=1.0, reach=0.0)


class WithoutSlopes(RadialBasis):
    """Mutant: radial functions that do not change with distance, for the divergence."""

    def slopes(self, distance: Tensor) -> Tensor:
        return torch.zeros_like(super().slopes(distance))


def test_a_radial_divergence_without_slopes_is_caught() -> None:
    field, x = stirred("RadialField", 4, 2)
    field.radial.__class__ = WithoutSlopes  # type: ignore[union-attr,assignment]
    with pytest.raises(AssertionError):
        check_divergence(field, x)


# embedded field


def forget(name: str) -> Callable[[EmbeddedLayer], None]:
    """Mutant: a layer whose derivatives lack one of their parts."""

    def mutate(layer: EmbeddedLayer) -> None:
        complete = layer.with_derivatives

        def without(*arguments: object) -> tuple[Computed, Derivatives]:
            computed, derivatives = complete(*arguments)  # type: ignore[arg-type]
            return computed, derivatives._replace(**{name: torch.zeros_like(getattr(derivatives, name))})

        layer.with_derivatives = without  # type: ignore[method-assign]

    return mutate


@pytest.mark.parametrize("part", ["displacement", "along", "turning", "by_vectors", "own", "by_state", "slope"])
@pytest.mark.parametrize("where", [0, 1])
def test_an_embedded_divergence_that_lacks_a_part_is_caught(part: str, where: int) -> None:
    field, x = stirred("EmbeddedField", 4, 2)
    check_divergence(field, x)
    forget(part)(field.layers[where])  # type: ignore[union-attr,arg-type,index]
    with pytest.raises(AssertionError):
        check_divergence(field, x)


def test_states_of_earlier_layers_reach_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    field, x = stirred("EmbeddedField of three layers", 4, 2)
    monkeypatch.setattr(EmbeddedLayer, "told", lambda self, by_state: torch.zeros_like(by_state))
    with pytest.raises(AssertionError):
        check_divergence(field, x)


def test_distances_of_pairs_are_averaged_over_equal_kinds() -> None:
    x = noise(200, 4, 3)
    of = PairStatistics.of(ParticleNormal.isotropic(4, 3, scale=0.5).mean_squares, x)
    distance = (x[:, 0] - x[:, 2]).norm(dim=1)
    assert float(of.base[0, 2]) == pytest.approx(2 * 3 * 0.25)
    assert float(of.data[0, 2]) == pytest.approx(float(distance.square().mean()))
    assert float(of.variance[0, 2]) == pytest.approx(float(distance.var(correction=0)))
    shared = of.shared(torch.tensor([0, 1, 0, 1])).data
    assert float(shared[0, 2]) == pytest.approx(float(of.data[0, 2]))
    assert float(shared[1, 3]) == pytest.approx(float(of.data[1, 3]))
    across = [float(of.data[i, j]) for i in (0, 2) for j in (1, 3)]
    assert [float(shared[i, j]) for i in (0, 2) for j in (1, 3)] == pytest.approx([sum(across) / 4] * 4)
    assert torch.diagonal(shared).tolist() == [0] * 4


class WithoutOwnSlopes(PairScales):
    """Mutant: functions around the own distance of a pair that do not change with it, for the divergence."""

    def forward(self, t: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = super().forward(t, distance)
        return values, torch.zeros_like(slopes)


def test_a_divergence_without_the_slopes_of_pair_scales_is_caught() -> None:
    field, x = stirred("EmbeddedField with pair scales", 4, 2)
    check_divergence(field, x)
    field.pairs.scales.__class__ = WithoutOwnSlopes  # type: ignore[union-attr,assignment]
    with pytest.raises(AssertionError):
        check_divergence(field, x)


def test_functions_of_a_pair_are_as_narrow_as_its_bond_at_the_end_and_as_wide_as_the_base_at_the_start() -> None:
    """A bond of 0.11 ± 0.003 nm: one spread is a step of less than the distance of two centres, at both ends, and slopes are exact."""
    full = torch.full((2, 2), 1.0, dtype=torch.float64)
    statistics = PairStatistics(base=0.03 * full, data=(0.11**2 + 0.003**2) * full, variance=0.003**2 * full)
    scales = PairScales(statistics, torch.tensor([0]), torch.tensor([1]), length=0.1, softening=1e-6, n_dimensions=3).double()
    for t, middle, spread in ((0.0, math.sqrt(0.03 - 0.01), math.sqrt(0.01)), (1.0, 0.11, 0.003)):
        at = [scales(torch.tensor([t]), torch.full((1, 1, 1), (middle + k * spread) / 0.1, dtype=torch.float64))[0] for k in (0, 1)]
        centres = scales.centres.double() / (scales.centres[1] - scales.centres[0])
        step = 1 / float(scales.centres[1] - scales.centres[0])
        for k, values in enumerate(at):
            torch.testing.assert_close(values[0, 0], torch.exp(-0.5 * (k * step - centres).square()), atol=1e-3, rtol=0)
    rho = torch.linspace(0.5, 2.0, 7, dtype=torch.float64).reshape(1, -1, 1)
    t = torch.tensor([0.7], dtype=torch.float64)
    values, slopes = scales(t, rho)
    _, exact = torch.func.jvp(lambda r: scales(t, r)[0], (rho,), (torch.ones_like(rho),))
    torch.testing.assert_close(slopes, exact, atol=1e-12, rtol=0)
    assert float(slopes.abs().max()) > 0.1


def test_functions_of_a_pair_between_two_ensembles_are_as_narrow_as_its_bond_all_the_way() -> None:
    """A bond of 0.11 ± 0.003 nm in one and 0.13 ± 0.004 nm in the other: its own distance is in the middle, with its own spread."""
    x0, x1 = (torch.zeros(20_000, 2, 3, dtype=torch.float64) for _ in range(2))
    for x, middle, spread, seed in ((x0, 0.11, 0.003, 1), (x1, 0.13, 0.004, 2)):
        x[:, 1, 0] = middle + spread * torch.randn(len(x), generator=seeded(seed), dtype=torch.float64)
    statistics = PairStatistics.between(x0, x1).shared(torch.tensor([0, 1]))
    scales = PairScales(statistics, torch.tensor([0]), torch.tensor([1]), length=0.1, softening=1e-6, n_dimensions=3).double()
    step = float(scales.centres[1] - scales.centres[0])
    for t, middle, variance in ((0.0, 0.11, 0.003**2), (0.5, 0.12, 0.5 * (0.003**2 + 0.004**2)), (1.0, 0.13, 0.004**2)):
        for k in (0, 1):
            rho = torch.full((1, 1, 1), (middle + k * variance**0.5) / 0.1, dtype=torch.float64)
            values, _ = scales(torch.tensor([t], dtype=torch.float64), rho)
            torch.testing.assert_close(values[0, 0], torch.exp(-0.5 * ((k - scales.centres.double()) / step).square()), atol=0.03, rtol=0)


# EGNN


class Tapered(EGNN):
    """All pairs, with the weights that a list of pairs has."""

    def _pairs(self, x: Tensor) -> _Pairs:
        distance = self.radial.distance(x.unsqueeze(2) - x.unsqueeze(1))
        return _AllPairs(envelope(distance / self.cutoff) * (1 - torch.eye(self.n_particles, dtype=x.dtype).unsqueeze(-1)))


def test_listed_pairs_give_what_all_pairs_give() -> None:
    field, x = stirred("EGNN with a cutoff", 7, 3, [0, 1, 0, 1, 1, 0, 0])
    assert 0 < field._pairs(x).weights.numel() < 3 * 7 * 6  # some pairs are left out  # type: ignore[operator,union-attr]
    listed = field.divergence(TIMES, x)
    field.__class__ = Tapered
    for ours, theirs in zip(listed, field.divergence(TIMES, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_particles_meet_smoothly_at_the_cutoff() -> None:
    field = stir(egnn(2, 3, None, cutoff=2.5))
    x = torch.zeros(4, 2, 3, dtype=torch.float64)
    x[:, 0, 0] = torch.tensor([2.0 - 1e-3, 2.0, 2.0 + 1e-3, 9.0])
    v, divergence = field.divergence(torch.tensor(0.3), x)
    for values in (v.detach().flatten(1).abs().amax(1), divergence.detach().abs()):
        assert 0 < float(values[0]) < 1e-6
        assert (values[2:] == 0).all()
    for wrong in ({"cutoff": 0.0}, {"n_layers": 0}):
        with pytest.raises(ValueError, match="positive cutoff"):
            EGNN(3, 2, length=1.0, generator=seeded(), **wrong)  # type: ignore[arg-type]


# gradient field


def test_gradient_field_is_the_gradient_of_its_potential() -> None:
    field, x = stirred("GradientField", 4, 3)
    assert isinstance(field, GradientField)
    v, step = field(TIMES, x), 1e-5
    for k in range(12):
        shift = torch.zeros(12, dtype=torch.float64)
        shift[k] = step
        shift = shift.reshape(4, 3)
        difference = (field.potential(TIMES, x + shift) - field.potential(TIMES, x - shift)) / (2 * step)
        torch.testing.assert_close(v.flatten(1)[:, k], difference, atol=1e-7, rtol=0)
    jacobian = torch.autograd.functional.jacobian(lambda y: field(TIMES[:1], y[None]).flatten(), x[0]).reshape(12, 12)
    torch.testing.assert_close(jacobian, jacobian.T, atol=1e-12, rtol=0)
    turned = x[:, [2, 0, 3, 1]].flip(2) + 1.0
    torch.testing.assert_close(field.potential(TIMES, turned), field.potential(TIMES, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_a_laplacian_without_a_derivative_is_caught(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    field, x = stir(gradient(4, 2, None)), random(3, 4, 2)
    taylor = gradient_field._taylor

    def forgetful(function: object, like: Tensor) -> tuple[object, ...]:
        terms = list(taylor(function, like))  # type: ignore[arg-type]
        terms[order] = type(terms[order])(*(torch.zeros_like(term) for term in terms[order]))
        return tuple(terms)

    monkeypatch.setattr(gradient_field, "_taylor", forgetful)
    with pytest.raises(AssertionError):
        check_divergence(field, x)


# hollow field


class Leaking(HollowField):
    """Mutant: particle i sends messages in the world without it."""

    def _surroundings(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, self.others = self.others, torch.ones_like(self.others)
        try:
            return super()._surroundings(t, x)
        finally:
            self.others = kept


def test_states_of_a_world_do_not_know_the_particle_it_lacks() -> None:
    field = stir(HollowField(5, 2, length=0.8, n_layers=4, n_radial=6, n_channels=3, n_vectors=2, hidden=7, generator=seeded()))
    assert isinstance(field, HollowField)
    x = random(5, 2)
    jacobian = torch.autograd.functional.jacobian(lambda y: field._surroundings(TIMES[:1], y[None])[2][0], x)
    influence = jacobian.abs().amax(dim=(2, 4))  # [i, k, particle that moves]
    for i in range(5):
        others = [k for k in range(5) if k != i]
        assert float(influence[i, others, i].max()) == 0.0
        assert float(influence[i, others][:, others].min()) > 1e-9
    check_divergence(field, x[None].expand(3, -1, -1))
    field.__class__ = Leaking
    with pytest.raises(AssertionError):
        check_divergence(field, x[None].expand(3, -1, -1))


def test_hollow_field_has_bodies_of_every_order() -> None:
    """The push between two particles depends on all others, which pair forces do not."""
    field, x = stir(hollow(5, 3, None)), random(1, 5, 3)
    hessian = torch.autograd.functional.jacobian(
        lambda y: torch.autograd.functional.jacobian(lambda z: field(TIMES[:1], z[None])[0, 0], y, create_graph=True)[:, 1], x[0]
    )
    assert float(hessian[:, :, 2].abs().max()) > 1e-4


# tensor field


def test_tensor_field_lives_in_three_dimensions_and_has_enough_layers() -> None:
    with pytest.raises(ValueError, match="3 dimensions, got 2: use EGNN"):
        TensorField(4, 2, length=1.0, generator=seeded())
    for wrong in ({"l_max": 0}, {"n_layers": 0}, {"n_layers": 1, "reflections": False}):
        with pytest.raises(ValueError, match="l_max ≥ 1"):
            TensorField(4, length=1.0, generator=seeded(), **wrong)  # type: ignore[arg-type]


def test_paths_of_the_cross_product_are_the_ones_that_see_mirror_images() -> None:
    with_parity, without = (_paths(2, 2, 2, reflections=reflections) for reflections in (True, False))
    assert len(with_parity) == 11
    assert len(without) == 15
    assert (1, 1, 1) in set(without) - set(with_parity)
    x = random(3, 7, 3)
    check_symmetry(stir(tensor(7, 3, None, reflections=False)), x, reflect=False)
    with pytest.raises(AssertionError):
        check_symmetry(stir(tensor(7, 3, None, reflections=False)), x, reflect=True)


@pytest.mark.parametrize("l_max", [1, 3])
def test_other_ranks(l_max: int) -> None:
    field = stir(TensorField(4, length=0.8, l_max=l_max, n_layers=3, n_channels=2, n_radial=6, hidden=7, generator=seeded()))
    x = random(3, 4, 3)
    for reflect in (False, True):
        check_symmetry(field, x, reflect=reflect)
    check_divergence(field, x)


def test_settings_of_e3nn_are_left_alone() -> None:
    """Also where compiled code, which has no forward derivatives, is the setting."""
    before = e3nn.get_optimization_defaults()["jit_mode"]
    e3nn.set_optimization_defaults(jit_mode="script")
    try:
        field = stir(tensor(4, 3, None))
        assert e3nn.get_optimization_defaults()["jit_mode"] == "script"
        check_divergence(field, random(3, 4, 3))
    finally:
        e3nn.set_optimization_defaults(jit_mode=before)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_can_be_copied(name: str) -> None:
    field, x = stirred(name, 4, 3)
    assert torch.equal(copy.deepcopy(field)(TIMES, x), field(TIMES, x))


def test_positions_of_double_precision_find_exact_couplings_after_single_precision() -> None:
    """Nothing that symmetry rests on is rounded for good when a field has once been in single precision."""
    check_symmetry(stir(tensor(7, 3, None).float()), random(3, 7, 3), reflect=True)
