"""What fields of particle pairs share: kinds from labels, smooth distances, radial functions, initial weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.networks.field import time_features

#: Softening of distances, in lengths: a distance is √(r² + ε²), smooth where particles coincide.
EPSILON = 0.01


def one_hot_kinds(labels: Sequence[int] | None, n_particles: int) -> Tensor:
    """Kinds of particles as rows of ones and zeros ``[n, n_kinds]``; equal labels are one kind, without labels all are.

    Raises:
        ValueError: There is not exactly one label for each particle.
        TypeError: A label is not an integer.
    """
    kinds = torch.tensor([0] * n_particles if labels is None else [operator.index(label) for label in labels], dtype=torch.int64)
    if len(kinds) != n_particles:
        raise ValueError(f"expected one label for each of {n_particles} particles, got {len(kinds)}")
    return nn.functional.one_hot(torch.unique(kinds, return_inverse=True)[1]).to(torch.get_default_dtype())


def shared_by_kinds(values: Tensor, kinds: Tensor) -> Tensor:
    """A matrix over particles ``[n, n]`` averaged over those of equal kinds ``[n]``, the diagonal by itself."""
    member = nn.functional.one_hot(torch.unique(kinds, return_inverse=True)[1]).to(values)
    one = torch.eye(len(kinds)).to(values)
    count = member.T @ (1.0 - one) @ member
    between = member @ ((member.T @ ((1.0 - one) * values) @ member) / count.clamp_min(1.0)) @ member.T
    own = member @ ((member.T @ torch.diagonal(values)) / member.sum(0))
    return (1.0 - one) * between + torch.diag(own)


def nearest_images(d: Tensor, box: Tensor | None) -> Tensor:
    """Differences of positions ``[..., 3]`` in nm to the nearest image in a rectangular box ``[3]``."""
    return d if box is None else d - box.to(d) * torch.round(d / box.to(d))


def neighbour_distance(x: Tensor, *, edges: Tensor | None = None, most: int = 1000) -> float:
    """Median distance in nm of a particle from its nearest neighbour.

    Args:
        x: Configurations ``[m, n, d]`` in nm.
        edges: Edges of a rectangular periodic box in nm ``[d]``; None without one.
        most: About how many of the configurations are looked at, evenly spaced.
    """
    x = x[:: max(1, len(x) // most)]
    r = torch.cdist(x, x) if edges is None else nearest_images(x.unsqueeze(2) - x.unsqueeze(1), edges).norm(dim=3)
    return float((r + torch.diag(torch.full((r.shape[1],), math.inf, dtype=r.dtype))).amin(dim=2).median())


def envelope(x: Tensor) -> Tensor:
    """w(x) = 1 − x⁴ (35 − 84 x + 70 x² − 20 x³) up to x = 1, zero beyond: falls from one with three continuous derivatives, x ≥ 0."""
    x = x.clamp_max(1.0)
    return 1.0 - x.pow(4) * (35.0 - 84.0 * x + 70.0 * x.square() - 20.0 * x.pow(3))


def envelope_slope(x: Tensor) -> Tensor:
    """dw/dx = −140 x³ (1 − x)³ of the :func:`envelope`."""
    x = x.clamp_max(1.0)
    return -140.0 * (x * (1.0 - x)).pow(3)


class RadialBasis(nn.Module):
    """Smooth functions of distance that are finest at short distances and never end.

        ρ = √(r²/ℓ² + ε²),   q = ρ/(1 + ρ),   B_k(ρ) = exp(−½ ((q − c_k)/σ)²)

    Args:
        n_functions: Number K of Gaussians, at least two; centres from 0 to 1, a distance σ apart.
        length: Unit ℓ of length.

    Raises:
        ValueError: A number is too small.
    """

    centres: Tensor

    def __init__(self, n_functions: int, *, length: float) -> None:
        super().__init__()
        if n_functions < 2 or not length > 0:
            raise ValueError(f"expected at least 2 functions and a positive length, got {n_functions} and {length}")
        self.length = length
        self.register_buffer("centres", torch.linspace(0.0, 1.0, n_functions), persistent=False)

    def distance(self, r: Tensor) -> Tensor:
        """Smooth distances ρ ``[..., 1]`` of vectors r ``[..., d]``."""
        return (r.square().sum(-1, keepdim=True) / self.length**2 + EPSILON**2).sqrt()

    def forward(self, distance: Tensor) -> Tensor:
        """Functions ``[..., K]`` of smooth distances ρ ``[..., 1]``."""
        return torch.exp(-0.5 * self._offsets(distance).square())

    def slopes(self, distance: Tensor) -> Tensor:
        """Derivatives dB_k/dρ ``[..., K]``."""
        return -(len(self.centres) - 1) * self._offsets(distance) * self(distance) / (1.0 + distance).square()

    def _offsets(self, distance: Tensor) -> Tensor:
        """(q − c_k)/σ."""
        return (distance / (1.0 + distance) - self.centres) * (len(self.centres) - 1)


def bounded(h: Tensor, *, dim: tuple[int, ...] = (-1,)) -> Tensor:
    """h / √(1 + ⟨h²⟩) with the mean over ``dim``: unchanged where small, of size one where large, so that layers do not run away."""
    return h / (1.0 + h.square().mean(dim=dim, keepdim=True)).sqrt()


def draw_weights(module: nn.Module, *, silent: Sequence[nn.Linear], generator: torch.Generator) -> None:
    """Draw all weights uniformly, so that outputs vary as much as inputs; biases, and everything in ``silent`` layers, are zero."""
    for parameter in module.parameters():
        bound = (3.0 / parameter.shape[-1]) ** 0.5 if parameter.ndim >= 2 else 0.0
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    for layer in silent:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def kinds_and_times(kinds: Tensor, t: Tensor, like: Tensor, n_times: int) -> Tensor:
    """Kinds ``[n, n_kinds]`` of particles beside features of times ``t``, ``[b, n, n_kinds + n_times]``, for positions ``[b, n, d]``."""
    times = time_features(t.to(like.dtype), len(like), n_times).unsqueeze(1).expand(-1, len(kinds), -1)
    return torch.cat([kinds.expand(len(like), -1, -1), times], dim=-1)


def weights(*shape: int, fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """Weights drawn uniformly, of variance 1/fan_in."""
    return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * (3.0 / fan_in) ** 0.5)


def at_times(coefficients: Tensor, times: Tensor) -> Tensor:
    """Weights ``[b, *shape]`` at times given by their features ``[b, T]``, from coefficients ``[T, *shape]``."""
    return (times @ coefficients.flatten(1)).reshape(len(times), *coefficients.shape[1:])


def silu_slope(x: Tensor) -> Tensor:
    """Derivative of x · sigmoid(x)."""
    s = torch.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))
