"""Monte Carlo moves of walkers by paths: steered to a proposed value of collective variables, or free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boltzgen.core import Distribution, Move, MoveInfo, WalkerState, require_exact_density
from boltzgen.errors import InputError, ShapeError
from boltzgen.paths import PathResult, PathWalkers, Schedule, SteeringEngine
from boltzgen.sampling.periodic_proposals import require_inside, require_same_circles


@dataclass(frozen=True)
class PathInfo(MoveInfo):
    """What a move by paths did.

    Attributes:
        result: The ends of the paths, accepted or not.
        start: λ₀ ``[w, k]``; empty ``[w, 0]`` for free paths.
        end: λ₁ ``[w, k]``.
        log_proposal_ratio: ln ρ(λ₁) − ln ρ(λ₀) ``[w]``.
    """

    result: PathResult
    start: Tensor
    end: Tensor
    log_proposal_ratio: Tensor


class SteeredMove(Move):
    """Steer a collective variable to a value from a proposal, out of equilibrium, and accept or reject the path exactly.

    λ₀ ~ exp(−r(ξ(x₀), λ)), λ₁ ~ ρ, a path of the engine from λ₀ to λ₁ with work W, accepted with probability min(1, e^{−w}),

        w = W + ln ρ(λ₁) − ln ρ(λ₀).

    Why: on (x, λ) with π̂ ∝ exp(−u(x) − r(ξ(x), λ)) the first draw is a Gibbs step; the way back from (x_K, λ₁) draws λ₀ from ρ and retraces
    the path, and the ratio of both probabilities is e^{w}. λ₀ = ξ(x₀) instead, or protocol work instead of W, would be biased.

    Args:
        engine: Runs the paths.
        proposal: ρ over the values ``[k]``, periodic ones in [−P/2, P/2), exact and frozen.
        schedule: How long, and how, the centre moves.

    Raises:
        InexactDensityError: If the density of the proposal is only estimated.
        ShapeError: If it is of another number of variables.
        InputError: If it is not periodic where a variable is; also from a move, for values outside [−P/2, P/2].

    References:
        Schönle, Gabrié, Lelièvre and Stoltz, arXiv 2405.18160; Chen and Roux, J. Chem. Theory Comput. 11, 3919 (2015).
    """

    def __init__(self, engine: SteeringEngine, proposal: Distribution, *, schedule: Schedule) -> None:
        require_exact_density(proposal.log_det_error)
        if tuple(proposal.event_shape) != (engine.restraint.n_variables,):
            raise ShapeError(f"expected a proposal of {engine.restraint.n_variables} values, got {list(proposal.event_shape)}")
        if schedule.span is not None and len(schedule.span) != engine.restraint.n_variables:
            raise ShapeError(f"expected {engine.restraint.n_variables} spans of the schedule, got {len(schedule.span)}")
        require_same_circles(proposal, engine.restraint.periods)
        self.engine, self.proposal, self.schedule = engine, proposal, schedule

    def init(self, x: Tensor) -> PathWalkers:
        return self.engine.locate(x)

    @torch.no_grad()
    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[PathWalkers, PathInfo]:
        walkers = located(self.engine, state)
        start = self.engine.restraint.draw(walkers.xi, generator=generator)
        end, log_end = self.proposal.sample(len(walkers.x), generator=generator)
        require_inside(end, self.engine.restraint.periods)
        ratio = log_end.to(torch.float64) - self.proposal.log_prob(start)
        if torch.isnan(ratio).any():
            raise InputError("the density of the proposal is not a number: the flow is broken; train it with a smaller learning rate")
        result = self.engine.steer(walkers, start, end.to(torch.float64), schedule=self.schedule, generator=generator)
        accepted = _accepted(result.work + ratio, generator)
        info = PathInfo(accepted=accepted, log_ratio=-(result.work + ratio), result=result, start=start, end=end, log_proposal_ratio=ratio)
        return chosen(accepted, result, walkers), info


class FreePaths(Move):
    """Paths without restraint from fresh velocities: hybrid Monte Carlo, or Metropolised Langevin dynamics where the engine has friction.

    Accepted with probability min(1, e^{−W}), W = ΔH − Q: exact at any time step. Unmetropolised, it is plain MD with the error of its
    time step, and says so (``is_exact``).

    Args:
        engine: Runs the paths.
        n_steps: Steps of a path.
        metropolised: Whether to accept or reject.

    Raises:
        InputError: If ``n_steps`` is not positive.

    References:
        Duane et al., Phys. Lett. B 195, 216 (1987); Lelièvre, Rousset and Stoltz, Free Energy Computations (2010), section 2.2.
    """

    def __init__(self, engine: SteeringEngine, *, n_steps: int, metropolised: bool = True) -> None:
        if n_steps < 1:
            raise InputError(f"expected at least one step, got {n_steps}")
        self.engine, self.n_steps, self.is_exact = engine, n_steps, metropolised

    def init(self, x: Tensor) -> PathWalkers:
        return self.engine.locate(x)

    @torch.no_grad()
    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[PathWalkers, PathInfo]:
        walkers = located(self.engine, state)
        result = self.engine.roam(walkers, n_steps=self.n_steps, generator=generator)
        accepted = _accepted(result.work, generator) if self.is_exact else torch.isfinite(result.work)
        none = torch.zeros(len(walkers.x), 0, dtype=torch.float64)
        zero = torch.zeros(len(walkers.x), dtype=torch.float64)
        info = PathInfo(accepted=accepted, log_ratio=-result.work, result=result, start=none, end=none, log_proposal_ratio=zero)
        return chosen(accepted, result, walkers), info


def located(engine: SteeringEngine, state: WalkerState) -> PathWalkers:
    """Walkers with their collective variables."""
    return state if isinstance(state, PathWalkers) else engine.locate(state.x)


def chosen(accepted: Tensor, result: PathResult, walkers: PathWalkers) -> PathWalkers:
    """Ends of accepted paths, and starts of the others."""
    wide = accepted.reshape(-1, *[1] * (walkers.x.ndim - 1))
    return PathWalkers(
        x=torch.where(wide, result.x, walkers.x),
        u=torch.where(accepted, result.u, walkers.u),
        xi=torch.where(accepted[:, None], result.xi, walkers.xi),
    )


def _accepted(w: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(w.shape, generator=generator, dtype=torch.float64).log() < -w
