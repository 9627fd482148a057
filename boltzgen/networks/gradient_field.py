"""Velocities that are the gradient of a potential, whose divergence is the potential's Laplacian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad

from boltzgen.networks.field import ParticleField, along_directions
from boltzgen.networks.pairs import RadialBasis, draw_weights, kinds_and_times, one_hot_kinds, silu_slope


class _Terms(NamedTuple):
    """What every particle j (axis 2) adds to the moments of i (axis 1), as functions of the distance."""

    scalars: Tensor  # σ [b, n, n, F]
    weights: Tensor  # ω [b, n, n, C]


class GradientField(ParticleField):
    """Velocities v = ∇φ of a potential of pairs and surroundings, as in the embedded-atom method.

        s_i = Σ_j σ(ρ_ij),   A_i^c = Σ_j ω_c(ρ_ij) r_ij          σ and ω depend on kinds and time too
        φ = ℓ² Σ_i [a·s_i + w·silu(q_i)],   q_i = W s_i + Σ_{cc'} U_{cc'} A_i^c·A_i^c' + b(kind_i, t)
        v = ∇φ,   ∇·v = ∇²φ

    The part a·s is a potential of pairs, the rest one of surroundings. φ is invariant to translations, rotations, reflections and
    permutations of equal particles, so the field is equivariant and the centre of mass stays.

    **Divergence.** x_i moves the moments of every other particle k through the pair (k, i) alone, so ∂q_k/∂x_i = ∓V_ki with V
    known for every pair once ∂q_k/∂(s_k, A_k) is. The Laplacian is then a sum over pairs, with D²q of the products A·A:

        ∇²φ/ℓ² = Σ_k w·silu''(q_k) [Σ_i |V_ki|² + |Σ_i V_ki|²] + terms in silu'(q_k) and a

    That is O(n²) work, as the velocity itself is.

    Args:
        n_particles: Number of particles n.
        n_dimensions: Dimensions d of space.
        length: Unit ℓ of length; the typical distance of neighbours.
        labels: Kind of every particle (equal labels are equal particles); all equal by default.
        n_radial: Radial functions.
        n_scalars: Scalar moments F.
        n_vectors: Vector moments C.
        hidden: Width of the hidden layers.
        generator: Source of the initial weights. The field starts as zero.

    Raises:
        ValueError: There is not exactly one label for each particle.

    References:
        Daw & Baskes, Phys. Rev. B 29, 6443 (1984), eq. 8 (embedding).
    """

    N_TIMES = 6

    kinds: Tensor
    others: Tensor

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        n_radial: int = 24,
        n_scalars: int = 32,
        n_vectors: int = 8,
        hidden: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions, self.length = n_particles, n_dimensions, length
        self.n_scalars, self.n_vectors = n_scalars, n_vectors
        self.register_buffer("kinds", one_hot_kinds(labels, n_particles), persistent=False)
        self.register_buffer("others", 1.0 - torch.eye(n_particles).unsqueeze(-1), persistent=False)
        self.radial = RadialBasis(n_radial, length=length)
        n_fixed = self.kinds.shape[1] + self.N_TIMES
        self.by_distance = nn.Linear(n_radial, hidden, bias=False)
        self.by_here, self.by_there = nn.Linear(n_fixed, hidden), nn.Linear(n_fixed, hidden, bias=False)
        self.pair = nn.Sequential(nn.SiLU(), nn.Linear(hidden, n_scalars + n_vectors))
        self.by_scalars = nn.Linear(n_scalars, hidden, bias=False)
        self.by_products = nn.Linear(n_vectors**2, hidden, bias=False)
        self.by_fixed = nn.Linear(n_fixed, hidden)
        self.energy = nn.Linear(hidden, 1, bias=False)
        self.pair_energy = nn.Linear(n_scalars, 1, bias=False)
        draw_weights(self, silent=[self.energy, self.pair_energy], generator=generator)

    def potential(self, t: Tensor, x: Tensor) -> Tensor:
        """φ ``[b]`` at times ``t`` (a scalar or ``[b]``) and positions ``x`` ``[b, n, d]``."""
        fixed = kinds_and_times(self.kinds, t, x, self.N_TIMES)
        r = x.unsqueeze(2) - x.unsqueeze(1)
        terms = self._terms(self.radial.distance(r), fixed)
        return self._energy(terms.scalars.sum(2), _sums(terms.weights, r), fixed)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return grad(lambda y: self.potential(t, y).sum())(x)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        fixed = kinds_and_times(self.kinds, t, x, self.N_TIMES)
        r = x.unsqueeze(2) - x.unsqueeze(1)
        rho = self.radial.distance(r)
        at, first, second = _taylor(lambda e: self._terms(rho + e, fixed), x)
        s, a = at.scalars.sum(2), _sums(at.weights, r)
        by_s, by_a = grad(lambda s, a: self._energy(s, a, fixed).sum(), argnums=(0, 1))(s, a)
        uphill = r / (self.length**2 * rho)  # ∇ρ
        square = uphill.square().sum(-1, keepdim=True)
        spread = (r.shape[-1] / self.length**2 - square) / rho  # ∇²ρ
        of_scalars = 2 * (second.scalars * square + first.scalars * spread).sum(2)
        of_vectors = 2 * (_sums(second.weights * square + first.weights * spread, r) + 2 * _sums(first.weights, uphill))
        direct = (by_s * of_scalars).sum(dim=(1, 2)) + (by_a * of_vectors).sum(dim=(1, 2, 3))
        return self(t, x), direct + self._bent(at, first, s, a, r, uphill, fixed)

    def _bent(self, at: _Terms, first: _Terms, s: Tensor, a: Tensor, r: Tensor, uphill: Tensor, fixed: Tensor) -> Tensor:
        """The part of the Laplacian made of second derivatives of the energy by the moments, ``[b]``."""
        n, d = r.shape[2:]
        c, hidden = self.n_vectors, self.energy.in_features
        q = self._inner(s, a, fixed)
        slope, bend = _silu_slopes(q)
        slope, bend = (self.length**2 * self.energy.weight[0] * factor for factor in (slope, bend))
        products = self.by_products.weight.reshape(hidden, c, c) / n
        products = products + products.transpose(1, 2)
        by_a = torch.einsum("hce,bkex->bkcxh", products, a)  # ∂q/∂A

        # V = ∂q_k/∂x_k by the pair (k, i) alone: along ∇ρ, and along the directions of ∂q/∂A
        moved = (first.weights.unsqueeze(-1) * r.unsqueeze(-2)).flatten(-2)
        along = first.scalars @ (self.by_scalars.weight.T / n**0.5) + moved @ by_a.flatten(2, 3)
        v = along.unsqueeze(-2) * uphill.unsqueeze(-1) + (at.weights @ by_a.flatten(3)).unflatten(-1, (d, hidden))
        squares = v.square().sum(dim=(2, 3)) + v.sum(dim=2).square().sum(dim=2)

        # the same for the products of ∂A/∂x_k
        own = torch.einsum("bkic,bkix,bkiy->bkcxy", first.weights, uphill, r)
        own = (own + at.weights.sum(2)[..., None, None] * torch.eye(d, dtype=r.dtype, device=r.device)).flatten(3)
        radially = at.weights + first.weights * (uphill * r).sum(-1, keepdim=True)
        pairs = radially.transpose(2, 3) @ radially + (d - 1) * (at.weights.transpose(2, 3) @ at.weights)
        curved = (own @ own.transpose(2, 3) + pairs).flatten(2) @ products.flatten(1).T
        return (bend * squares + slope * curved).sum(dim=(1, 2))

    def _terms(self, rho: Tensor, fixed: Tensor) -> _Terms:
        """σ and ω at smooth distances ``[b, n, n, 1]``, zero on the diagonal."""
        inner = self.by_distance(self.radial(rho)) + self.by_here(fixed).unsqueeze(2) + self.by_there(fixed).unsqueeze(1)
        scalars, weights = (self.pair(inner) * self.others).split([self.n_scalars, self.n_vectors], dim=-1)
        return _Terms(scalars, weights / (self.length * (1.0 + rho)))

    def _inner(self, s: Tensor, a: Tensor, fixed: Tensor) -> Tensor:
        """q ``[b, n, hidden]`` from moments ``[b, n, F]`` and ``[b, n, C, d]``."""
        n = self.n_particles
        return self.by_scalars(s / n**0.5) + self.by_products((a @ a.transpose(-1, -2) / n).flatten(-2)) + self.by_fixed(fixed)

    def _energy(self, s: Tensor, a: Tensor, fixed: Tensor) -> Tensor:
        """φ ``[b]`` from moments."""
        energies = self.energy(nn.functional.silu(self._inner(s, a, fixed))) + self.pair_energy(s)
        return self.length**2 * energies.sum(dim=(1, 2))


def _sums(weights: Tensor, r: Tensor) -> Tensor:
    """Σ_j of weights ``[b, n, n, C]`` times vectors ``[b, n, n, d]``: ``[b, n, C, d]``."""
    return weights.transpose(2, 3) @ r


def _silu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of x · sigmoid(x)."""
    s = torch.sigmoid(x)
    return silu_slope(x), s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))


def _taylor(function: Callable[[Tensor], Any], like: Tensor) -> tuple[Any, Any, Any]:
    """Value, first and second derivative of a function of one number, at zero; ``like`` gives the number's type and device."""
    zero, one = like.new_zeros(()), like.new_ones(())
    (value, first), (_, second) = along_directions(lambda e: along_directions(function, (e,), (one,)), (zero,), (one,))
    return value, first, second
