"""Proposals of values of collective variables that are written down instead of learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from boltzgen.distributions import NormalMixture


def normal_mixture(
    means: Sequence[Sequence[float]],
    widths: Sequence[Sequence[float]],
    *,
    weights: Sequence[float] | None = None,
    periods: Sequence[float | None] | None = None,
) -> NormalMixture:
    """A mixture of normals over values of collective variables, one normal for a basin.

    Args:
        means: Centres, ``m`` lists of one number for every variable, in its unit.
        widths: Standard deviations, likewise.
        weights: ``m`` weights, up to a factor; all equal by default.
        periods: Period of every variable, None where it has none.

    Raises:
        InputError: If the numbers do not fit.
    """
    return NormalMixture(
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(widths, dtype=torch.float64),
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        periods=periods,
    )
