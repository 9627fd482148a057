"""A field of two interaction layers whose exact divergence costs a few forward passes, whatever the number of particles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from boltzgen.networks.field import ParticleField, along_directions, time_features


class _Pairs(NamedTuple):
    """Moments that one particle sends to another, ``[..., F]`` and ``[..., C, d]``."""

    scalars: Tensor
    vectors: Tensor


class EmbeddedField(ParticleField):
    """Velocities from pair forces between particles that know their surroundings: as in the embedded-atom method, with vectors.

        s_i = Σ_j ψ(r_ij, t),  A_i^c = Σ_j χ_c(r_ij, t) r_ij          moments of the surroundings
        g_i = G(s_i, A_i^c·A_i^c')                                      invariant state of a particle
        v_i = Σ_j φ(r_ij, g_i, g_j, t) r_ij + Σ_c w_c(g_i) A_i^c − mean

    It is equivariant to rotations and reflections, and to permutations of equal particles; translation leaves it unchanged, and
    the centre of mass stays. Distances enter as √(r² + ε²), so that coinciding particles have finite velocities.

    **Divergence.** x_i moves v_i through its own pairs, through g_i, and through every g_j, which depends on x_i by the one
    pair (j, i) only. So ∂v_i/∂x_i needs derivatives of each pair in d directions, not of every pair in n·d: 3 to 10 forward passes
    for any n, instead of 3n backward passes. The mean has no part in it: the field is invariant to translation, so the rows of its
    Jacobian sum to zero over particles.

    Args:
        n_particles: Number of particles.
        n_dimensions: Dimensions of space.
        length: Typical distance of neighbours; scales the radial functions, which reach to ``reach`` lengths.
        labels: Kind of every particle (equal kinds are equal particles); all equal by default.
        n_radial: Radial functions.
        n_scalars: Scalar moments F.
        n_vectors: Vector moments C.
        hidden: Width of the hidden layers.
        reach: Distance, in lengths, that the radial functions cover; further away they stay constant.
        generator: Source of the initial weights. The field starts as zero.

    References:
        Daw & Baskes, Phys. Rev. B 29, 6443 (1984), eq. 8 (embedding); Satorras, Hoogeboom & Welling, ICML 2021, eqs. 3-6
        (equivariant pair sums).
    """

    N_TIMES = 6

    kinds: Tensor
    centres: Tensor
    others: Tensor
    _upper: Tensor

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
        reach: float = 4.0,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = n_particles, n_dimensions
        self.length, self.reach = length, reach
        self.n_scalars, self.n_vectors = n_scalars, n_vectors
        kinds = torch.as_tensor([0] * n_particles if labels is None else list(labels), dtype=torch.int64)
        if kinds.shape != (n_particles,):
            raise ValueError(f"expected one label for each of {n_particles} particles, got {len(kinds)}")
        n_kinds = int(kinds.max()) + 1
        self.register_buffer("kinds", nn.functional.one_hot(kinds, n_kinds).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("centres", torch.linspace(0.0, reach, n_radial), persistent=False)
        self.register_buffer("others", 1.0 - torch.eye(n_particles), persistent=False)
        width = n_scalars + n_vectors * (n_vectors + 1) // 2
        self.pair = nn.Sequential(
            nn.Linear(n_radial + self.N_TIMES + 2 * n_kinds, hidden), nn.SiLU(), nn.Linear(hidden, n_scalars + n_vectors)
        )
        self.state = nn.Sequential(nn.Linear(width + n_kinds + self.N_TIMES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.by_distance = nn.Linear(n_radial, hidden)
        self.by_states = nn.Linear(hidden, 2 * hidden, bias=False)
        self.force = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.along_vectors = nn.Linear(hidden, n_vectors)
        upper = torch.triu_indices(n_vectors, n_vectors)
        self.register_buffer("_upper", upper, persistent=False)
        for parameter in self.parameters():
            bound = (3.0 / parameter.shape[-1]) ** 0.5 if parameter.ndim == 2 else 0.0
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        for layer in (self.force[-1], self.along_vectors):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        times = time_features(t.to(x.dtype), len(x), self.N_TIMES)
        r = x.unsqueeze(2) - x.unsqueeze(1)
        pairs = self._pairs(r, times)
        s, a = pairs.scalars.sum(2), pairs.vectors.sum(2)
        g = self._state(s, a, times.unsqueeze(1), self.kinds)
        v = self._velocity(r, g.unsqueeze(2), g.unsqueeze(1), a)
        return v - v.mean(dim=1, keepdim=True)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, d = x.shape
        times = time_features(t.to(x.dtype), b, self.N_TIMES)
        r = x.unsqueeze(2) - x.unsqueeze(1)
        own = torch.eye(n, dtype=x.dtype, device=x.device)

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            """Velocities, and Σ_i ∂v_i/∂x_i along one direction of space."""
            shift = direction.expand_as(r).contiguous()
            pairs, moved = along_directions(lambda y: self._pairs(y, times), (r,), (shift,))
            s, a = pairs.scalars.sum(2), pairs.vectors.sum(2)
            # what x_i does to the moments of j: its own sum for j = i, minus the pair (j, i) for the others; [b, i, j, ...]
            s_moved, a_moved = (
                own.reshape(1, n, n, *[1] * (m.ndim - 3)) * m.sum(2).unsqueeze(2) - m.transpose(1, 2)
                for m in (moved.scalars, moved.vectors)
            )
            states = (s.unsqueeze(1).expand_as(s_moved).contiguous(), a.unsqueeze(1).expand_as(a_moved).contiguous())
            g_all, g_moved = along_directions(lambda s, a: self._state(s, a, times[:, None, None], self.kinds), states, (s_moved, a_moved))
            g = g_all[:, 0]
            g_own = torch.diagonal(g_moved, dim1=1, dim2=2).transpose(1, 2)
            a_own = torch.diagonal(a_moved, dim1=1, dim2=2).permute(0, 3, 1, 2)
            here, there = g.unsqueeze(2).expand_as(g_all).contiguous(), g_all
            v, v_moved = along_directions(
                self._velocity, (r, here, there, a), (shift, g_own.unsqueeze(2).expand_as(here).contiguous(), g_moved, a_own)
            )
            return v, (v_moved * direction).sum(dim=(1, 2))

        v, parts = vmap(along, out_dims=0)(torch.eye(d, dtype=x.dtype, device=x.device))
        return v[0] - v[0].mean(dim=1, keepdim=True), parts.sum(dim=0)

    def _radial(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Distances in lengths ``[..., 1]`` and radial functions of them ``[..., n_radial]``."""
        distance = (r.square().sum(-1, keepdim=True) / self.length**2 + 1e-4).sqrt()
        spacing = self.reach / (len(self.centres) - 1)
        reduced = distance.clamp_max(self.reach)
        return distance, torch.exp(-0.5 * ((reduced - self.centres.to(r.dtype)) / spacing).square())

    def _pairs(self, r: Tensor, times: Tensor) -> _Pairs:
        """What every particle j (axis 2) sends to i (axis 1), nothing to itself."""
        distance, radial = self._radial(r)
        n, kinds = self.n_particles, self.kinds.to(r.dtype)
        fixed = [times[:, None, None].expand(-1, n, n, -1), kinds[:, None].expand(len(r), n, n, -1), kinds[None].expand(len(r), n, n, -1)]
        out = self.pair(torch.cat([radial, *fixed], dim=-1)) * self.others.to(r.dtype).unsqueeze(-1)
        scalars, weights = out.split([self.n_scalars, self.n_vectors], dim=-1)
        return _Pairs(scalars, weights.unsqueeze(-1) * (r / (self.length * distance)).unsqueeze(-2))

    def _state(self, s: Tensor, a: Tensor, times: Tensor, kinds: Tensor) -> Tensor:
        """Invariant states ``[..., hidden]`` from moments."""
        products = (a @ a.transpose(-1, -2))[..., self._upper[0], self._upper[1]]
        leading = s.shape[:-1]
        rest = [kinds.to(s.dtype).expand(*leading, -1), times.expand(*leading, -1)]
        return self.state(torch.cat([s / self.n_particles**0.5, products / self.n_particles, *rest], dim=-1))

    def _velocity(self, r: Tensor, here: Tensor, there: Tensor, a: Tensor) -> Tensor:
        """Velocities ``[b, n, d]`` before the mean is taken off; states at i along axis 1 (``here``) and at j along axis 2 (``there``)."""
        distance, radial = self._radial(r)
        weight_here, weight_there = self.by_states.weight.chunk(2)
        inner = self.by_distance(radial) + nn.functional.linear(here, weight_here) + nn.functional.linear(there, weight_there)
        force = self.force(inner) * self.others.to(r.dtype).unsqueeze(-1)
        g = here[:, :, 0]
        return (force * r / distance).sum(2) / self.n_particles**0.5 + (self.along_vectors(g).unsqueeze(-1) * a).sum(2)
