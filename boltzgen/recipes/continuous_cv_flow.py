"""Continuous flows over the values of a few collective variables, circular where they are periodic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzgen.core import Chain, Flow, require_exact_density
from boltzgen.distributions import TorusNormal
from boltzgen.errors import InexactDensityError
from boltzgen.networks.torus_field import TorusField
from boltzgen.paths import Periods
from boltzgen.recipes.cv_flow import CVRecipe, rescaled
from boltzgen.training.couplings import NearestImages
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.flow_matching import FlowMatching
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep, measure_log_det_error, more_steps
from boltzgen.transforms.internal_map import Turned
from boltzgen.transforms.rescaled import Rescaled

#: Steps of the solver that are tried first, and most of them; the error in nats that is aimed at.
_FIRST_STEPS, _MOST_STEPS, _LOG_DET_ERROR = 8, 256, 1e-3
#: How far from the centre of the data, in their spread, the density is measured, and at how many places.
_FAR, _PLACES = 8.0, 256


@dataclass(frozen=True)
class ContinuousCVFlowSize:
    """How large the velocity field is, and how it is trained.

    Attributes:
        hidden: Widths of its hidden layers.
        harmonics: Largest multiple of an angle that it sees.
        steps: Optimiser steps.
        batch_size: Pairs per step.
        learning_rate: Peak of the cosine schedule.
    """

    hidden: tuple[int, ...] = (64, 64)
    harmonics: int = 4
    steps: int = 1000
    batch_size: int = 512
    learning_rate: float = 1e-2


def continuous_cv_flow(values: Tensor, periods: Periods, *, size: ContinuousCVFlowSize, generator: torch.Generator) -> Flow:
    """An untrained continuous flow over collective variables, scaled to data.

    latent (uniform angles, normal values) → along a velocity field → angles in [−π, π) → units of the variables.

    Args:
        values: Data ``[n, k]``, periodic ones in any period.
        periods: Period of every variable.
        size: Size of the field.
        generator: Source of the initial weights.

    Raises:
        InputError: If the data are too few or constant.
    """
    to_units = rescaled(values, periods)
    n_angles = sum(period is not None for period in periods)
    n_linear = len(periods) - n_angles
    field = TorusField(n_angles, n_linear, harmonics=size.harmonics, hidden=size.hidden, generator=generator).double()
    carried = ContinuousTransform(field, FixedStep(_FIRST_STEPS), checkpointing=False)
    return Flow(TorusNormal(n_angles, n_linear), Chain(carried, Turned(torch.zeros(n_angles)), to_units))


@dataclass(frozen=True)
class ContinuousCVRecipe(CVRecipe):
    """How densities of collective variables with given periods are learned by flow matching, and made again from their weights.

    Paths are straight on lines and shortest arcs on circles. After training, the steps of the solver are increased until the log density
    is right to 0.001 nats at samples, at the data and far from them; their number is stored with the weights.

    Attributes:
        periods: Period of every variable.
        size: Size and training of the flow.
    """

    size: ContinuousCVFlowSize = ContinuousCVFlowSize()

    def begun(self, values: Tensor, *, generator: torch.Generator) -> Flow:
        return continuous_cv_flow(values, self.periods, size=self.size, generator=generator)

    def learned(self, values: Tensor, *, generator: torch.Generator) -> tuple[Flow, Mapping[str, float]]:
        """A frozen flow trained on values ``[n, k]``; its held-out loss, the error of its log density and the steps of its solver.

        Raises:
            InputError: If the data are too few or constant.
            EnergyError: If training diverges.
            InexactDensityError: If the log density is not exact with the most steps.
        """
        values = values.to(torch.float64)
        held_out = torch.arange(len(values)) % 10 == 9
        flow = self.begun(values[~held_out], generator=generator)
        carried, to_units = _parts(flow)
        latent, _ = to_units.inverse(values[~held_out])
        shortest = NearestImages(sum(period is not None for period in self.periods))
        objective = FlowMatching(carried.field, flow.base, latent, batch_size=self.size.batch_size, coupling=shortest)
        settings = FitSettings(
            steps=self.size.steps, learning_rate=self.size.learning_rate, gradient_clip=10.0, ema_decay=0.99,
            checkpoint_every=self.size.steps, evaluate_every=self.size.steps,
        )  # fmt: skip
        fit(flow, objective, settings=settings, generator=generator, progress=False)
        flow.requires_grad_(False).eval()
        n_steps = _solved_exactly(flow, values, self.periods, generator=generator)
        loss = -flow.log_prob(values[held_out]).mean() if bool(held_out.any()) else torch.tensor(math.nan)
        return flow, {"held_out_loss": float(loss), "log_det_error": float(flow.log_det_error or 0.0), "solver_steps": float(n_steps)}

    def rebuilt(self, weights: Mapping[str, Tensor]) -> Flow:
        """The flow of which these are the weights, with the steps of the solver that its error was measured with."""
        flow = super().rebuilt(weights)
        carried, _ = _parts(flow)
        carried.solver = FixedStep(carried.measured_steps or _FIRST_STEPS)
        return flow


def _parts(flow: Flow) -> tuple[ContinuousTransform, Rescaled]:
    """What is learned of a flow, and what carries its result to the units of the variables."""
    assert isinstance(flow.transform, Chain)  # as continuous_cv_flow made it
    carried, _, to_units = flow.transform.transforms
    assert isinstance(carried, ContinuousTransform)
    assert isinstance(to_units, Rescaled)
    return carried, to_units


def _solved_exactly(flow: Flow, values: Tensor, periods: Periods, *, generator: torch.Generator) -> int:
    """Give the solver of a trained flow as many steps as its log density needs, and return their number."""
    carried, to_units = _parts(flow)
    n_angles = sum(period is not None for period in periods)
    reach = torch.tensor([math.pi] * n_angles + [_FAR] * (len(periods) - n_angles), dtype=torch.float64)
    far = reach * (2 * torch.rand(_PLACES, len(periods), generator=generator, dtype=torch.float64) - 1)
    some = values[torch.randint(len(values), (_PLACES,), generator=generator)]
    places = torch.cat([some, to_units(far)[0]])
    n_steps = _FIRST_STEPS
    while True:
        carried.solver = FixedStep(n_steps)
        error = measure_log_det_error(flow, data=places, generator=generator)
        if error <= _LOG_DET_ERROR or n_steps == _MOST_STEPS:
            break
        n_steps = min(more_steps(n_steps, error / _LOG_DET_ERROR), _MOST_STEPS)
    try:
        require_exact_density(flow.log_det_error)
    except InexactDensityError as failure:
        raise InexactDensityError(
            f"{failure}, after {n_steps} steps of the solver: the learned velocities are too steep. Train with a smaller learning rate or "
            "a smaller field, or take the coupling flow"
        ) from failure
    return n_steps
