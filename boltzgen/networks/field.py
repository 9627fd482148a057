"""What every velocity field is, of particles or of other values: a network of time and positions, with an exact divergence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

#: Numbers that the tangents of one chunk of directions may hold: about what stays in a processor's cache.
_CHUNK_NUMBERS = 2_000_000
#: 1 − t at which late times turn from even in t to even in ln(1 − t): about where noise is as small as bonds are wide.
END = 0.03


class VelocityField(nn.Module, ABC):
    """A velocity v(t, x) of configurations of any shape; every row of a batch on its own."""

    @property
    @abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a configuration."""

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocities ``[b, *event]`` at times ``t`` (a scalar or ``[b]``) and positions ``x`` ``[b, *event]``."""

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities ``[b, *event]`` and their exact divergence Σ ∂v/∂x ``[b]``, by forward differentiation in all directions."""
        return self(t, x), self._along_all(t, x, lambda tangent, direction: (tangent * direction).flatten(1).sum(dim=1)).sum(dim=0)

    def jacobian(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities ``[b, *event]`` and their Jacobian ∂v/∂x ``[b, size, size]``, whose first index is that of x, in the same way."""
        return self(t, x), self._along_all(t, x, lambda tangent, direction: tangent.flatten(1)).transpose(0, 1)

    def _along_all(self, t: Tensor, x: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A function of the derivative along a direction, and of the direction, for all of them: side by side, in chunks."""
        size = x[0].numel()
        directions = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *x.shape[1:])

        def along(direction: Tensor) -> Tensor:
            _, tangent = along_directions(lambda y: self(t, y), (x,), (direction.expand_as(x),))
            return of(tangent, direction)

        chunk = max(1, _CHUNK_NUMBERS // max(1, len(x) * self.event_shape[0] ** 2 * 64))
        return vmap(along, chunk_size=chunk)(directions)


class ParticleField(VelocityField):
    """A velocity v(t, x) ``[b, n, d]`` of n particles in d dimensions.

    Attributes:
        n_particles: Number of particles.
        n_dimensions: Dimensions of space.
        is_mirrored: Whether velocities of a mirror image are the mirrored velocities.
    """

    n_particles: int
    n_dimensions: int
    is_mirrored: bool = True

    @property
    def event_shape(self) -> tuple[int, ...]:
        """n and d."""
        return self.n_particles, self.n_dimensions


def along_directions(function: Callable[..., Any], at: tuple[Tensor, ...], directions: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Value of a function and its derivative along directions of its arguments, of the same structure."""
    value, derivative = jvp(function, at, directions)  # type: ignore[misc]
    return value, derivative


def late_times(s: Tensor, *, end: float = END) -> Tensor:
    """Times t with ln(1 − t + end) even in s: from 0 to 1 as s, ever denser towards the end."""
    return ((1.0 + end) * (1.0 - (end / (1.0 + end)) ** s)).clamp_max(1.0)


def time_features(t: Tensor, n_rows: int, n_features: int) -> Tensor:
    """cos(π k t), k = 0 … n_features − 1, of times ``t`` (a scalar or ``[b]``): ``[b, n_features]``."""
    k = torch.arange(n_features, dtype=t.dtype, device=t.device)
    return torch.cos(torch.pi * t.reshape(-1, 1) * k).expand(n_rows, -1)
