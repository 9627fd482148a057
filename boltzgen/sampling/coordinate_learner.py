"""A flow over all coordinates, learned from where walkers have been, as the proposal of jumps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from boltzgen.core import Distribution, Move, Target, WalkerState
from boltzgen.errors import EnergyError, InputError
from boltzgen.sampling.adaptive import Learner
from boltzgen.sampling.chains import IndependenceMetropolis, ProposalInfo


class FlowRecipe(Protocol):
    """How a flow over all coordinates is learned from configurations, and made again from what it was."""

    def learned(self, x: Tensor, before: Distribution | None, *, generator: torch.Generator) -> tuple[Distribution, Mapping[str, float]]:
        """A frozen flow trained on ``[n, *event]``, begun from the one of the last round where that helps, and numbers to record."""

    def described(self, flow: Distribution) -> Mapping[str, Any]:
        """Tensors and plain values that :meth:`rebuilt` makes the flow from."""

    def rebuilt(self, content: Mapping[str, Any]) -> Distribution:
        """The flow that was described."""


class FlowJump(IndependenceMetropolis):
    """Independence Metropolis–Hastings of walkers that other moves have moved in between: they bring no density, so it is computed.

    The target is left invariant as it is, wherever the flow has no density: a walker there (another mirror image or labelling of
    equivalent atoms) has log q = −∞, and the proposal is refused, as is the way back, which would never be proposed.

    Args:
        flow: Proposal density, exact and frozen.
        target: Density left invariant.

    Raises:
        InexactDensityError: If the flow's density is only estimated, or the target is altered.
    """

    @torch.no_grad()
    def init(self, x: Tensor) -> WalkerState:
        u = self.target.reduced_potential(x).to(torch.float64)
        if not bool(torch.isfinite(u).all()):
            rows = torch.nonzero(~torch.isfinite(u)).flatten()[:10].tolist()
            raise InputError(f"walkers {rows} are where the target has no density; start them where the energy is finite")
        log_q = self.flow.log_prob(x).to(u)
        if bool((torch.isnan(log_q) | torch.isposinf(log_q)).any()):
            raise EnergyError(
                "the density of the flow is not a number at a walker: the flow is broken; train it with a smaller learning rate"
            )
        return WalkerState(x=x, u=u, log_q=log_q)

    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[WalkerState, ProposalInfo]:
        return super().step(state if state.log_q is not None else self.init(state.x), generator=generator)


class CoordinateLearner(Learner):
    """A flow over all coordinates, trained on the configurations of all walkers, from which jumps are proposed.

    Which ensemble is sampled: in production both moves leave exp(−u) invariant over all of space. A flow over internal coordinates makes
    the one mirror image, and the one labelling of equivalent hydrogens, that its data have, and dynamics at ordinary temperatures never
    leave these: so averages are those of that sector, which is all of space for any observable that does not tell labels apart.

    Every observation is remembered, those of the first rounds too, when walkers were still spread evenly over the basins they started
    in: a basin of low weight stays in the proposal. Which data are learned from changes only the acceptance.

    Args:
        target: What is sampled.
        recipe: How the flow is learned.
        remembered: Share of the latest observations that is learned from.

    Attributes:
        flow: The flow learned last; None before.
        observed: Configurations ``[w, *event]`` of every observation, in order, until production begins.

    References:
        Gabrié, Rotskoff and Vanden-Eijnden, PNAS 119, e2109420119 (2022); Wong, Gabrié and Foreman-Mackey, J. Open Source Softw. 8, 5021
        (2023), flowMC.
    """

    def __init__(self, target: Target, recipe: FlowRecipe, *, remembered: float = 1.0) -> None:
        if not 0 < remembered <= 1:
            raise InputError(f"expected a share of observations above 0 and up to 1, got {remembered}")
        self.target, self.recipe, self.remembered = target, recipe, remembered
        self.flow: Distribution | None = None
        self.observed: list[Tensor] = []

    def observe(self, state: WalkerState, *, generator: torch.Generator) -> None:
        self.observed.append(state.x.detach().clone())

    def learn(self, *, generator: torch.Generator) -> Mapping[str, float]:
        recent = self.observed[int((1 - self.remembered) * len(self.observed)) :]
        self.flow, numbers = self.recipe.learned(torch.cat(recent), self.flow, generator=generator)
        return numbers

    def forget(self) -> None:
        self.observed = []

    def move(self) -> Move | None:
        return None if self.flow is None else FlowJump(self.flow, self.target)

    def snapshot(self) -> Mapping[str, Any]:
        return {"observed": list(self.observed), "flow": {} if self.flow is None else dict(self.recipe.described(self.flow))}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        self.observed = list(snapshot["observed"])
        self.flow = self.recipe.rebuilt(snapshot["flow"]) if snapshot["flow"] else None
