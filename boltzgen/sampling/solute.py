"""Monte Carlo moves that give a solute a new conformation and let the solvent relax around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Distribution, Move, WalkerState, require_exact_density
from boltzgen.errors import InputError, ShapeError
from boltzgen.paths import DrivingEngine, Paths, PathWalkers, Schedule
from boltzgen.sampling.steered import PathInfo, chosen


class Way(Protocol):
    """How a solute gets from one conformation to another; the way back visits the same places in reverse."""

    def __call__(self, start: Tensor, shape: Tensor) -> Tensor:
        """Corners ``[w, m + 1, k, 3]`` of ways that begin at ``start`` and end in the conformation of ``shape``, both ``[w, k, 3]``."""


def straight_way(start: Tensor, shape: Tensor) -> Tensor:
    """Straight Cartesian ways onto the superposed conformation: the shortest ones, corners ``[w, 2, k, 3]``."""
    return torch.stack([start, superposed(shape, start)], dim=1)


def superposed(x: Tensor, onto: Tensor) -> Tensor:
    """x, turned and shifted for the smallest Σᵢ |xᵢ − yᵢ|² to y, without mirror images; both ``[w, k, 3]``.

    The turn that superposes y onto x is the inverse of that which superposes x onto y.

    References:
        Kabsch, Acta Cryst. A 34, 827 (1978).
    """
    centre = onto.mean(1, keepdim=True)
    apart, fixed = x - x.mean(1, keepdim=True), onto - centre
    left, _, right = torch.linalg.svd(apart.mT @ fixed)
    sign = torch.ones_like(left[:, 0])
    sign[:, 2] = torch.sign(torch.linalg.det(left @ right))
    return apart @ (left * sign[:, None, :]) @ right + centre


@dataclass(frozen=True)
class SoluteInfo(PathInfo):
    """What a move of a solute did; ``start`` and ``end`` are ξ of both ends, and the log ratio is that of the conformations.

    Attributes:
        distance: Root mean square displacement of the solute's atoms ``[w]`` in nm.
    """

    distance: Tensor

    def paths(self, *, time: int) -> Paths:
        """A row for every walker, for the records; ``time`` numbers the move."""
        n, end = len(self.accepted), self.end.numpy()
        return Paths(
            start=self.start.numpy(), end=end, xi_start=self.start.numpy(), xi_end=end,
            log_proposal_ratio=self.log_proposal_ratio.numpy(), work=self.result.work.numpy(), accepted=self.accepted.numpy(),
            walker=np.arange(n), time=np.full(n, time), n_force=self.result.n_force.numpy(),
        )  # fmt: skip


class SoluteMove(Move):
    r"""Propose a conformation of the whole solute, drive the solute to it while the solvent relaxes, and accept or reject exactly.

    The solute is a centre c, an orientation R and internal coordinates s: dx_solute = J(s) dc dR ds. s₁ ~ q; the new conformation is
    superposed on the present one, c₁ = c₀ and R₁ = R₀ g(s₀, s₁). The solute follows a way between both in K steps, the solvent follows
    reversible dynamics from fresh velocities. With the work W = U(x_K) − U(x_0) + ΔKE_solvent − Q in kT the move is accepted with
    probability min(1, e^{−w}),

        w = W + ln p(x₁) − ln p(x₀),   ln p(x) = ln q(s) − ln J(s),

    p being the flow's density of Cartesian coordinates, constant over c and R.

    Why: the solvent's path is retraced by the solute's way reversed, with the weight e^{ΔKE − Q} that :class:`SteeredMove` has.
    Superposition is symmetric, g(s₁, s₀) = g(s₀, s₁)⁻¹: the way from x₁ to x₀ is that from x₀ to x₁ reversed, (R₀, s₀, s₁) ↦ (R₁, s₁, s₀)
    is its own inverse and, as R₀ ↦ R₀ g keeps the Haar measure, has the determinant 1. So the probabilities to be balanced are

        π(x₀) dx₀ q(s₁) ds₁ : π(x_K) dx_K q(s₀) ds₀  =  e^{−U₀} J(s₀) q(s₁) : e^{−U_K} J(s₁) q(s₀),

    and the frame gives no term. Exact for any K and any time step; a conformation for which the superposition is degenerate has measure 0.

    Args:
        engine: Drives the solute.
        proposal: p over conformations ``[k, 3]``, the same for every placement, frozen. It may lack its normalisation.
        schedule: K, and how the solute moves. Its ``span``, one length in nm, makes K proportional to the solute's root mean square
            displacement between both ends.
        way: How the solute gets there; straight by default.
        images: Images ``[g, w, k, 3]`` of conformations ``[w, k, 3]`` under a group of isometries, such as the mirror image or the chain
            read backwards; the identity first. The image nearest to the present conformation is proposed, with the density
            p̄(x) = Σ_g p(gx)/|G|: which image is nearest is symmetric. Other moves must then mix images where they differ.

    Raises:
        InexactDensityError: If the density of the proposal is only estimated.
        ShapeError: If it is of another number of atoms.
        InputError: If the schedule's span is not one length.

    References:
        Nilmeier et al., PNAS 108, E1009 (2011); Schönle, Carbone, Gabrié, Lelièvre and Stoltz, arXiv 2512.16812.
    """

    def __init__(
        self,
        engine: DrivingEngine,
        proposal: Distribution,
        *,
        schedule: Schedule,
        way: Way = straight_way,
        images: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        require_exact_density(proposal.log_det_error)
        if tuple(proposal.event_shape) != (len(engine.solute), 3):
            raise ShapeError(f"expected a proposal of conformations [{len(engine.solute)}, 3], got {list(proposal.event_shape)}")
        if schedule.span is not None and len(schedule.span) != 1:
            raise InputError(f"expected the schedule's span to be one length in nm, got {schedule.span}")
        self.engine, self.proposal, self.schedule, self.way, self.images = engine, proposal, schedule, way, images

    def init(self, x: Tensor) -> PathWalkers:
        return self.engine.locate(x)

    @torch.no_grad()
    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[PathWalkers, SoluteInfo]:
        walkers = state if isinstance(state, PathWalkers) else self.engine.locate(state.x)
        start = walkers.x[:, list(self.engine.solute)]
        shape, log_end = self._proposed(start, generator)
        ratio = log_end - self._log_prob(start)
        if torch.isnan(ratio).any():
            raise InputError("the density of the proposal is not a number: the flow is broken; train it with a smaller learning rate")
        corners = self.way(start, shape)
        distance = (corners[:, -1] - start).square().sum(2).mean(1).sqrt()
        steps = self.schedule.steps(distance[:, None])
        result = self.engine.drive(walkers, corners, steps=steps, schedule=self.schedule, generator=generator)
        log_ratio = -(result.work + ratio)
        accepted = torch.rand(log_ratio.shape, generator=generator, dtype=torch.float64).log() < log_ratio
        end = torch.where(torch.isfinite(result.work)[:, None], result.xi, torch.nan)
        info = SoluteInfo(accepted=accepted, log_ratio=log_ratio, result=result, start=walkers.xi, end=end, log_proposal_ratio=ratio,
                          distance=distance)  # fmt: skip
        return chosen(accepted, result, walkers), info

    def _proposed(self, start: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Conformations and ln p of them."""
        shape, log_prob = self.proposal.sample(len(start), generator=generator)
        shape = shape.to(torch.float64)
        if self.images is None:
            return shape, log_prob.to(torch.float64)
        images = self.images(shape)
        apart = torch.stack([(superposed(image, start) - start).square().sum((1, 2)) for image in images])
        nearest = images[apart.argmin(0), torch.arange(len(shape))]
        return nearest, self._log_prob(nearest)

    def _log_prob(self, x: Tensor) -> Tensor:
        """ln p ``[w]``, averaged over the images; without the constant ln |G|."""
        images = x[None] if self.images is None else self.images(x)
        return torch.stack([self.proposal.log_prob(image).to(torch.float64) for image in images]).logsumexp(0)
