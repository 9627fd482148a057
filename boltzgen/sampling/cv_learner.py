"""A density over collective variables, learned from where walkers have been, as the proposal of steered moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from boltzgen.core import Distribution, WalkerState
from boltzgen.mixtures import Mixture
from boltzgen.paths import Schedule, SteeringEngine
from boltzgen.sampling.adaptive import Learner
from boltzgen.sampling.steered import SteeredMove, located

#: Draws of λ from every walker that is observed, and the share of the latest observations that is learned from.
_DRAWS, _RECENT = 4, 2 / 3


class DensityRecipe(Protocol):
    """How a density is learned from values, and made again from its weights."""

    def learned(self, values: Tensor, *, generator: torch.Generator) -> tuple[Distribution, Mapping[str, float]]:
        """A frozen density trained on values ``[n, k]``, and numbers to record."""

    def rebuilt(self, weights: Mapping[str, Tensor]) -> Distribution:
        """The density of which these are the weights."""


class FixedProposal(Learner):
    """A proposal that learns nothing.

    Args:
        engine: Runs the paths.
        proposal: ρ.
        schedule: How long paths are.
    """

    def __init__(self, engine: SteeringEngine, proposal: Distribution, *, schedule: Schedule) -> None:
        self.proposal = proposal
        self._move = SteeredMove(engine, proposal, schedule=schedule)

    def observe(self, state: WalkerState, *, generator: torch.Generator) -> None:
        return

    def learn(self, *, generator: torch.Generator) -> Mapping[str, float]:
        return {}

    def forget(self) -> None:
        return

    def move(self) -> SteeredMove:
        return self._move

    def snapshot(self) -> Mapping[str, Any]:
        return {}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        return


class LearnedProposal(Learner):
    """(1 − ε) ρ_θ + ε ρ_broad, with ρ_θ trained on draws of λ about the walkers' values: the density that makes the acceptance largest.

    Before anything is learned, values come from the broad density alone.

    Args:
        engine: Runs the paths.
        recipe: How ρ_θ is learned.
        broad: A density over all values of interest.
        defensive: ε, from 0 to 1.
        schedule: How long paths are.

    Attributes:
        density: ρ_θ; None before it is learned.
        proposal: ρ as it is now.
        observed: λ draws ``[m, k]`` of every observation, in order, until production begins.
    """

    def __init__(self, engine: SteeringEngine, recipe: DensityRecipe, *, broad: Distribution, defensive: float, schedule: Schedule) -> None:
        self.engine, self.recipe, self.broad, self.defensive, self.schedule = engine, recipe, broad, defensive, schedule
        self.observed: list[Tensor] = []
        self._take(None)

    def observe(self, state: WalkerState, *, generator: torch.Generator) -> None:
        xi = located(self.engine, state).xi
        draws = [self.engine.restraint.draw(xi, generator=generator) for _ in range(_DRAWS)]
        self.observed.append(torch.cat(draws))

    def learn(self, *, generator: torch.Generator) -> Mapping[str, float]:
        recent = self.observed[int((1 - _RECENT) * len(self.observed)) :]
        density, numbers = self.recipe.learned(torch.cat(recent), generator=generator)
        self._take(density)
        return numbers

    def forget(self) -> None:
        self.observed = []

    def move(self) -> SteeredMove:
        return self._move

    def snapshot(self) -> Mapping[str, Any]:
        weights = {} if self.density is None else {name: tensor.clone() for name, tensor in self.density.state_dict().items()}
        return {"observed": list(self.observed), "weights": weights}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        self.observed = list(snapshot["observed"])
        self._take(self.recipe.rebuilt(snapshot["weights"]) if snapshot["weights"] else None)

    def _take(self, density: Distribution | None) -> None:
        """Propose from a density from now on; the move checks it once, not in every cycle."""
        self.density, self.proposal = density, self.broad
        if density is not None:
            mixed = [1 - self.defensive, self.defensive]
            self.proposal = Mixture([density, self.broad], mixed) if self.defensive > 0 else density
        self._move = SteeredMove(self.engine, self.proposal, schedule=self.schedule)
