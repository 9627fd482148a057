"""Base distributions of flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from boltzgen.core import Context, Distribution


class TorusNormal(Distribution):
    """Independent uniform angles on [−π, π) and standard normal coordinates: the base of internal-coordinate flows.

    ln p(z) = −n_angles ln 2π − ½ Σ z² − ½ n_normal ln 2π, the first ``n_angles`` columns being the angles.

    Args:
        n_angles: Number of uniform angles.
        n_normal: Number of standard normal coordinates.
        dtype: Precision of the samples: float64 for densities that are reported, float32 is enough to train.
    """

    def __init__(self, n_angles: int, n_normal: int, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.n_angles, self.n_normal, self.dtype = n_angles, n_normal, dtype
        self.event_shape = (n_angles + n_normal,)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        angles = (2 * torch.rand(n, self.n_angles, generator=generator, dtype=self.dtype) - 1) * math.pi
        normal = torch.randn(n, self.n_normal, generator=generator, dtype=self.dtype)
        z = torch.cat([angles, normal], dim=1)
        return z, self.log_prob(z)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        normal = x[:, self.n_angles :].to(torch.float64)
        constant = (self.n_angles + 0.5 * self.n_normal) * math.log(2 * math.pi)
        return -0.5 * normal.square().sum(dim=1) - constant
