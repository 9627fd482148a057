"""Small exact problems of steered paths, and the two biased moves that look right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Distribution, Target
from boltzgen.paths import PathResult, PathWalkers, Restraint, Schedule
from boltzgen.sampling.steered import PathInfo, SteeredMove
from boltzgen.sampling.steering import TargetSteering
from boltzgen.targets.analytic import GaussianMixture


class Spread(Distribution):
    """Independent normal values with given means and widths."""

    def __init__(self, mean: Tensor, width: Tensor) -> None:
        super().__init__()
        self.mean, self.width, self.event_shape = mean, width, tuple(mean.shape)

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[Tensor, Tensor]:
        x = self.mean + self.width * torch.randn(n, *self.event_shape, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: object = None) -> Tensor:
        z = (x - self.mean) / self.width
        return (-0.5 * z**2 - self.width.log() - 0.5 * math.log(2 * math.pi)).sum(1)


@dataclass(frozen=True)
class Problem:
    """A target that can be sampled exactly, a variable with a gradient whose length varies, and a proposal of it."""

    target: Target
    variables: Callable[[Tensor], Tensor]
    proposal: Distribution
    draw: Callable[[int, torch.Generator], Tensor]
    observables: Callable[[Tensor], Tensor]
    expected: Tensor

    def engine(
        self, *, step_size: float, friction: float, stiffness: float = 4.0, kind: type[TargetSteering] = TargetSteering
    ) -> TargetSteering:
        return kind(self.target, self.variables, Restraint([stiffness], (None,)), step_size=step_size, friction=friction)


def two_hills() -> Problem:
    """Two Gaussian basins in the plane; ξ = x₁ + ½ x₂² x₁ has |∇ξ| between 1 and about 4 where there is density."""
    target = GaussianMixture(
        torch.tensor([[-1.0, 0.3], [1.2, -0.4]]), covariances=torch.tensor([[[0.12, 0.0], [0.0, 0.5]], [[0.2, 0.1], [0.1, 0.4]]]),
        heights=torch.tensor([1.0, 0.6]),
    )  # fmt: skip
    weights = target.log_masses.softmax(0)
    means = target.means
    covariances = torch.linalg.inv(target.precisions)
    second = (weights[:, None, None] * (covariances + means[:, :, None] * means[:, None, :])).sum(0)
    right = sum(
        w * 0.5 * math.erfc(-float(m[0]) / math.sqrt(2 * float(c[0, 0]))) for w, m, c in zip(weights, means, covariances, strict=True)
    )
    expected = torch.stack([(weights @ means)[0], (weights @ means)[1], second[0, 0], second[1, 1], second[0, 1], right])

    def observables(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1], (x[:, 0] > 0).to(x)], dim=1)

    return Problem(
        target=target,
        variables=lambda x: (x[:, 0] * (1 + 0.5 * x[:, 1] ** 2))[:, None],
        proposal=Spread(torch.zeros(1, dtype=torch.float64), torch.full((1,), 1.8, dtype=torch.float64)),
        draw=lambda n, generator: target.sample(n, generator=generator),
        observables=observables,
        expected=expected,
    )


class FromTheVariable(SteeredMove):
    """A biased twin: the path starts at λ₀ = ξ(x₀)."""

    def step(self, state: PathWalkers, *, generator: torch.Generator) -> tuple[PathWalkers, PathInfo]:  # type: ignore[override]
        drawn = self.engine.restraint.draw
        self.engine.restraint.draw = lambda xi, *, generator: xi.clone()  # type: ignore[method-assign]
        try:
            return super().step(state, generator=generator)
        finally:
            self.engine.restraint.draw = drawn  # type: ignore[method-assign]


class ProtocolWork(TargetSteering):
    """A biased twin: the work is that done by moving the centre, without the error of the time step."""

    def steer(self, walkers: PathWalkers, start: Tensor, end: Tensor, *, schedule: Schedule, generator: torch.Generator) -> PathResult:
        self.done = torch.zeros(len(walkers.x), dtype=torch.float64)
        result = super().steer(walkers, start, end, schedule=schedule, generator=generator)
        return replace(result, work=self.done.masked_fill(torch.isinf(result.work), torch.inf))

    def _step(self, x, v, before, after, *, generator):  # type: ignore[no-untyped-def]
        half = 0.5 * self.step_size
        v, _ = self._thermalised(v, generator)
        v = v - half * self._gradient(x, before) / self.masses
        x = x + half * v
        xi = self.variables(x)
        self.done += self.restraint.energy(xi, after) - self.restraint.energy(xi, before)
        x = x + half * v
        v = v - half * self._gradient(x, after) / self.masses
        v, heat = self._thermalised(v, generator)
        return x, v, heat


def stationary_scores(move: SteeredMove, problem: Problem, *, n_walkers: int, n_moves: int, seed: int) -> tuple[np.ndarray, float, float]:
    """z-scores of the observables after ``n_moves`` of walkers that start from exact samples, and of 2 P(w < 0) against the acceptance.

    Every walker is independent of the others: errors come from the spread over walkers. Also the mean acceptance.
    """
    generator = torch.Generator().manual_seed(seed)
    state = move.init(problem.draw(n_walkers, generator))
    total, accepted, identity = torch.zeros(n_walkers, len(problem.expected), dtype=torch.float64), 0.0, torch.zeros(n_walkers)
    for _ in range(n_moves):
        state, info = move.step(state, generator=generator)
        total += problem.observables(state.x)
        probability = info.log_ratio.clamp(max=0).exp()
        identity += (probability - 2.0 * (info.log_ratio > 0)).float()
        accepted += float(probability.mean())
    means = total / n_moves
    scores = (means.mean(0) - problem.expected) / (means.std(0) / math.sqrt(n_walkers))
    gap = identity / n_moves
    z_identity = float(gap.mean() / (gap.std() / math.sqrt(n_walkers)))
    return scores.numpy(), z_identity, accepted / n_moves
