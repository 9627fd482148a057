"""A field of embedded-atom layers whose exact divergence is written out: the cost of some forward passes, not of one per coordinate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.networks.embedded_layer import SOFTENING, AllPairs, Derivatives, EmbeddedLayer
from boltzgen.networks.field import END, ParticleField, time_features
from boltzgen.networks.pair_scales import PairScales, PairStatistics
from boltzgen.networks.pairs import one_hot_kinds


class EmbeddedField(ParticleField):
    """Velocities from pair forces between particles that know their surroundings: as in the embedded-atom method, with vectors.

    In units of length, every layer moves the positions, y ← y + Δ(y, g, t), and renews the states g of the particles
    (:class:`~boltzgen.networks.embedded_layer.EmbeddedLayer`); after the last one v = y − x − mean. Later layers see where the earlier
    ones moved the particles to, so that a field of two layers can look for the structure that a noisy configuration is on its way to.

    It is equivariant to rotations and reflections, and to permutations of equal particles; translation leaves it unchanged, and
    the centre of mass stays. Directions are e_ij = r_ij / ρ_ij with ρ = √(r² + ε²), so that coinciding particles have finite velocities.

    **Divergence.** Let X_a = ∂y_a/∂x before layer a. The displacements of layer b depend on y_b at fixed states, by D_b, and on every
    y_a, a ≤ b, through the states of layer a, by S_ba; so X_{b+1} = X_b + X_b D_b + Σ_{a≤b} X_a S_ba, and ∇·v = tr X_last − n d. All D
    and S are written out. A state of j enters the force on i along e_ij, and the position of l enters the state of j by the pair
    (j, l), so that S needs arrays of n² H and n³ d numbers only, and no derivative goes through the network. The mean has no part
    in it: the field is invariant to translation, so the rows of its Jacobian sum to zero.

    Args:
        n_particles: Number of particles.
        n_dimensions: Dimensions of space.
        length: Typical distance of neighbours; the unit of the radial functions.
        labels: Kind of every particle (equal kinds are equal particles); all equal by default.
        n_layers: Layers.
        n_radial: Radial functions.
        n_scalars: Scalar moments F.
        n_vectors: Vector moments C.
        hidden: Width of the states and of the pair layer H.
        reach: Distance, in lengths, that the radial functions resolve evenly; further away they level off smoothly.
        statistics: Distances of all pairs in base and data, for more radial functions around the own distance of each
            (:class:`~boltzgen.networks.pair_scales.PairScales`) and for features of time that resolve the end: for molecules, whose
            bonds vary much less than their other distances.
        generator: Source of the initial weights. The field starts as zero.

    References:
        Daw & Baskes, Phys. Rev. B 29, 6443 (1984), eq. 8 (embedding); Satorras, Hoogeboom & Welling, ICML 2021, eqs. 3-6
        (equivariant pair sums, layers that move positions).
    """

    N_TIMES = 6

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        n_layers: int = 2,
        n_radial: int = 16,
        n_scalars: int = 32,
        n_vectors: int = 8,
        hidden: int = 64,
        reach: float = 4.0,
        statistics: PairStatistics | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if n_layers < 1 or not length > 0:
            raise ValueError(f"expected at least one layer and a positive length, got {n_layers} and {length}")
        self.n_particles, self.n_dimensions, self.length = n_particles, n_dimensions, length
        kinds, scales = one_hot_kinds(labels, n_particles).argmax(dim=1), None
        if statistics is not None:
            first, second = torch.triu_indices(n_particles, n_particles, 1)
            shared = statistics.shared(kinds)
            scales = PairScales(shared, first, second, length=length, softening=SOFTENING, n_dimensions=n_dimensions)
        self.pairs, self.resolves_end = AllPairs(kinds, n_radial=n_radial, reach=reach, scales=scales), scales is not None
        n_times = (1 + self.resolves_end) * self.N_TIMES
        self.layers = nn.ModuleList(
            EmbeddedLayer(
                self.pairs, n_times=n_times, n_scalars=n_scalars, n_vectors=n_vectors, hidden=hidden, first=k == 0, generator=generator
            )
            for k in range(n_layers)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t, times = self._times(t, x)
        displacement, state = torch.zeros_like(x), None
        for layer in self.layers:
            computed = layer(self.pairs, self.pairs(t, x / self.length + displacement), state, times)
            displacement, state = displacement + computed.displacement, computed.state
        return self._velocity(displacement)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        displacement, changed = self._displaced(t, x)
        return self._velocity(displacement), torch.diagonal(changed, dim1=1, dim2=2).sum(1)

    def jacobian(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        displacement, changed = self._displaced(t, x)
        blocks = changed.unflatten(2, x.shape[1:])
        return self._velocity(displacement), (blocks - blocks.mean(dim=2, keepdim=True)).flatten(2)

    def _displaced(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Displacements ``[b, n, d]`` in lengths and their Jacobian ``[b, n d, n d]``, whose first index is that of x."""
        t, times = self._times(t, x)
        displacement, state = torch.zeros_like(x), None
        one = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        changed = torch.zeros_like(one).expand(len(x), -1, -1)  # derivatives of the displacement by x, which is the first index
        moved = [one + changed]  # those of the positions that every layer sees
        derivatives: list[Derivatives] = []
        layers: list[EmbeddedLayer] = list(self.layers)  # type: ignore[arg-type]
        for k, layer in enumerate(layers):
            computed, of = layer.with_derivatives(self.pairs, self.pairs(t, x / self.length + displacement), state, times)
            derivatives.append(of)
            step, by_state = moved[k] @ of.displacement, of.by_state
            for a in reversed(range(k + 1)):
                by_inner = by_state * derivatives[a].slope.unsqueeze(2)
                step = step + moved[a] @ derivatives[a].through_states(by_inner, of.direction)
                if a:
                    by_state = layers[a].told(by_inner)
            changed = changed + step
            moved.append(one + changed)
            displacement, state = displacement + computed.displacement, computed.state
        return displacement, changed

    def _times(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Times ``[b or 1]`` in the precision of positions, and their features ``[b or 1, T]``."""
        t = t.to(x.dtype).reshape(-1)
        times = time_features(t, len(t), self.N_TIMES)
        if not self.resolves_end:
            return t, times
        left = torch.log1p((1 - t) / END) / math.log1p(1 / END)
        return t, torch.cat([times, time_features(left, len(t), self.N_TIMES)], dim=-1)

    def _velocity(self, displacement: Tensor) -> Tensor:
        return self.length * (displacement - displacement.mean(dim=1, keepdim=True))
