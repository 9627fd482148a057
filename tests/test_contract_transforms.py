"""What every transform promises, checked on every registered one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import Tensor

import boltzgen.core
import boltzgen.transforms
from boltzgen.core import Context, Transform
from boltzgen.transforms.continuous import ContinuousTransform
from tests.registry import TRANSFORMS, Exponential, noise


def public_classes(base: type, *roots: ModuleType) -> set[type]:
    """Concrete public subclasses of ``base`` defined in modules or packages."""
    modules = list(roots)
    for root in roots:
        if hasattr(root, "__path__"):
            modules += [importlib.import_module(info.name) for info in pkgutil.walk_packages(root.__path__, root.__name__ + ".")]
    return {
        cls
        for module in modules
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, base)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
        and not cls.__name__.startswith("_")
    }


def stirred(name: str) -> tuple[Transform, Tensor]:
    """The registered transform in float64 with parameters away from their initial values."""
    transform, z = TRANSFORMS[name]()
    return stir(transform), z


def stir(transform: Transform) -> Transform:
    transform.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return transform


def check_round_trip(transform: Transform, z: Tensor) -> None:
    """The inverse undoes the transform, and its log_det is the opposite."""
    x, log_det = transform(z)
    back, inverse_log_det = transform.inverse(x)
    torch.testing.assert_close(back, z, atol=1e-6, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-6, rtol=0)
    assert log_det.shape == (len(z),)
    assert log_det.dtype == inverse_log_det.dtype == torch.float64
    solved = any(isinstance(part, ContinuousTransform) for part in transform.modules())
    assert transform.log_det_error == (None if solved else 0)  # the error of a solver is not known before it is measured


def check_log_det(transform: Transform, z: Tensor) -> None:
    """log_det is the log determinant of the Jacobian, both ways."""
    x, log_det = transform(z)
    for function, at, expected in ((transform.forward, z, log_det), (transform.inverse, x, -log_det)):
        for i in range(len(at)):

            def row(value: Tensor, function=function, shape=at[i].shape) -> Tensor:  # type: ignore[no-untyped-def]
                return function(value.reshape(1, *shape))[0].flatten()

            jacobian = torch.autograd.functional.jacobian(row, at[i].detach().flatten())
            torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, expected[i].detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_round_trip(name: str) -> None:
    check_round_trip(*stirred(name))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "InternalCoordinates"])  # 3n − 6 to 3n: test_internal.py
def test_log_det_is_that_of_the_jacobian(name: str) -> None:
    check_log_det(*stirred(name))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    transform, z = stirred(name)
    for direction, start in ((transform.forward, z), (transform.inverse, transform(z)[0].detach())):
        transform.zero_grad()
        values, log_det = direction(start.clone().requires_grad_(True))
        ((values * noise(*values.shape)).sum() + log_det.sum()).backward()
        for label, parameter in transform.named_parameters():
            assert parameter.grad is not None, f"{label} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), label
            assert (parameter.grad != 0).any(), f"the gradient of {label} is zero everywhere"


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inputs_are_not_changed(name: str) -> None:
    transform, z = stirred(name)
    before = z.clone()
    x, _ = transform(z)
    assert torch.equal(z, before)
    before = x.clone()
    transform.inverse(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_dict_round_trip(name: str) -> None:
    transform, z = stirred(name)
    fresh = TRANSFORMS[name]()[0].double()
    fresh.load_state_dict(transform.state_dict())
    for ours, theirs in zip(fresh(z), transform(z), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    transform, z = stirred(name)
    x, log_det = transform(z)
    for i in range(len(z)):
        alone, alone_log_det = transform(z[i : i + 1])
        torch.testing.assert_close(alone[0], x[i], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(alone_log_det[0], log_det[i], atol=1e-10, rtol=1e-10)


class WithoutLogDet(Exponential):
    """Mutant."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z)
        return x, 0 * log_det

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().inverse(x)
        return z, 0 * log_det


class WithOneSign(Exponential):
    """Mutant: the inverse reports the log_det of the forward."""

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().inverse(x)
        return z, -log_det


def test_wrong_log_dets_are_caught() -> None:
    check_round_trip(Exponential(3), noise(5, 3))
    check_log_det(Exponential(3), noise(5, 3))
    with pytest.raises(AssertionError):
        check_log_det(WithoutLogDet(3), noise(5, 3))
    with pytest.raises(AssertionError):
        check_round_trip(WithOneSign(3), noise(5, 3))


def test_every_public_transform_is_registered() -> None:
    registered = {type(make()[0]) for make in TRANSFORMS.values()}
    missing = public_classes(Transform, boltzgen.core, boltzgen.transforms) - registered
    assert not missing, f"add a line to tests/registry.py for {sorted(cls.__name__ for cls in missing)}"
