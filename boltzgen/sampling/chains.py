"""Markov chains whose proposals are independent samples of a flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzgen.core import Distribution, Move, MoveInfo, Target, WalkerState, WeightedSamples, require_exact_density, summed_log_det_error
from boltzgen.errors import InexactDensityError, InputError
from boltzgen.estimators.weights import checked_log_weights, negative_share
from boltzgen.sampling.importance import require_weighable

#: Time blocks a chain is divided into, for the errors of averages along it.
_N_BLOCKS = 20


@dataclass(frozen=True)
class ProposalInfo(MoveInfo):
    """What a move with independent proposals did.

    Attributes:
        x: Proposed configurations ``[w, *event]`` in nm, accepted or not.
        u: Their reduced potentials ``[w]``.
        u_before: Reduced potentials that the walkers had before ``[w]``.
    """

    x: Tensor
    u: Tensor
    u_before: Tensor


class IndependenceMetropolis(Move):
    """Metropolis–Hastings with a flow as proposal: accept x' with probability min(1, w(x') / w(x)), w = exp(−u)/q.

    Args:
        flow: Proposal density, exact to the tolerance of the package.
        target: Density left invariant.

    Raises:
        InexactDensityError: If the flow's density is only estimated, or the target is altered.

    References:
        Tierney, Ann. Statist. 22, 1701 (1994), independence chains; Mengersen and Tweedie, Ann. Statist. 24, 101 (1996), theorem 2.1.
    """

    def __init__(self, flow: Distribution, target: Target) -> None:
        require_exact_density(flow.log_det_error)
        if not target.is_exact:
            raise InexactDensityError(
                "the target is clipped or regularised and its chain would not sample the system; use the exact target"
            )
        self.flow = flow
        self.target = target

    @torch.no_grad()
    def init(self, x: Tensor) -> WalkerState:
        u, log_q = self._evaluate(x, self.flow.log_prob(x))
        if torch.isposinf(u).any():
            rows = torch.nonzero(torch.isposinf(u)).flatten()[:10].tolist()
            raise InputError(f"walkers {rows} start where the target has no density; start them from samples of the target")
        return WalkerState(x=x, u=u, log_q=log_q)

    @torch.no_grad()
    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[WalkerState, ProposalInfo]:
        if state.log_q is None:
            raise InputError("expected walkers with log_q; make them with init()")
        x, log_prob = self.flow.sample(len(state.x), generator=generator)
        u, log_q = self._evaluate(x, log_prob)
        log_ratio = (-u - log_q) - (-state.u - state.log_q)
        uniform = torch.rand(len(u), generator=generator, dtype=torch.float64, device=generator.device).to(u.device)
        accepted = uniform.log() < log_ratio
        moved = accepted.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        new = WalkerState(
            x=torch.where(moved, x, state.x), u=torch.where(accepted, u, state.u), log_q=torch.where(accepted, log_q, state.log_q)
        )
        return new, ProposalInfo(accepted=accepted, log_ratio=log_ratio, x=x, u=u, u_before=state.u)

    def _evaluate(self, x: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
        u = self.target.reduced_potential(x).to(torch.float64)
        log_q = log_prob.to(u.device, torch.float64)
        require_weighable(u, log_q)
        return u, log_q


def run_chain(samples: WeightedSamples, *, generator: torch.Generator, discard: float = 0.1) -> WeightedSamples:
    """Independence Metropolis–Hastings over samples that were already drawn and evaluated, in their order.

    The chain forgets its start geometrically, at the rate 1 − 1/max(w/Z); what is left of it after the discarded rows is a bias that
    no error bar shows, so a chain is worth as much as its weights: look at k̂ first. A sample with a negative weight is never accepted: that
    changes ln Z by −ln(1 − m) with m their share (:func:`~boltzgen.estimators.weights.negative_share`), which counts into the chain's
    ``log_det_error``.

    Args:
        samples: Fresh independent samples of a flow.
        generator: Random numbers.
        discard: Fraction of the steps at the start that is left out.

    Returns:
        Equally weighted rows of the chain, a rejected step repeating its row; without ``log_q``, and in 20 time blocks, so that
        estimators take them as correlated. Their fraction of accepted steps: :func:`acceptance`.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the samples.
        WeightsError: If the weights cannot be normalised.
        InputError: If the rows are no flow samples, are fewer than 40, or ``discard`` is outside [0, 0.9].
    """
    if samples.require_exact().log_q is None:
        raise InputError("expected independent samples of a flow, got rows without log_q; draw them with importance_sample")
    if len(samples) < 2 * _N_BLOCKS or not 0.0 <= discard <= 0.9:
        raise InputError(f"expected at least {2 * _N_BLOCKS} rows and 0 <= discard <= 0.9, got {len(samples)} rows and {discard}")
    log_w = checked_log_weights(samples.positive_log_w).tolist()
    uniform = torch.rand(len(log_w), generator=generator, dtype=torch.float64, device=generator.device)
    log_uniform = uniform.log().cpu().tolist()
    current = next(row for row, weight in enumerate(log_w) if weight > -math.inf)
    rows = []
    for proposal, weight in enumerate(log_w):
        if log_uniform[proposal] < weight - log_w[current]:
            current = proposal
        rows.append(current)
    kept = torch.tensor(rows[int(discard * len(rows)) :])
    n = len(kept)
    return WeightedSamples(
        x=samples.x[kept],
        u=samples.u[kept],
        log_w=torch.zeros(n, dtype=torch.float64),
        log_q=None,
        block=torch.arange(n) * _N_BLOCKS // n,
        chain=torch.zeros(n, dtype=torch.int64),
        role=samples.role,
        log_det_error=summed_log_det_error(samples.log_det_error, -math.log1p(-negative_share(samples))),
    )


def acceptance(chain: WeightedSamples) -> float:
    """Fraction of the steps of a chain from :func:`run_chain` that moved: consecutive rows that differ."""
    rows = chain.x.reshape(len(chain), -1)
    return float((rows[1:] != rows[:-1]).any(dim=1).double().mean())
