"""Newton's method for the start of a step of which the end is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from boltzgen.transforms.matrices import solutions

#: Jacobians after which a step of the solver counts as one that cannot be undone, and steps of Newton's method with each.
_NEWTON_STEPS, _CHORDS = 10, 4
#: How close, in roundings of the largest coordinate, counts as undone: at once, and where the next step comes no closer.
_CLOSE, _NEAR = 8, 1000


class Inverted(NamedTuple):
    """Starts of steps."""

    y: Tensor  # [b, n, d]; where a row is not there, the last guess
    jacobian: Tensor  # of the step at y [b, n d, n d]
    is_there: Tensor  # [b]


def invert_step(carry: Callable[[Tensor], tuple[Tensor, Tensor]], follow: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Inverted:
    """The y that a step leads to ``x``, from a guess, every row until it is there; each Jacobian serves some steps.

    Args:
        carry: The step, with its Jacobian.
        follow: The step alone.
        x: Where it leads ``[b, n, d]``.
        y: The guess.
    """
    rounding = torch.finfo(x.dtype).eps * x.abs().amax(dim=(1, 2))
    before, is_there = torch.full_like(rounding, math.inf), torch.zeros_like(rounding, dtype=torch.bool)
    rows = torch.arange(len(x), device=x.device)
    y, jacobian = y.clone(), x.new_zeros(len(x), x[0].numel(), x[0].numel())

    def close(moved: Tensor) -> Tensor:
        now = (moved - x[rows]).abs().amax(dim=(1, 2))
        there = (now <= _CLOSE * rounding[rows]) | ((now <= _NEAR * rounding[rows]) & (now > 0.5 * before[rows]))
        before[rows] = now
        return there

    for _ in range(_NEWTON_STEPS):
        moved, jacobian[rows] = carry(y[rows])
        there = close(moved)
        is_there[rows[there]] = True
        going = ~there & torch.isfinite(moved).flatten(1).all(dim=1)
        rows, moved = rows[going], moved[going]
        if not len(rows):
            break
        for _ in range(_CHORDS):
            y[rows] += through_inverse(x[rows] - moved, jacobian[rows])
            moved = follow(y[rows])
            if bool(close(moved).all()):
                break
    return Inverted(y, jacobian, is_there)


def through_inverse(residual: Tensor, jacobian: Tensor) -> Tensor:
    """residual M⁻¹ ``[b, n, d]`` of Jacobians M ``[b, n d, n d]`` whose first index is that of the start."""
    return solutions(jacobian.transpose(1, 2), residual.flatten(1)).reshape(residual.shape)
