"""The losses of flows whose density is integrated: their gradients against the matrix exponential, with wrong twins."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from boltzgen.core import Context, Distribution, Flow, Objective, Target
from boltzgen.targets.analytic import Gaussian
from boltzgen.training.objectives import ForwardKL, LogVariance, ReverseGradient, ReverseKL, path_gradient, score_gradient
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.volume import Hutchinson
from tests.registry import noise, seeded
from tests.test_continuous import Linear
from tests.test_objectives import check_unbiased, gradient_of, without_score

MEAN = torch.tensor([[0.3, -0.5, 0.1]], dtype=torch.float64)
FACTOR = torch.eye(3, dtype=torch.float64) + noise(3, 3, scale=0.2)
TARGET = Gaussian(MEAN, covariance=FACTOR @ FACTOR.T)


class Normal(Distribution):
    """The standard normal of one particle."""

    event_shape = (1, 3)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 1, 3, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return -0.5 * x.square().sum(dim=(1, 2)) - 1.5 * math.log(2 * math.pi)


class Traced(Linear):
    """v = A x with its divergence in closed form: fast."""

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, x), torch.trace(self.matrix).expand(len(x))


class HalfTraced(Linear):
    """Mutant: half of the divergence is lost."""

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, x), 0.5 * torch.trace(self.matrix).expand(len(x))


def linear_flow(matrix: Tensor, *, kind: type[Linear] = Traced) -> Flow:
    """x = exp(A) z, integrated in six steps (to 1e-5)."""
    field = kind()
    with torch.no_grad():
        field.matrix.copy_(matrix)
    return Flow(Normal(), ContinuousTransform(field, FixedStep(6), checkpointing=False))


OFF_TARGET = noise(3, 3, scale=0.3)


def rate(flow: Flow) -> Tensor:
    return flow.transform.field.matrix  # type: ignore[union-attr, return-value]


def exact_reverse_kl(flow: Flow) -> Tensor:
    """E_q[ln q + u] = ½ tr Σ⁻¹ M Mᵀ + ½ μᵀ Σ⁻¹ μ − tr A − (3/2) ln 2πe, M = exp(A)."""
    map_ = torch.matrix_exp(rate(flow))
    energy = 0.5 * torch.trace(TARGET.precision @ map_ @ map_.T) + 0.5 * TARGET.mean @ TARGET.precision @ TARGET.mean
    return energy - torch.trace(rate(flow)) - 1.5 * math.log(2 * math.pi * math.e)


def exact_forward_kl(flow: Flow) -> Tensor:
    """E_p[−ln q] = ½ tr C (Σ + μμᵀ) + tr A + (3/2) ln 2π, C = exp(−A)ᵀ exp(−A)."""
    back = torch.matrix_exp(-rate(flow))
    second = FACTOR @ FACTOR.T + torch.outer(TARGET.mean, TARGET.mean)
    return 0.5 * torch.trace(back.T @ back @ second) + torch.trace(rate(flow)) + 1.5 * math.log(2 * math.pi)


X = TARGET.sample(60_000, generator=seeded(4))
FORCES = TARGET.value_and_grad(X)[1]


@pytest.mark.parametrize(
    ("objective", "exact"),
    [
        (ForwardKL(X, batch_size=128), exact_forward_kl),
        (ForwardKL(X, batch_size=128, u_gradient=FORCES), exact_forward_kl),
        (ReverseKL(TARGET, batch_size=128, gradient=path_gradient), exact_reverse_kl),
        (ReverseKL(TARGET, batch_size=128, gradient=score_gradient), exact_reverse_kl),
    ],
    ids=["likelihood", "forces", "path", "score"],
)
def test_gradients_through_the_solver_are_unbiased(objective: Objective[Flow], exact: Callable[[Flow], Tensor]) -> None:
    check_unbiased(objective, exact, repeats=100, flow=linear_flow(OFF_TARGET))
    with pytest.raises(AssertionError):
        check_unbiased(objective, exact, repeats=100, flow=linear_flow(OFF_TARGET, kind=HalfTraced))


def largest_gradient(objective: Objective[Flow], flow: Flow) -> float:
    return float(gradient_of(objective(flow, generator=seeded())[0], flow).abs().max())


@pytest.mark.parametrize("gradient", [path_gradient, without_score])
def test_gradients_vanish_in_every_batch_where_the_flow_is_right(gradient: ReverseGradient) -> None:
    """Path gradients and the log variance have no noise there; the mutant has."""
    flow = linear_flow(OFF_TARGET)
    map_ = torch.matrix_exp(rate(flow).detach())
    reached: Target = Gaussian(torch.zeros(1, 3), covariance=map_ @ map_.T)
    x = reached.sample(500, generator=seeded(9))  # type: ignore[attr-defined]
    u, forces = reached.value_and_grad(x)
    losses: list[Objective[Flow]] = [
        ForwardKL(x, batch_size=16, u_gradient=forces), LogVariance(x, -u, batch_size=16), LogVariance(x, -u, batch_size=16, target=reached)
    ]  # fmt: skip
    wrong = ReverseKL(reached, batch_size=16, gradient=gradient)
    if gradient is without_score:
        assert largest_gradient(wrong, flow) > 0.05
    else:
        assert all(largest_gradient(loss, flow) < 1e-4 for loss in [*losses, wrong])
        rough = Flow(flow.base, flow.transform.with_solver(FixedStep(8), volume=Hutchinson(seeded())))  # type: ignore[operator]
        assert largest_gradient(LogVariance(x, -u, batch_size=16), rough) > 0.01
