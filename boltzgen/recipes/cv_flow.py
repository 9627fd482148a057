"""Flows over the values of a few collective variables, circular where they are periodic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzgen.core import Chain, Flow, Transform
from boltzgen.distributions import TorusNormal
from boltzgen.errors import InputError
from boltzgen.paths import Periods
from boltzgen.recipes.molecule import halves
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import ForwardKL
from boltzgen.transforms.coupling import BoundedSplineCoupling, CircularSplineCoupling
from boltzgen.transforms.rescaled import Rescaled

#: Learning rates of the knots of one spline, and of conditioners.
_RATE_OF_ONE, _RATE_OF_MANY = 0.05, 0.01
#: Which columns a layer transforms depends on nothing but their number, so that weights find their layers again.
_LAYOUT_SEED = 0


@dataclass(frozen=True)
class CVFlowSize:
    """How large the flow is, and how it is trained.

    Attributes:
        layers: Coupling layers; each variable is transformed in half of them. One variable alone gets one spline.
        bins: Spline bins.
        hidden: Widths of the hidden layers of every conditioner.
        steps: Optimiser steps.
        batch_size: Values per step.
        learning_rate: Peak of the cosine schedule; None takes one that suits one variable, or several.
    """

    layers: int = 4
    bins: int = 16
    hidden: tuple[int, ...] = (48,)
    steps: int = 300
    batch_size: int = 256
    learning_rate: float | None = None


def cv_flow(values: Tensor, periods: Periods, *, size: CVFlowSize, generator: torch.Generator) -> Flow:
    """An untrained flow over collective variables, scaled to data.

    latent (uniform angles, normal values) → spline couplings → units of the variables. On lines the splines reach five standard
    deviations of the data; beyond, the density is the normal one.

    Args:
        values: Data ``[n, k]``, periodic ones in any period.
        periods: Period of every variable.
        size: Size of the flow.
        generator: Source of the initial weights.

    Raises:
        InputError: If the data are too few or constant.
    """
    to_units = rescaled(values, periods)
    k, n_angles = len(periods), sum(period is not None for period in periods)
    layers: list[Transform] = []
    for transformed, rest in halves(k, size.layers if k > 1 else 1, torch.Generator().manual_seed(_LAYOUT_SEED)):
        layers += _layer(transformed, rest, k=k, n_angles=n_angles, size=size, generator=generator)
    return Flow(TorusNormal(n_angles, k - n_angles), Chain(*layers, to_units))


def rescaled(values: Tensor, periods: Periods) -> Rescaled:
    """Angles in rad, first, then standardised values, to values in the units and the order of data ``[n, k]``.

    Raises:
        InputError: If the data are too few or constant.
    """
    values = values.to(torch.float64)
    if len(values) < 2 or not bool(torch.isfinite(values).all()):
        raise InputError(f"expected two or more finite values to learn a density from, got {len(values)}")
    angles = [column for column, period in enumerate(periods) if period is not None]
    lines = [column for column, period in enumerate(periods) if period is None]
    spread = values[:, lines].std(0) if lines else torch.zeros(0)
    if not bool((spread > 0).all()):
        raise InputError("a collective variable is constant in the data: no density can be learned")
    scale = torch.cat([torch.tensor([periods[c] / (2 * math.pi) for c in angles], dtype=torch.float64), spread])  # type: ignore[operator]
    shift = torch.cat([torch.zeros(len(angles), dtype=torch.float64), values[:, lines].mean(0)])
    return Rescaled(shift, scale, order=angles + lines)


def learned_cv_flow(values: Tensor, periods: Periods, *, size: CVFlowSize, generator: torch.Generator) -> tuple[Flow, float]:
    """A flow trained by maximum likelihood on values ``[n, k]``, frozen, and its mean negative log likelihood on a held-out tenth.

    Raises:
        InputError: If the data are too few or constant.
        EnergyError: If training diverges.
    """
    held_out = torch.arange(len(values)) % 10 == 9
    flow = cv_flow(values[~held_out], periods, size=size, generator=generator)
    rate = size.learning_rate or (_RATE_OF_ONE if len(periods) == 1 else _RATE_OF_MANY)
    settings = FitSettings(
        steps=size.steps, learning_rate=rate, gradient_clip=10.0, ema_decay=0.98, checkpoint_every=size.steps,
        evaluate_every=size.steps,
    )  # fmt: skip
    objective = ForwardKL(values[~held_out].to(torch.float64), batch_size=min(size.batch_size, int((~held_out).sum())))
    fit(flow, objective, settings=settings, generator=generator, progress=False)
    flow.requires_grad_(False)
    flow.eval()
    loss = -flow.log_prob(values[held_out].to(torch.float64)).mean() if bool(held_out.any()) else torch.tensor(math.nan)
    return flow, float(loss)


@dataclass(frozen=True)
class CVRecipe(ABC):
    """How densities of collective variables with given periods are learned, and made again from their weights.

    Attributes:
        periods: Period of every variable.
    """

    periods: Periods

    @abstractmethod
    def begun(self, values: Tensor, *, generator: torch.Generator) -> Flow:
        """An untrained flow, scaled to values ``[n, k]``."""

    @abstractmethod
    def learned(self, values: Tensor, *, generator: torch.Generator) -> tuple[Flow, Mapping[str, float]]:
        """A frozen flow trained on values ``[n, k]``, and numbers to record, ``held_out_loss`` among them."""

    def untrained(self) -> Flow:
        """A frozen flow of the same shape, into which weights can be read."""
        placeholder = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, len(self.periods))
        return self.begun(placeholder, generator=torch.Generator().manual_seed(0)).requires_grad_(False).eval()

    def rebuilt(self, weights: Mapping[str, Tensor]) -> Flow:
        """The flow of which these are the weights."""
        flow = self.untrained()
        flow.load_state_dict(dict(weights))
        return flow


@dataclass(frozen=True)
class CVFlowRecipe(CVRecipe):
    """How densities of collective variables are learned by maximum likelihood.

    Attributes:
        periods: Period of every variable.
        size: Size and training of the flow.
    """

    size: CVFlowSize = CVFlowSize()

    def begun(self, values: Tensor, *, generator: torch.Generator) -> Flow:
        return cv_flow(values, self.periods, size=self.size, generator=generator)

    def learned(self, values: Tensor, *, generator: torch.Generator) -> tuple[Flow, Mapping[str, float]]:
        """A frozen flow trained on values ``[n, k]``, and its held-out loss."""
        flow, loss = learned_cv_flow(values, self.periods, size=self.size, generator=generator)
        return flow, {"held_out_loss": loss}


def _layer(
    transformed: Sequence[int], rest: Sequence[int], *, k: int, n_angles: int, size: CVFlowSize, generator: torch.Generator
) -> list[Transform]:
    """Splines of some columns given the others: one layer for angles and one for the rest."""
    given = {"angles": [c for c in rest if c < n_angles], "linear": [c for c in rest if c >= n_angles]}
    common = {"bins": size.bins, "hidden": size.hidden if rest else (), "generator": generator, "compiled": False}
    circular, bounded = [c for c in transformed if c < n_angles], [c for c in transformed if c >= n_angles]
    layers: list[Transform] = []
    if circular:
        layers.append(CircularSplineCoupling(k, transformed=circular, fold=[1] * len(circular), **given, **common))  # type: ignore[arg-type]
    if bounded:
        layers.append(BoundedSplineCoupling(k, transformed=bounded, **given, **common))  # type: ignore[arg-type]
    return layers
