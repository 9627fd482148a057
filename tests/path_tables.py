"""Tables of paths between the two basins of the toy of ``steering_problems``, and what is exact about it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from boltzgen.paths import Looks, Paths, PathWalkers, Schedule
from boltzgen.sampling.steered import PathInfo, SteeredMove
from tests.steering_problems import Problem, Spread, two_hills

STEPS, STEP_SIZE, STIFFNESS = 20, 0.2, 4.0
#: Mean and width of the proposal: off the middle, so that its ratio matters.
PROPOSAL = (0.4, 1.5)


@functools.cache
def toy() -> Problem:
    mean, width = (torch.tensor([value], dtype=torch.float64) for value in PROPOSAL)
    return replace(two_hills(), proposal=Spread(mean, width))


def left(xi: np.ndarray) -> np.ndarray:
    return xi[:, 0] < 0


def right(xi: np.ndarray) -> np.ndarray:
    return xi[:, 0] >= 0


def exact_difference() -> float:
    """−ln P(x₁ > 0)/P(x₁ < 0): ξ has the sign of x₁."""
    share = float(toy().expected[5])
    return -math.log(share / (1 - share))


def exact_cumulative(values: np.ndarray) -> np.ndarray:
    """P(ξ < values), by quadrature over x₂: ξ = x₁ (1 + ½ x₂²) grows with x₁, which is normal at fixed x₂ in each hill."""
    y, target = np.linspace(-8, 8, 4001), toy().target
    bound, total = values[:, None] / (1 + 0.5 * y**2), np.zeros(len(values))
    means, covariances = target.means.numpy(), torch.linalg.inv(target.precisions).numpy()
    for weight, m, c in zip(target.log_masses.softmax(0).numpy(), means, covariances, strict=True):
        at, width = m[0] + c[0, 1] / c[1, 1] * (y - m[1]), math.sqrt(c[0, 0] - c[0, 1] ** 2 / c[1, 1])
        total += weight * (norm.pdf(y, m[1], math.sqrt(c[1, 1])) * norm.cdf((bound - at) / width)).sum(axis=1) * (y[1] - y[0])
    return total


def exact_centres() -> tuple[float, tuple[float, float]]:
    """ΔF of λ > 0 against λ < 0, λ = ξ + N(0, 1/k), and the proposal's shares of both."""
    noise = np.linspace(-8, 8, 801) / math.sqrt(STIFFNESS)
    below = float((norm.pdf(noise * math.sqrt(STIFFNESS)) * exact_cumulative(-noise)).sum() / norm.pdf(noise * math.sqrt(STIFFNESS)).sum())
    mass = float(norm.cdf(0, *PROPOSAL))
    return -math.log((1 - below) / below), (mass, 1 - mass)


@functools.cache
def pool() -> tuple[Tensor, Tensor]:
    """Many exact samples of the left basin, and of the right one."""
    x = toy().draw(400_000, torch.Generator().manual_seed(99))
    return x[x[:, 0] < 0], x[x[:, 0] >= 0]


def steered(steps: int = STEPS) -> SteeredMove:
    problem = toy()
    engine = problem.engine(step_size=STEP_SIZE, friction=0.0, stiffness=STIFFNESS)
    return SteeredMove(engine, problem.proposal, schedule=Schedule(steps))


def in_basins(n_left: int, n_right: int, generator: torch.Generator) -> Tensor:
    """Starts from equilibrium within each basin, as many as asked for."""
    parts = [x[torch.randint(len(x), (n,), generator=generator)] for x, n in zip(pool(), (n_left, n_right), strict=True)]
    return torch.cat(parts)


def row(walkers: PathWalkers, info: PathInfo, time: int) -> Paths:
    """What one move of all walkers adds to the table."""
    failed = torch.isinf(info.result.work)
    n = len(walkers.x)
    return Paths(
        start=info.start.numpy(), end=info.end.numpy(), xi_start=walkers.xi.numpy(),
        xi_end=info.result.xi.masked_fill(failed[:, None], torch.nan).numpy(), log_proposal_ratio=info.log_proposal_ratio.numpy(),
        work=info.result.work.numpy(), accepted=info.accepted.numpy(), walker=np.arange(n), time=np.full(n, time),
        n_force=info.result.n_force.numpy(),
    )  # fmt: skip


def table(x: Tensor, *, n_moves: int, seed: int, steps: int = STEPS) -> Paths:
    """Walkers from ``x`` ``[w, 2]`` by steered moves alone."""
    generator, move, parts = torch.Generator().manual_seed(seed), steered(steps), []
    state = move.init(x)
    for time in range(n_moves):
        after, info = move.step(state, generator=generator)
        parts.append(row(state, info, time))
        state = after
    return Paths.joined(parts)


def watched(x: Tensor, *, n_moves: int, seed: int, apart: float, steps: int = STEPS) -> tuple[Paths, Looks]:
    """The same with looks at every ``apart`` of the way of a path's centre."""
    generator, parts, looks = torch.Generator().manual_seed(seed), [], []
    move = SteeredMove(steered().engine, toy().proposal, schedule=Schedule(steps, looks=(apart,)))
    state = move.init(x)
    for time in range(n_moves):
        after, info = move.step(state, generator=generator)
        parts.append(row(state, info, time))
        looks.append(Looks.of(info.result, time=time))
        state = after
    return Paths.joined(parts), Looks.joined(looks)
