"""What every distribution promises, checked on every registered one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import boltzgen.core
import boltzgen.distributions
import boltzgen.mixtures
from boltzgen.core import Context, Distribution
from boltzgen.distributions import TorusNormal
from tests.assertions import assert_z
from tests.registry import DISTRIBUTIONS
from tests.test_contract_transforms import public_classes


def grid(box: np.ndarray) -> tuple[Tensor, float]:
    """Midpoints of a regular grid over ``box`` ``[d, 2]`` and the volume of a cell."""
    n = 40_000 if len(box) == 1 else 400
    axes = [low + (high - low) * (np.arange(n) + 0.5) / n for low, high in box]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(box))
    return torch.from_numpy(points), float(np.prod((box[:, 1] - box[:, 0]) / n))


def check_normalised(distribution: Distribution, box: np.ndarray) -> None:
    """∫ p(x) dx = 1, by the midpoint rule."""
    x, cell = grid(box)
    total = float(distribution.log_prob(x.reshape(-1, *distribution.event_shape)).detach().exp().sum()) * cell
    assert total == pytest.approx(1.0, abs=1e-4)


def check_samples(distribution: Distribution, box: np.ndarray, generator: torch.Generator) -> None:
    """Samples carry their own log_prob and have the moments of the density."""
    x, log_prob = distribution.sample(20_000, generator=generator)
    torch.testing.assert_close(log_prob.detach(), distribution.log_prob(x).detach(), atol=1e-8, rtol=1e-8)
    points, cell = grid(box)
    density = distribution.log_prob(points.reshape(-1, *distribution.event_shape)).detach().exp() * cell
    x = x.flatten(1)
    for moment in (torch.sin, torch.cos, torch.tanh):
        for column in range(x.shape[1]):
            sampled = moment(x[:, column].detach())
            exact = float((density * moment(points[:, column])).sum())
            assert_z(float(sampled.mean()), exact, float(sampled.std()) / math.sqrt(len(x)))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_densities_are_normalised(name: str) -> None:
    check_normalised(*DISTRIBUTIONS[name]())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_follow_their_density(name: str, generator: torch.Generator) -> None:
    check_samples(*DISTRIBUTIONS[name](), generator)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_seed_gives_the_same_samples(name: str) -> None:
    distribution, _ = DISTRIBUTIONS[name]()
    first, second = (distribution.sample(5, generator=torch.Generator().manual_seed(4))[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_shapes_and_precision(name: str, generator: torch.Generator) -> None:
    distribution, _ = DISTRIBUTIONS[name]()
    x, log_prob = distribution.sample(7, generator=generator)
    assert tuple(x.shape) == (7, *distribution.event_shape)
    assert log_prob.shape == distribution.log_prob(x).shape == (7,)
    assert log_prob.dtype == distribution.log_prob(x).dtype == torch.float64
    assert distribution.log_det_error == 0
    torch.testing.assert_close(distribution.log_prob(x[2:3])[0], distribution.log_prob(x)[2])


class Unnormalised(TorusNormal):
    """Mutant: a constant forgotten."""

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().log_prob(x) + 0.5 * math.log(2 * math.pi)


class TooWide(TorusNormal):
    """Mutant: samples of another width than the density says."""

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, _ = super().sample(n, generator=generator)
        x[:, self.n_angles :] *= 1.1
        return x, self.log_prob(x)


def test_wrong_densities_are_caught(generator: torch.Generator) -> None:
    _, box = DISTRIBUTIONS["TorusNormal"]()
    with pytest.raises(AssertionError):
        check_normalised(Unnormalised(1, 1), box)
    with pytest.raises(AssertionError):
        check_samples(TooWide(1, 1), box, generator)


def test_every_public_distribution_is_registered() -> None:
    registered = {type(make()[0]) for make in DISTRIBUTIONS.values()}
    missing = public_classes(Distribution, boltzgen.core, boltzgen.distributions, boltzgen.mixtures) - registered
    assert not missing, f"add a line to tests/registry.py for {sorted(cls.__name__ for cls in missing)}"
