"""Standardised columns to values in their own units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.errors import InputError


class Rescaled(Transform):
    """x = shift + scale z in another order of columns: x_{order[i]} = shift_i + scale_i z_i, ln|dx/dz| = Σ ln scale_i.

    Args:
        shift: ``[k]``, for the columns of z.
        scale: ``[k]``, positive.
        order: Column of x of every column of z.

    Raises:
        InputError: If a scale is not positive or the order is no permutation.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Sequence[float] | Tensor, scale: Sequence[float] | Tensor, *, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64).clone())
        if not bool((self.scale > 0).all()) or sorted(order) != list(range(len(self.scale))) or self.shift.shape != self.scale.shape:
            raise InputError(f"expected positive scales and a permutation, got {self.scale.tolist()} and {list(order)}")
        self.order = list(order)
        self.position = [self.order.index(column) for column in range(len(self.order))]

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x = self.shift + self.scale * z.to(torch.float64)
        return x[:, self.position], self.scale.log().sum().expand(len(z))

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z = (x[:, self.order].to(torch.float64) - self.shift) / self.scale
        return z, -self.scale.log().sum().expand(len(x))
