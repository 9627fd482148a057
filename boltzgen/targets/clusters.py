"""Clusters of equal particles with analytic energies: double wells, Lennard-Jones, and a Coulomb gas in a trap.

Lengths carry no unit of their own and are read as nm; energies are in kT. Particles are labelled: Z is the integral over all
configurations, without 1/n!, so a sampler that knows one ordering only misses ln n!.

``DoubleWellCluster`` and ``LennardJonesCluster`` do not change under translation, so exp(−u) cannot be normalised over all of space. Their
density is that on the mean-free subspace Σ_i x_i = 0, of d (n − 1) dimensions, with the volume it has as a part of space: that of an
orthonormal basis of it. ``CoulombGas`` has a trap at the origin and is a density over all n d coordinates.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import EnergyError, InputError, ShapeError

#: Square of the distance in nm² below which particles coincide; above it no power in this module overflows.
_COINCIDENT_SQUARE = 1e-40

#: Pairs in one piece of work, so that intermediate results stay in the cache of a processor.
_PAIRS_AT_ONCE = 32_768


class _Cluster(Target):
    """u(x) = Σ_{i<j} φ(|x_i − x_j|²) + ½ k Σ_i |x_i|² of equal particles.

    Work runs with particles first and the batch last, which makes pair differences copies of whole blocks.

    Attributes:
        trap: k in kT/nm².
        diverges: Whether φ is +inf at contact.
    """

    trap: float = 0.0
    diverges: bool

    def __init__(self, n: int, d: int) -> None:
        if n < 2 or d < 1:
            raise InputError(f"expected at least two particles in at least one dimension, got n = {n} and d = {d}")
        self.event_shape = (n, d)
        self.labels = ("A",) * n
        self._first, self._second = torch.triu_indices(n, n, offset=1)

    @abstractmethod
    def _pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """φ in kT and dφ/d(r²) in kT/nm² of squared distances r², elementwise."""

    def reduced_potential(self, x: Tensor) -> Tensor:
        u = torch.cat([self._piece(rows)[0] for rows in self._pieces(x)])
        _require_numbers(u)
        return u

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        us, gradients = [], []
        for rows in self._pieces(x):
            u, y, difference, slope = self._piece(rows)
            pull = difference.mul_(slope[:, None])  # dφ/dx_i = 2 φ' (x_i − x_j) = −dφ/dx_j
            gradient = self.trap * y
            gradient.index_add_(0, self._first.to(x.device), pull, alpha=2.0).index_add_(0, self._second.to(x.device), pull, alpha=-2.0)
            us.append(u)
            gradients.append(gradient.masked_fill_(torch.isposinf(u), 0.0).permute(2, 0, 1).to(x.dtype))
        u = torch.cat(us)
        _require_numbers(u)
        return u, torch.cat(gradients).contiguous()

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        if tuple(x.shape[1:]) != self.event_shape:
            raise ShapeError(f"expected configurations [b, {self.event_shape[0]}, {self.event_shape[1]}] in nm, got {list(x.shape)}")
        return x.split(max(1, _PAIRS_AT_ONCE // len(self._first)))

    def _piece(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u ``[b]``, x ``[n, d, b]``, pair differences ``[pairs, d, b]`` and dφ/d(r²) ``[pairs, b]`` of some rows."""
        y = rows.to(torch.float64).permute(1, 2, 0).contiguous()
        difference = y.index_select(0, self._first.to(y.device)) - y.index_select(0, self._second.to(y.device))
        square = difference.square().sum(1)
        energy, slope = self._pair(square.clamp(min=_COINCIDENT_SQUARE))
        u = energy.sum(0)
        if self.trap > 0:
            u = u + 0.5 * self.trap * y.square().sum((0, 1))
        if self.diverges:
            u = u.masked_fill(square.detach().amin(0) < _COINCIDENT_SQUARE, math.inf)
        return u, y, difference, slope


