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
        return _normal_log_prob(x[:, self.n_angles :]) - self.n_angles * math.log(2 * math.pi)


class GivenAngles(Distribution):
    """Standard normal coordinates beside angles that are drawn from a given set: the base of the flow of y given its angles.

    ln p(z | s) = −½ Σ z² − ½ n_normal ln 2π: the density of the normal coordinates at given angles s (the first columns), whatever
    the distribution of the angles is.

    Args:
        angles: Set of angles ``[n, n_angles]``, drawn with replacement.
        n_normal: Number of standard normal coordinates.
    """

    angles: Tensor

    def __init__(self, angles: Tensor, n_normal: int) -> None:
        super().__init__()
        self.register_buffer("angles", angles, persistent=False)
        self.n_normal = n_normal
        self.event_shape = (angles.shape[1] + n_normal,)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.beside(self.angles[torch.randint(len(self.angles), (n,), generator=generator)], generator=generator)

    def beside(self, angles: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normal coordinates beside the given angles ``[n, n_angles]``, in their order: ``(z [n, n_angles + n_normal], log_prob [n])``."""
        normal = torch.randn(len(angles), self.n_normal, generator=generator, dtype=angles.dtype)
        z = torch.cat([angles, normal], dim=1)
        return z, self.log_prob(z)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return _normal_log_prob(x[:, self.angles.shape[1] :])


def _normal_log_prob(x: Tensor) -> Tensor:
    """ln of the standard normal density at ``x`` ``[b, d]``: ``[b]``, float64."""
    return -0.5 * x.to(torch.float64).square().sum(dim=1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
