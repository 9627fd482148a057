"""Densities of what paths were sent to and of where walkers were, round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from boltzgen.core import Distribution
from boltzgen.paths import Paths, Periods
from boltzgen.workflows.path_records import History

#: Label of the last round.
PRODUCTION = "production"
#: Rows behind a density, and drawn from a proposal of many variables.
_MOST_ROWS, _DRAWS = 5000, 20_000
#: Values that a proposal drew are smoothed with this share of the restraint's width.
_SMOOTHING = 0.5


@dataclass(frozen=True)
class Round:
    """One round of a run.

    Attributes:
        label: Its number from 1, or ``production``.
        xi: Where the walkers were ``[n, k]``.
        paths: Its paths.
    """

    label: str
    xi: np.ndarray
    paths: Paths


def rounds_of(production: History, adaptation: History | None) -> list[Round]:
    """The rounds of a run in order, production last."""
    rounds = []
    if adaptation is not None:
        for number in np.unique(adaptation.round):
            paths = adaptation.paths.rows(adaptation.round[adaptation.paths.time] == number)
            rounds.append(Round(str(number + 1), _flat(adaptation.xi[adaptation.round == number]), paths))
    return [*rounds, Round(PRODUCTION, _flat(production.xi), production.paths)]


def some(rounds: Sequence[Round], most: int = 4) -> list[Round]:
    """The first, the last and evenly spaced rounds between, of those that have paths."""
    able = [one for one in rounds if len(one.paths)]
    chosen = np.unique(np.linspace(0, len(able) - 1, min(most, len(able))).round().astype(int))
    return [able[i] for i in chosen.tolist()]


@dataclass(frozen=True)
class Blur:
    """How densities are smoothed: normal, or von Mises where periodic.

    Attributes:
        widths: Standard deviation of every variable.
        periods: Period of every variable.
    """

    widths: Sequence[float]
    periods: Periods

    def density(self, values: np.ndarray, grid: np.ndarray, *, column: int, share: float = 1.0) -> np.ndarray:
        """Density ``[g]`` on a grid of one variable, of values ``[n, k]``, with a share of the width."""
        return self._kernel(_thinned(values)[:, column], grid, column, share).mean(axis=0)

    def joint(self, values: np.ndarray, grid: Sequence[np.ndarray]) -> np.ndarray:
        """Density ``[g, h]`` on a grid of two variables, of values ``[n, 2]``."""
        rows = _thinned(values)
        first, second = (self._kernel(rows[:, i], grid[i], i, 1.0) for i in (0, 1))
        return first.T @ second / len(rows)

    def _kernel(self, values: np.ndarray, grid: np.ndarray, column: int, share: float) -> np.ndarray:
        width, period = share * self.widths[column], self.periods[column]
        away = grid[None, :] - values[:, None]
        if period is None:
            return np.exp(-0.5 * (away / width) ** 2) / (width * math.sqrt(2 * math.pi))
        kappa = (period / (2 * math.pi * width)) ** 2
        return np.exp(kappa * (np.cos(2 * math.pi * away / period) - 1)) / (
            period * float(torch.special.i0e(torch.tensor(kappa, dtype=torch.float64)))
        )


def curve(one: Round, blur: Blur, grid: np.ndarray, proposal: Distribution) -> np.ndarray:
    """Density ``[g]`` of one variable from which the paths of a round were sent: exact in production, else of the values drawn."""
    if one.label == PRODUCTION or not len(one.paths):
        return exact(proposal, [grid])
    return blur.density(one.paths.end, grid, column=0, share=_SMOOTHING)


def exact(proposal: Distribution, grid: Sequence[np.ndarray]) -> np.ndarray:
    """Density of a proposal on a grid of all its variables ``[g, ...]``."""
    points = np.stack([axis.ravel() for axis in np.meshgrid(*grid, indexing="ij")], axis=1)
    with torch.no_grad():
        density = proposal.log_prob(torch.from_numpy(points)).exp()
    return density.to(torch.float64).numpy().reshape([len(axis) for axis in grid])


def marginal(proposal: Distribution, blur: Blur, grid: np.ndarray, *, column: int, seed: int) -> np.ndarray:
    """Density ``[g]`` of one variable of a proposal of many, from draws."""
    with torch.no_grad():
        drawn, _ = proposal.sample(_DRAWS, generator=torch.Generator().manual_seed(seed))
    return blur.density(drawn.numpy().astype(np.float64), grid, column=column, share=_SMOOTHING)


def _flat(xi: np.ndarray) -> np.ndarray:
    return xi.reshape(-1, xi.shape[-1])


def _thinned(values: np.ndarray) -> np.ndarray:
    return values[:: -(-len(values) // _MOST_ROWS)]
