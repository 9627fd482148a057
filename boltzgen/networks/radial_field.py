"""The cheapest exact field: every pair pushes along its distance, and the divergence is a closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.networks.field import ParticleField, time_features
from boltzgen.networks.pairs import RadialBasis, envelope, envelope_slope, one_hot_kinds


class RadialField(ParticleField):
    """Pair forces of radial functions whose weights depend on time.

        v_i = Σ_j f(ρ_ij, t) r_ij,   f = w(ρ/R) Σ_m Σ_k c_mk cos(π m t) B_k(ρ),   ρ = √(r²/ℓ² + ε²)
        ∇·v = Σ_i Σ_{j≠i} [d f(ρ_ij) + f'(ρ_ij) r_ij² / (ℓ² ρ_ij)]

    with the functions B of :class:`RadialBasis`, the :func:`envelope` w, and weights c of their own for every pair of kinds. From
    ρ = R on, velocity and divergence are exactly zero, with continuous derivatives. The field is equivariant to rotations and
    reflections and to permutations of equal particles; pairs push each other with opposite forces, so the centre of mass stays. It
    knows no surroundings: a baseline.

    Args:
        n_particles: Number of particles n.
        n_dimensions: Dimensions d of space.
        length: Unit ℓ of length; the typical distance of neighbours.
        labels: Kind of every particle (equal labels are equal particles); all equal by default.
        n_radial: Radial functions.
        n_times: Functions of time.
        reach: Distance R, in lengths, up to which particles push each other.
        generator: Accepted for likeness with the other fields: all weights start as zero.

    Raises:
        ValueError: There is not exactly one label for each particle, or a number is too small.

    References:
        Köhler, Klein & Noé, ICML 2020 (kernels of distance and time with a closed-form divergence).
    """

    others: Tensor
    pair_kinds: Tensor

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        n_radial: int = 48,
        n_times: int = 8,
        reach: float = 5.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if n_times < 1 or not reach > 0:
            raise ValueError(f"expected at least one function of time and a positive reach, got {n_times} and {reach}")
        self.n_particles, self.n_dimensions = n_particles, n_dimensions
        kind = one_hot_kinds(labels, n_particles).argmax(dim=1)
        low, high = torch.minimum(kind[:, None], kind), torch.maximum(kind[:, None], kind)
        self.register_buffer("pair_kinds", high * (high + 1) // 2 + low, persistent=False)
        self.register_buffer("others", 1.0 - torch.eye(n_particles), persistent=False)
        self.radial, self.reach = RadialBasis(n_radial, length=length), reach
        self.weights = nn.Parameter(torch.zeros(int(self.pair_kinds.max()) + 1, n_times, n_radial))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        r, rho, weights = self._pairs(t, x)
        return (envelope(rho / self.reach) * self._sum(weights, self.radial(rho)) * r).sum(dim=2)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r, rho, weights = self._pairs(t, x)
        w, w_slope = envelope(rho / self.reach), envelope_slope(rho / self.reach) / self.reach
        total = self._sum(weights, self.radial(rho))
        slope = w_slope * total + w * self._sum(weights, self.radial.slopes(rho))
        stretch = r.square().sum(dim=-1, keepdim=True) / (self.radial.length**2 * rho)
        return (w * total * r).sum(dim=2), (self.n_dimensions * w * total + slope * stretch).sum(dim=(1, 2, 3))

    def _pairs(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors ``[b, n, n, d]``, smooth distances ``[b, n, n, 1]``, and weights ``[b, pair kinds, n_radial]`` at the times."""
        r = x.unsqueeze(2) - x.unsqueeze(1)
        times = time_features(t.to(x.dtype), len(x), self.weights.shape[1])
        return r, self.radial.distance(r), torch.einsum("bm,pmk->bpk", times, self.weights)

    def _sum(self, weights: Tensor, functions: Tensor) -> Tensor:
        """Weighted sums ``[b, n, n, 1]`` of radial functions ``[b, n, n, n_radial]``, zero on the diagonal."""
        every = torch.einsum("bijk,bpk->bijp", functions, weights)
        chosen = every.gather(-1, self.pair_kinds.unsqueeze(-1).expand(*every.shape[:3], 1))
        return chosen * self.others.unsqueeze(-1)
