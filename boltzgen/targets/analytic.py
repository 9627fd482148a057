"""Targets with a known normalisation and exact samples, for checks against an analytic answer."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.integrate import simpson
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import InputError, ShapeError


class Gaussian(Target):
    """u(x) = ½ (x − μ)ᵀ Σ⁻¹ (x − μ), ln Z = ½ ln det(2πΣ).

    Args:
        mean: μ, of any shape ``[*event]`` with d elements.
        covariance: Σ ``[d, d]``, over the flattened event.
    """

    def __init__(self, mean: Tensor, *, covariance: Tensor) -> None:
        self.event_shape = tuple(mean.shape)
        self.mean = mean.to(torch.float64).flatten()
        d = len(self.mean)
        if covariance.shape != (d, d):
            raise ShapeError(f"expected a covariance [{d}, {d}] for {d} coordinates, got {list(covariance.shape)}")
        self.cholesky = _cholesky(covariance.to(torch.float64))
        self.precision = torch.cholesky_inverse(self.cholesky)
        self.log_z = 0.5 * d * math.log(2 * math.pi) + float(self.cholesky.diagonal().log().sum())

    def reduced_potential(self, x: Tensor) -> Tensor:
        deviation = x.to(torch.float64).flatten(1) - self.mean
        return 0.5 * torch.einsum("bi,ij,bj->b", deviation, self.precision, deviation)

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Exact samples ``[n, *event]``, float64."""
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + noise @ self.cholesky.T).reshape(n, *self.event_shape)


class GaussianMixture(Target):
    """u(x) = −ln Σ_k c_k exp(−½ (x − μ_k)ᵀ Σ_k⁻¹ (x − μ_k)), ln Z = ln Σ_k c_k √det(2πΣ_k).

    Args:
        means: μ ``[k, d]``.
        covariances: Σ ``[k, d, d]``.
        heights: c ``[k]``, positive; exp(−u) of each component at its centre.
    """

    def __init__(self, means: Tensor, *, covariances: Tensor, heights: Tensor) -> None:
        k, d = means.shape
        if covariances.shape != (k, d, d) or heights.shape != (k,):
            raise ShapeError(
                f"expected covariances [{k}, {d}, {d}] and heights [{k}], got {list(covariances.shape)} and {list(heights.shape)}"
            )
        if not (heights > 0).all():
            raise InputError(f"expected positive heights, got {heights.tolist()}")
        self.event_shape = (d,)
        self.means = means.to(torch.float64)
        self.log_heights = heights.to(torch.float64).log()
        self.cholesky = _cholesky(covariances.to(torch.float64))
        self.precisions = torch.cholesky_inverse(self.cholesky)
        log_volumes = 0.5 * d * math.log(2 * math.pi) + self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        self.log_masses = self.log_heights + log_volumes
        self.log_z = float(torch.logsumexp(self.log_masses, 0))

    def reduced_potential(self, x: Tensor) -> Tensor:
        deviation = x.to(torch.float64)[:, None, :] - self.means
        squares = torch.einsum("bki,kij,bkj->bk", deviation, self.precisions, deviation)
        return -torch.logsumexp(self.log_heights - 0.5 * squares, dim=1)

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Exact samples ``[n, d]``, float64."""
        component = torch.multinomial(self.log_masses.softmax(0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + torch.einsum("bij,bj->bi", self.cholesky[component], noise)


class DoubleWell(Target):
    """u(x) = h ((x₁/w)² − 1)² + t x₁/w + ½ κ Σ_{i≥2} x_i²: two basins, x₁ < 0 and x₁ > 0; ln Z by quadrature.

    Args:
        dimensions: Number of coordinates, 1 or more.
        barrier: h in kT.
        width: w in nm; the minima lie near ±w.
        tilt: t in kT; positive favours x₁ < 0.
        stiffness: κ in kT/nm².
    """

    def __init__(self, dimensions: int = 1, *, barrier: float = 4.0, width: float = 1.0, tilt: float = 0.5, stiffness: float = 1.0) -> None:
        if dimensions < 1 or barrier <= 0 or width <= 0 or stiffness <= 0:
            raise InputError("expected at least one dimension and positive barrier, width and stiffness")
        self.event_shape = (dimensions,)
        self.barrier, self.width, self.tilt, self.stiffness = barrier, width, tilt, stiffness
        # u₁ is 60 kT or more above its minimum at both ends of the grid, so nothing is cut off.
        reach = width * math.sqrt(1 + math.sqrt((60 + 4 * abs(tilt)) / barrier) + abs(tilt) / barrier)
        self.grid = torch.linspace(-reach, reach, 40_001, dtype=torch.float64)
        self.density = torch.exp(-self._along_first(self.grid))
        middle = len(self.grid) // 2
        left, right = (float(simpson(self.density[half], x=self.grid[half])) for half in (slice(middle + 1), slice(middle, None)))
        self.log_z = math.log(left + right) + 0.5 * (dimensions - 1) * math.log(2 * math.pi / stiffness)
        #: F(x₁ > 0) − F(x₁ < 0) in kT.
        self.free_energy_difference = math.log(left / right)

    def _along_first(self, x: Tensor) -> Tensor:
        s = x / self.width
        return self.barrier * (s**2 - 1) ** 2 + self.tilt * s

    def reduced_potential(self, x: Tensor) -> Tensor:
        x = x.to(torch.float64)
        return self._along_first(x[:, 0]) + 0.5 * self.stiffness * (x[:, 1:] ** 2).sum(1)

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Samples ``[n, d]``, float64, exact up to the interpolation of the cumulative density (relative error below 1e-6)."""
        middles = 0.5 * (self.density[1:] + self.density[:-1])
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), middles.cumsum(0)])
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        first = torch.from_numpy(np.interp(uniform.numpy(), (cumulative / cumulative[-1]).numpy(), self.grid.numpy()))
        rest = torch.randn(n, self.event_shape[0] - 1, generator=generator, dtype=torch.float64) / math.sqrt(self.stiffness)
        return torch.cat([first[:, None], rest], dim=1)


class VonMisesProduct(Target):
    """u(θ) = −Σ κ_i cos(θ_i − μ_i) on the torus, ln Z = Σ ln(2π I₀(κ_i)) over one period of every angle.

    Args:
        mean: μ ``[d]`` in rad.
        concentration: κ ``[d]``, positive.
    """

    def __init__(self, mean: Tensor, *, concentration: Tensor) -> None:
        if mean.ndim != 1 or concentration.shape != mean.shape or not (concentration > 0).all():
            raise ShapeError(f"expected mean [d] and positive concentration [d], got {list(mean.shape)} and {list(concentration.shape)}")
        self.event_shape = tuple(mean.shape)
        self.mean, self.concentration = mean.to(torch.float64), concentration.to(torch.float64)
        log_bessel = torch.special.i0e(self.concentration).log() + self.concentration
        self.log_z = float((math.log(2 * math.pi) + log_bessel).sum())

    def reduced_potential(self, x: Tensor) -> Tensor:
        return -(self.concentration * torch.cos(x.to(torch.float64) - self.mean)).sum(1)

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Exact samples ``[n, d]`` in [−π, π), float64."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        draws = np.random.default_rng(seed).vonmises(self.mean.numpy(), self.concentration.numpy(), size=(n, len(self.mean)))
        return torch.from_numpy(draws)


def _cholesky(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        raise InputError("expected a symmetric positive definite covariance; check its eigenvalues")
    return factor
