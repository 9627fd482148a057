"""Proposals of collective variables, of which some are periodic: whether their densities live on the same circles."""

from __future__ import annotations

import torch
from torch import Tensor

from boltzgen.core import Distribution
from boltzgen.errors import InputError
from boltzgen.mixtures import Mixture
from boltzgen.paths import Periods

#: Values that a proposal is tried on, and how far a log density may be from that one period on.
_TRIED, _TOLERANCE = 16, 1e-3
_REMEDY = "give the proposal the periods of the variables"


def require_same_circles(proposal: Distribution, periods: Periods) -> None:
    """Refuse a proposal that is no density on the circle of every periodic variable, part by part.

    Steered moves hold periodic values in [−P/2, P/2). A density over a line gives another number to the same angle one period on, and one
    with other limits draws angles that it denies when it meets them wrapped: either way the way back has another density than the way
    there, and the move is biased. Looked at are the ``periods`` that a density declares (all must be those of the variables), where its
    draws lie, and whether it is the same one period on, or zero. What a few draws do not show is caught by :func:`require_inside`; a
    density of another period is not for certain (one that is flat, or of half the period, looks the same) unless it declares it.

    Args:
        proposal: Density over the values ``[k]``.
        periods: Period of every variable, None where it has none.

    Raises:
        InputError: If it is not.
    """
    for part in _parts(proposal):
        declared = getattr(part, "periods", None)
        if declared is not None and (tuple(declared) or (None,) * len(periods)) != tuple(periods):
            raise InputError(f"expected a proposal with the periods {list(periods)}, got one with {list(declared)}; {_REMEDY}")
        if any(period is not None for period in periods):
            _require_periodic(part, periods)


def require_inside(values: Tensor, periods: Periods) -> None:
    """Refuse values ``[n, k]`` outside [−P/2, P/2] of a periodic variable.

    Raises:
        InputError: If there are any.
    """
    for column, period in enumerate(periods):
        if period is not None and bool((values[:, column].abs() > 0.5 * period * (1 + 1e-6)).any()):
            worst = float(values[values[:, column].abs().argmax(), column])
            raise InputError(f"expected proposed values of variable {column} from {-0.5 * period:.4g} to {0.5 * period:.4g}, as it has the "
                             f"period {period:.4g}, got {worst:.4g}; {_REMEDY}")  # fmt: skip


def _parts(proposal: Distribution) -> list[Distribution]:
    if not isinstance(proposal, Mixture):
        return [proposal]
    return [part for one in proposal.parts for part in _parts(one)]  # type: ignore[arg-type]


@torch.no_grad()
def _require_periodic(part: Distribution, periods: Periods) -> None:
    x = part.sample(_TRIED, generator=torch.Generator().manual_seed(0))[0].to(torch.float64)
    require_inside(x, periods)
    here = part.log_prob(x)
    for column, period in enumerate(periods):
        if period is None:
            continue
        moved = x.clone()
        moved[:, column] += period
        there = part.log_prob(moved)
        if not bool((torch.isneginf(there) | ((there - here).abs() < _TOLERANCE)).all()):
            raise InputError(f"the proposal is not periodic in variable {column}, whose period is {period:.4g}: its density is another one "
                             f"period on; {_REMEDY}")  # fmt: skip
