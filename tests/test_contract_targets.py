"""What every target promises, checked on every registered one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import boltzgen.core
import boltzgen.md
import boltzgen.targets
from boltzgen.core import Target
from boltzgen.targets.analytic import DoubleWell
from tests.registry import TARGETS, noise
from tests.test_contract_transforms import public_classes


def check_gradient(target: Target, x: Tensor) -> None:
    """The gradient is that of finite differences along random directions (Richardson-extrapolated central differences)."""
    u, gradient = target.value_and_grad(x)
    torch.testing.assert_close(u, target.reduced_potential(x).detach(), atol=1e-9, rtol=1e-12)
    assert gradient.shape == x.shape
    assert not u.requires_grad
    assert not gradient.requires_grad
    inside = torch.isfinite(u)
    assert inside.any()
    assert (gradient[~inside] == 0).all()
    x, gradient = x[inside], gradient[inside]
    step = 1e-4 / max(1.0, float(gradient.abs().max()) / 100)
    for direction in noise(3, *x.shape[1:]):

        def slope(h: float, direction: Tensor = direction) -> Tensor:
            return (target.reduced_potential(x + h * direction) - target.reduced_potential(x - h * direction)) / (2 * h)

        expected = (4 * slope(step / 2) - slope(step)) / 3
        scale = float(gradient.abs().max()) * float(direction.norm())
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), expected.detach(), atol=1e-5 * (1 + scale), rtol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    check_gradient(*TARGETS[name]())


@pytest.mark.parametrize("name", TARGETS)
def test_energies_can_be_differentiated(name: str) -> None:
    target, x = TARGETS[name]()
    leaf = x.clone().requires_grad_(True)
    u = target.reduced_potential(leaf)
    (gradient,) = torch.autograd.grad(u[torch.isfinite(u)].sum(), leaf)
    torch.testing.assert_close(gradient, target.value_and_grad(x)[1], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", TARGETS)
def test_shapes_and_precision(name: str) -> None:
    target, x = TARGETS[name]()
    assert tuple(x.shape[1:]) == tuple(target.event_shape)
    u = target.reduced_potential(x)
    assert u.shape == (len(x),)
    assert u.dtype == torch.float64
    assert not torch.isnan(u).any()
    assert len(target.labels) in (0, target.event_shape[0])
    assert target.log_z is None or math.isfinite(target.log_z)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_not_changed(name: str) -> None:
    target, x = TARGETS[name]()
    before = x.clone()
    target.value_and_grad(x)
    target.reduced_potential(x)
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize("name", TARGETS)
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    target, x = TARGETS[name]()
    u, gradient = target.value_and_grad(x)
    for i in range(len(x)):
        alone, alone_gradient = target.value_and_grad(x[i : i + 1])
        torch.testing.assert_close(alone[0], u[i], atol=1e-9, rtol=1e-10)
        torch.testing.assert_close(alone_gradient[0], gradient[i], atol=1e-8, rtol=1e-8)


class WithFlippedForce(DoubleWell):
    """Mutant: returns the force instead of the gradient."""

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = super().value_and_grad(x)
        return u, -gradient


def test_a_force_in_place_of_a_gradient_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_gradient(WithFlippedForce(2), noise(4, 2))


def test_every_public_target_is_registered() -> None:
    registered = {type(make()[0]) for make in TARGETS.values()}
    missing = public_classes(Target, boltzgen.core, boltzgen.targets, boltzgen.md) - registered
    assert not missing, f"add a line to tests/registry.py for {sorted(cls.__name__ for cls in missing)}"