class DoubleWellCluster(_Cluster):
    """u(x) = Σ_{i<j} a (r_ij − r₀)⁴ + b (r_ij − r₀)²: every pair prefers two distances, r₀ ± √(−b / 2a). DW4 by default.

    A density on the mean-free subspace (see the module). At r = 0 the energy is finite with a cusp; the gradient of that pair is 0 there.

    Args:
        n: Number of particles.
        d: Dimensions of space.
        quartic: a in kT/nm⁴, positive.
        quadratic: b in kT/nm², negative for two wells.
        distance: r₀ in nm.

    Raises:
        InputError: If a parameter is out of range.

    References:
        Köhler, Klein and Noé, ICML 2020, arXiv:2006.02425 (a = 0.9, b = −4, no linear term, τ = 1).
    """

    diverges = False

    def __init__(self, n: int = 4, d: int = 2, *, quartic: float = 0.9, quadratic: float = -4.0, distance: float = 4.0) -> None:
        super().__init__(n, d)
        if not (quartic > 0 and distance >= 0 and math.isfinite(quadratic)):
            raise InputError(f"expected quartic > 0, distance >= 0 and a finite quadratic term, got {quartic}, {distance} and {quadratic}")
        self.quartic, self.quadratic, self.distance = quartic, quadratic, distance

    def _pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        r = square.sqrt()
        stretch = r - self.distance
        y = stretch.square()
        return y * (self.quartic * y + self.quadratic), stretch * (2 * self.quartic * y + self.quadratic) / r


class LennardJonesCluster(_Cluster):
    """u(x) = ε Σ_{i<j} [r_ij⁻¹² − 2 r_ij⁻⁶] + ½ Σ_i |x_i − x̄|²: LJ13, LJ55, with the well of depth ε at r_m = 1 nm.

    The trap about the centre x̄ is a sum over pairs, Σ_i |x_i − x̄|² = (1/n) Σ_{i<j} r_ij². A density on the mean-free subspace (see the
    module). Coinciding particles (closer than 1e-20 nm) have u = +inf, weight zero, and gradient 0.

    Args:
        n: Number of particles.
        d: Dimensions of space.
        depth: ε in kT, positive. A sum over all ordered pairs, i ≠ j, as some authors write it, has ε twice as large.

    Raises:
        InputError: If a parameter is out of range.

    References:
        Köhler, Klein and Noé, ICML 2020, arXiv:2006.02425; LJ55: Klein, Krämer and Noé, NeurIPS 2023, arXiv:2306.15030.
    """

    diverges = True

    def __init__(self, n: int, d: int = 3, *, depth: float = 1.0) -> None:
        super().__init__(n, d)
        if not (math.isfinite(depth) and depth > 0):
            raise InputError(f"expected a finite depth > 0, got {depth} kT")
        self.depth = depth
        self._trap_per_pair = 0.5 / n

    def _pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        inverse = square.reciprocal()
        sixth = inverse * inverse * inverse
        energy = self.depth * sixth * (sixth - 2.0) + self._trap_per_pair * square
        return energy, -6.0 * self.depth * sixth * (sixth - 1.0) * inverse + self._trap_per_pair


class CoulombGas(_Cluster):
    """u(x) = β [λ Σ_{i<j} 1/|x_i − x_j| + Σ_i |x_i|²]: equal charges in a harmonic trap. Not translation invariant.

    Without charges (λ = 0) ln Z = (n d / 2) ln(π/β), its ``log_z``. For any λ the centre x̄ is an independent Gaussian of variance
    1/(2βn) per axis, and d n / β = 2⟨Σ_i |x_i|²⟩ − ⟨λ Σ_{i<j} 1/r_ij⟩ (virial theorem). Coinciding particles (closer than
    1e-20 nm) have u = +inf, weight zero, and gradient 0.

    Args:
        n: Number of particles.
        d: Dimensions of space.
        beta: β, positive.
        strength: λ ≥ 0, the Coulomb energy relative to the full one.

    Raises:
        InputError: If a parameter is out of range.
    """

    def __init__(self, n: int, d: int, *, beta: float = 10.0, strength: float = 1.0) -> None:
        super().__init__(n, d)
        if not (math.isfinite(beta) and beta > 0 and math.isfinite(strength) and strength >= 0):
            raise InputError(f"expected beta > 0 and strength >= 0, both finite, got {beta} and {strength}")
        self.beta, self.strength = beta, strength
        self.trap, self.diverges = 2.0 * beta, strength > 0
        self.log_z = 0.5 * n * d * math.log(math.pi / beta) if strength == 0 else None

    def _pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        inverse = square.rsqrt()
        energy = self.beta * self.strength * inverse
        return energy, -0.5 * energy * inverse * inverse


def _require_numbers(u: Tensor) -> None:
    rows = torch.nonzero(torch.isnan(u.detach())).flatten()
    if len(rows):
        raise EnergyError(f"row {int(rows[0])} (of {len(rows)} such rows): the energy is not a number; the coordinates must be finite")
