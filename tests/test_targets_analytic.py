"""Analytic targets: normalisation by quadrature, exact samples; views: energies, gradients and what they claim to be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import InputError, ShapeError
from boltzgen.targets.analytic import DoubleWell, Gaussian, GaussianMixture, VonMisesProduct
from boltzgen.targets.views import Regularised, Restricted, Tempered
from tests.assertions import assert_z

PLANE = torch.tensor([[1.0, 0.5], [0.5, 0.8]])
TWO_DIMENSIONAL: dict[str, tuple[Callable[[], Target], float]] = {
    "Gaussian": (lambda: Gaussian(torch.tensor([0.3, -0.2]), covariance=PLANE), 9.0),
    "GaussianMixture": (
        lambda: GaussianMixture(
            torch.tensor([[1.0, 0.0], [-1.5, 0.5]]), covariances=torch.stack([PLANE, 0.3 * torch.eye(2)]), heights=torch.tensor([1.0, 3.0])
        ),
        9.0,
    ),
    "DoubleWell": (lambda: DoubleWell(2, barrier=3.0, tilt=0.7, width=1.3, stiffness=2.0), 9.0),
    "VonMisesProduct": (lambda: VonMisesProduct(torch.tensor([0.5, -2.0]), concentration=torch.tensor([1.0, 4.0])), math.pi),
}


def grid(half_width: float, n: int = 800) -> tuple[Tensor, float]:
    """Midpoints of a square grid ``[n², 2]`` and the area of a cell."""
    spacing = 2 * half_width / n
    axis = -half_width + spacing * (torch.arange(n, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(axis, axis), spacing**2


def check_log_z(target: Target, half_width: float, shift: float = 0.0) -> None:
    x, area = grid(half_width)
    quadrature = float(torch.logsumexp(-target.reduced_potential(x), 0)) + math.log(area)
    assert target.log_z is not None
    assert abs(target.log_z + shift - quadrature) < 1e-8


@pytest.mark.parametrize("name", TWO_DIMENSIONAL)
def test_log_z_by_quadrature(name: str) -> None:
    build, half_width = TWO_DIMENSIONAL[name]
    check_log_z(build(), half_width)
    with pytest.raises(AssertionError):
        check_log_z(build(), half_width, shift=math.log(2))


@pytest.mark.parametrize("name", TWO_DIMENSIONAL)
def test_samples_follow_the_density(name: str) -> None:
    build, half_width = TWO_DIMENSIONAL[name]
    target = build()
    x, _ = grid(half_width)
    p = (-target.reduced_potential(x)).softmax(0)
    draws = target.sample(50_000, generator=torch.Generator().manual_seed(3))
    assert draws.shape == (50_000, 2)
    observables: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda y: torch.cos(y[:, 0]),
        lambda y: torch.sin(y[:, 0]),
        lambda y: torch.sin(y[:, 1]),
        lambda y: torch.cos(y[:, 0] + y[:, 1]),
        target.reduced_potential,
    )
    for observable in observables:
        values = observable(draws)
        assert_z(float(values.mean()), float(p @ observable(x)), float(values.std()) / math.sqrt(len(values)))


def test_double_well_knows_its_basins() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for barrier, tilt, width in [(4.0, 0.5, 1.0), (0.1, 2.0, 1.0), (10.0, -3.0, 0.3), (0.5, 5.0, 2.0)]:
        target = DoubleWell(1, barrier=barrier, tilt=tilt, width=width)
        reach = 10 * width
        halves = []
        for centre in (-reach / 2, reach / 2):
            x = torch.from_numpy(centre + nodes * reach / 2)[:, None]
            halves.append(float((torch.from_numpy(weights) * torch.exp(-target.reduced_potential(x))).sum() * reach / 2))
        assert target.log_z == pytest.approx(math.log(sum(halves)), abs=1e-9)
        assert target.free_energy_difference == pytest.approx(math.log(halves[0] / halves[1]), abs=1e-9)


def test_particles_keep_their_shape(generator: torch.Generator) -> None:
    target = Gaussian(torch.zeros(4, 3), covariance=torch.eye(12))
    x = target.sample(7, generator=generator)
    assert x.shape == (7, 4, 3)
    u, gradient = target.value_and_grad(x)
    torch.testing.assert_close(gradient, x)
    torch.testing.assert_close(u, 0.5 * (x**2).sum((1, 2)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gaussian(torch.zeros(2), covariance=-torch.eye(2)),
        lambda: Gaussian(torch.zeros(2), covariance=torch.eye(3)),
        lambda: GaussianMixture(torch.zeros(2, 2), covariances=torch.eye(2), heights=torch.ones(2)),
        lambda: GaussianMixture(torch.zeros(1, 2), covariances=torch.eye(2)[None], heights=torch.zeros(1)),
        lambda: DoubleWell(0),
        lambda: VonMisesProduct(torch.zeros(2), concentration=torch.zeros(2)),
        lambda: Tempered(DoubleWell(), factor=0.0),
        lambda: Regularised(DoubleWell(), u_cut=3.0, u_max=3.0),
    ],
)
def test_impossible_parameters_are_refused(build: Callable[[], Target]) -> None:
    with pytest.raises((InputError, ShapeError), match="expected"):
        build()


# ---------------------------------------------------------------- views

VIEWS: dict[str, Callable[[], Target]] = {
    "Tempered": lambda: Tempered(DoubleWell(2), factor=0.5),
    "Regularised": lambda: Regularised(DoubleWell(2), u_cut=2.0, u_max=4.5),
    "Restricted": lambda: Restricted(DoubleWell(2), lambda x: x[:, 0] > 0),
}


def check_gradient(target: Target, x: Tensor) -> None:
    """Central differences in float64."""
    u, gradient = target.value_and_grad(x)
    torch.testing.assert_close(u, target.reduced_potential(x))
    step = 1e-6
    for column in range(x.shape[1]):
        shift = torch.zeros_like(x)
        shift[:, column] = step
        difference = (target.reduced_potential(x + shift) - target.reduced_potential(x - shift)) / (2 * step)
        finite = torch.isfinite(difference)
        assert torch.allclose(gradient[finite, column], difference[finite], atol=1e-6, rtol=1e-6)
        assert (gradient[~finite, column] == 0).all()
    leaf = x.clone().requires_grad_(True)
    u = target.reduced_potential(leaf)
    u[torch.isfinite(u)].sum().backward()
    torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("name", VIEWS)
def test_views_have_consistent_gradients(name: str, generator: torch.Generator) -> None:
    x = 1.8 * torch.randn(400, 2, generator=generator, dtype=torch.float64)
    check_gradient(VIEWS[name](), x)


def test_a_regularised_view_without_its_slope_is_caught(generator: torch.Generator) -> None:
    class WithoutSlope(Regularised):
        def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.reduced_potential(x), self.target.value_and_grad(x)[1]

    with pytest.raises(AssertionError):
        check_gradient(
            WithoutSlope(DoubleWell(2), u_cut=2.0, u_max=4.5), 1.8 * torch.randn(400, 2, generator=generator, dtype=torch.float64)
        )


class Walled(Target):
    """Energies up to +inf with gradients that are inf or NaN there, as a clash of atoms gives."""

    event_shape = (1,)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return (1.0 / x[:, 0].clamp(min=0.0).to(torch.float64)) ** 12

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.reduced_potential(x), -12.0 * x.clamp(min=0.0).to(torch.float64) ** -13


def test_regularised_energies_are_capped_and_say_so() -> None:
    view = Regularised(Walled(), u_cut=10.0, u_max=30.0)
    x = torch.tensor([[2.0], [0.5], [1e-2], [0.0]], dtype=torch.float64)
    u, gradient = view.value_and_grad(x)
    assert u.tolist() == pytest.approx([2.0**-12, 10 + math.log1p(4096 - 10), 30.0, 30.0])
    assert gradient[:, 0].tolist() == pytest.approx([-12 * 2.0**-13, -12 * 2**13 / (1 + 4096 - 10), 0.0, 0.0])
    assert not view.is_exact
    assert view.log_z is None


def test_regularised_below_the_cut_is_the_target(generator: torch.Generator) -> None:
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        Regularised(DoubleWell(2), u_cut=1e6, u_max=1e7).reduced_potential(x), DoubleWell(2).reduced_potential(x), rtol=0, atol=0
    )


def test_restricted_evaluates_inside_only() -> None:
    class Counting(DoubleWell):
        n_rows = 0

        def reduced_potential(self, x: Tensor) -> Tensor:
            self.n_rows += len(x)
            return super().reduced_potential(x)

    target = Counting(1)
    view = Restricted(target, lambda x: x[:, 0] > 0)
    x = torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
    assert torch.isposinf(view.reduced_potential(x)).tolist() == [False, True, False]
    assert target.n_rows == 2
    u, gradient = view.value_and_grad(-x.abs())
    assert torch.isposinf(u).all()
    assert (gradient == 0).all()
    with pytest.raises(ShapeError, match=r"bool \[3\]"):
        Restricted(target, lambda x: x).reduced_potential(x)


def test_tempered_view_of_a_gaussian_is_a_wider_gaussian(generator: torch.Generator) -> None:
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    narrow, wide = Gaussian(torch.zeros(2), covariance=PLANE), Gaussian(torch.zeros(2), covariance=2 * PLANE)
    torch.testing.assert_close(Tempered(narrow, factor=0.5).reduced_potential(x), wide.reduced_potential(x))
    assert Tempered(narrow, factor=0.5).log_z is None
    assert Tempered(narrow, factor=1.0).log_z == narrow.log_z


@pytest.mark.parametrize("name", VIEWS)
def test_views_change_temperature_through_their_target(name: str) -> None:
    class Heated(DoubleWell):
        def at(self, temperature_kelvin: float) -> Target:
            return Heated(2, barrier=4.0 * 300 / temperature_kelvin)

    view = VIEWS[name]()
    view.target = Heated(2)  # type: ignore[attr-defined]
    x = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    hot = view.at(600.0)
    assert type(hot) is type(view)
    assert hot.reduced_potential(x) < view.reduced_potential(x)
    with pytest.raises(NotImplementedError):
        VIEWS[name]().at(600.0)
