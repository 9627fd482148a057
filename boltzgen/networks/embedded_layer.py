"""One layer of the embedded-atom field, with its derivatives written out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from boltzgen.networks.pair_scales import PairScales
from boltzgen.networks.pairs import at_times, silu_slope, weights

#: Softening ε² of distances, in lengths squared: directions turn smoothly within a fifth of a length, for the sake of the solver.
SOFTENING = 0.04


class Pairs(NamedTuple):
    """Geometry of the pairs i < j, in lengths: softened distance, direction from j to i, radial functions and their derivatives."""

    distance: Tensor  # [b, p, 1]
    direction: Tensor  # [b, p, d]
    radial: Tensor  # [b, p, k]
    slope: Tensor  # [b, p, k]


class AllPairs(nn.Module):
    """The pairs i < j of n particles, and sums over them.

    Args:
        kinds: Kind of every particle ``[n]``, counted from zero.
        n_radial: Radial functions.
        reach: Distance that they resolve evenly; further away they level off smoothly.
        scales: More radial functions, around the own distance of every pair, with the particles of the pairs ``i < j`` in its order.
    """

    first: Tensor
    second: Tensor
    signs: Tensor
    pair_of: Tensor
    orientation: Tensor
    centres: Tensor
    kinds: Tensor

    def __init__(self, kinds: Tensor, *, n_radial: int, reach: float, scales: PairScales | None = None) -> None:
        super().__init__()
        if n_radial < 2 or not reach > 0:
            raise ValueError(f"expected at least 2 radial functions and a positive reach, got {n_radial} and {reach}")
        n, self.reach, self.scales = len(kinds), reach, scales
        self.n_own = 0 if scales is None else len(scales)
        first, second = torch.triu_indices(n, n, 1)
        ones, number = torch.eye(n), torch.zeros(n, n, dtype=torch.int64)
        number[first, second] = number[second, first] = torch.arange(len(first))
        for name, value in (
            ("kinds", kinds), ("first", first), ("second", second), ("signs", (ones[first] - ones[second]).T), ("pair_of", number),
            ("orientation", (torch.ones(n, n).triu(1) - torch.ones(n, n).tril(-1)).unsqueeze(-1)),
            ("centres", torch.linspace(0.0, reach, n_radial)),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def forward(self, t: Tensor, x: Tensor) -> Pairs:
        """Geometry of positions ``[b, n, d]`` at times ``[b or 1]``; the radial functions of ``scales`` come last."""
        r = (x.transpose(1, 2) @ self.signs).transpose(1, 2)
        distance = (r.square().sum(-1, keepdim=True) + SOFTENING).sqrt()
        direction = r / distance
        spacing = self.reach / (len(self.centres) - 1)
        tail = 1 + (distance / self.reach).pow(4)
        offset = (distance * tail.pow(-0.25) - self.centres) / spacing
        radial = torch.exp(-0.5 * offset.square())
        slope = -offset * radial * tail.pow(-1.25) / spacing
        if self.scales is not None:
            own, own_slope = self.scales(t, distance)
            radial, slope = torch.cat([radial, own], dim=-1), torch.cat([slope, own_slope], dim=-1)
        return Pairs(distance, direction, radial, slope)

    def gather(self, values: Tensor) -> Tensor:
        """Sums over the pairs ``[b, p, m]`` of every particle ``[b, n, m]``."""
        return self.signs.abs() @ values

    def gather_vectors(self, pairs: Pairs, values: Tensor) -> Tensor:
        """Σ_j values_ij e_ij of every particle, ``[b, n, d, m]``, from values of pairs ``[b, p, m]``."""
        forces = (pairs.direction.unsqueeze(-1) * values.unsqueeze(-2)).flatten(2)
        return (forces.transpose(1, 2) @ self.signs.T).transpose(1, 2).unflatten(2, (pairs.direction.shape[-1], -1))

    def spread(self, particles: Tensor) -> Tensor:
        """Sums ``[b, p, m]`` over the two particles of a pair ``[b, n, m]``."""
        return particles[:, self.first] + particles[:, self.second]

    def dense(self, values: Tensor) -> Tensor:
        """Pairs ``[b, p, m]`` as a matrix ``[b, n, n, m]`` that is zero on its diagonal."""
        return values[:, self.pair_of] * self.orientation.abs()

    def of_kinds(self, table: Tensor) -> Tensor:
        """Entries ``[..., p, m]`` of every pair in a table ``[..., kinds, kinds, m]``, whatever the order of its particles."""
        first, second = self.kinds[self.first], self.kinds[self.second]
        return table[..., first, second, :] + table[..., second, first, :]


class Computed(NamedTuple):
    """What a layer computed on the way to the displacements."""

    displacement: Tensor  # [b, n, d]
    vector_weights: Tensor  # η [b, p, C]
    vectors: Tensor  # A [b, n, C, d]
    inner: Tensor  # h [b, n, H], before the activation
    state: Tensor  # g [b, n, H]
    pair_inner: Tensor  # [b, p, H], before the activation
    force: Tensor  # φ [b, p, 1]
    along: Tensor  # α [b, n, C]


class Derivatives(NamedTuple):
    """Derivatives of what a layer gives, by positions and by its inner states, in factors of size n².

    A displacement of l ≠ j changes h_j by −[e_jl (a_jl) + Σ_c (η_c/ρ)_jl ∂h_j/∂A_j^c]; one of j changes it by ``own``.
    """

    direction: Tensor  # e_ij [b, n, n, d]
    displacement: Tensor  # of displacements at fixed states [b, n d, n d], by the position that is the first index
    along: Tensor  # a [b, n, n, H]
    turning: Tensor  # η/ρ [b, n, n, C]
    by_vectors: Tensor  # ∂h_j/∂A_j [b, n, d C, H]
    own: Tensor  # [b, n, d, H]
    by_state: Tensor  # of displacements by g_j: ∂φ_ij/∂g_j of every i, then those of the components of Δ_j [b, n, n + d, H]
    slope: Tensor  # dg/dh [b, n, H]

    def through_states(self, by_inner: Tensor, direction: Tensor) -> Tensor:
        """What positions do to displacements of this or a later layer through the states of this one.

        Args:
            by_inner: Of those displacements by the inner states h_j here, laid out as ``self.by_state``.
            direction: e_ij of that layer.

        Returns:
            ``[b, n d, n d]``, by the position that is the first index.
        """
        n, d = self.direction.shape[2:]
        factors = torch.cat([self.along, self.by_vectors, self.own], dim=2)
        products = factors @ by_inner.transpose(2, 3)  # [b, j, n + d C + d, n + d]
        along, turned, own = products.split([n, self.by_vectors.shape[2], d], dim=2)
        turned = self.turning @ turned.unflatten(2, (d, -1)).transpose(2, 3).flatten(3)
        moved = self.direction.unsqueeze(-1) * along.unsqueeze(3) + turned.unflatten(-1, (d, -1))  # by −x_l, [b, j, l, d, n + d]
        moved = torch.eye(n, dtype=moved.dtype, device=moved.device)[:, :, None, None] * own.unsqueeze(2) - moved
        by_forces = moved[..., :n].permute(0, 4, 2, 3, 1).flatten(2, 3) @ direction  # [b, i, n d, d]
        return (by_forces + moved[..., n:].flatten(2, 3)).transpose(1, 2).flatten(2)


class EmbeddedLayer(nn.Module):
    """States of particles from their surroundings, and displacements by pair forces that depend on the states.

        S_i = Σ_j σ(ρ_ij, t),  A_i^c = Σ_j η_c(ρ_ij, t) e_ij
        h_i = W [S_i, A_i^c·A_i^c'] + U g_i^before + b(t),   g_i = silu(h_i)
        Δ_i = Σ_j φ(ρ_ij, g_i + g_j, t) e_ij + Σ_c α_c(g_i, t) A_i^c

    Radial functions of ρ give σ, η, and φ = [f·silu(R(ρ) + P(g_i + g_j) + kinds) + f'(ρ)]/√n; S is scaled by 1/√n and products of A by 1/n;
    σ and η of a pair are multiplied by a factor for its kinds. With radial functions around the own distance of every pair, φ has a further
    combination of those, with weights for the pair's kinds alone.

    **Derivatives.** A weight w(ρ) of a pair moves its vector by ∂(w e_ij)/∂x_i = (w' − w/ρ) e eᵀ + (w/ρ) 1. With that, Δ depends on
    positions through its own pairs; on h_j through the forces between i and j, along e_ij, and for j = i also through α. h_j depends on
    x_l (l ≠ j) through the one pair (j, l) in S_j and A_j. Both depend on differences of positions only, so blocks of one particle
    with itself are minus the sum of the others.

    Args:
        all_pairs: The pairs, shared by the layers of a field.
        n_times: Features of time.
        n_scalars: Scalar moments F.
        n_vectors: Vector moments C.
        hidden: Width H of the states and of the pair forces.
        first: Whether there are no states before.
        generator: Source of the initial weights. Displacements start as zero.
    """

    def __init__(
        self, all_pairs: AllPairs, *, n_times: int, n_scalars: int, n_vectors: int, hidden: int, first: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.n_scalars, self.n_vectors, n_radial = n_scalars, n_vectors, len(all_pairs.centres) + all_pairs.n_own
        n_kinds, n_moments, n_products = int(all_pairs.kinds.max()) + 1, n_scalars + n_vectors, n_vectors**2
        self.moments = weights(n_times, n_radial, n_moments, fan_in=4 * n_times, generator=generator)
        self.partners = nn.Parameter(torch.full((n_kinds, n_kinds, n_moments), 0.5)) if n_kinds > 1 else None
        self.embedding = weights(n_scalars + n_products, hidden, fan_in=n_scalars + n_products, generator=generator)
        self.embedding_shift = weights(n_times, n_kinds, hidden, fan_in=n_times, generator=generator)
        self.before = None if first else weights(hidden, hidden, fan_in=hidden, generator=generator)
        self.pair_radial = weights(n_times, n_radial, hidden, fan_in=4 * n_times, generator=generator)
        self.pair_states = weights(hidden, hidden, fan_in=hidden, generator=generator)
        self.pair_shift = weights(n_kinds, n_kinds, hidden, fan_in=1, generator=generator) if n_kinds > 1 else None
        self.force = nn.Parameter(torch.zeros(n_times, hidden))
        self.force_radial = nn.Parameter(torch.zeros(n_times, n_radial))
        self.force_own = nn.Parameter(torch.zeros(n_times, n_kinds, n_kinds, all_pairs.n_own)) if all_pairs.n_own else None
        self.along_vectors = nn.Parameter(torch.zeros(hidden, n_vectors))
        self.along_shift = nn.Parameter(torch.zeros(n_times, n_vectors))

    def forward(self, all_pairs: AllPairs, pairs: Pairs, before: Tensor | None, times: Tensor) -> Computed:
        """Displacements and states, from geometry, states before ``[b, n, H]`` and features of time ``[b or 1, T]``."""
        n = len(all_pairs.kinds)
        scalars, vector_weights = self._moments(all_pairs, pairs.radial, times)
        vectors = all_pairs.gather_vectors(pairs, vector_weights).transpose(-1, -2)
        products = (vectors @ vectors.transpose(-1, -2)).flatten(2)
        surroundings = torch.cat([all_pairs.gather(scalars) / n**0.5, products / n], dim=-1)
        inner = surroundings @ self.embedding + at_times(self.embedding_shift, times)[:, all_pairs.kinds]
        if self.before is not None and before is not None:
            inner = inner + before @ self.before
        state = nn.functional.silu(inner)
        pair_inner = pairs.radial @ at_times(self.pair_radial, times) + all_pairs.spread(state @ self.pair_states)
        if self.pair_shift is not None:
            pair_inner = pair_inner + all_pairs.of_kinds(self.pair_shift)
        force = nn.functional.silu(pair_inner) @ at_times(self.force, times).unsqueeze(-1)
        force = (force + pairs.radial @ at_times(self.force_radial, times).unsqueeze(-1)) / n**0.5
        force = force + self._own_force(all_pairs, pairs.radial, times)
        along = state @ self.along_vectors + at_times(self.along_shift, times).unsqueeze(1)
        displacement = all_pairs.gather_vectors(pairs, force).squeeze(-1) + (along.unsqueeze(-1) * vectors).sum(2)
        return Computed(displacement, vector_weights, vectors, inner, state, pair_inner, force, along)

    def with_derivatives(self, all_pairs: AllPairs, pairs: Pairs, before: Tensor | None, times: Tensor) -> tuple[Computed, Derivatives]:
        """What :meth:`forward` gives, and its Jacobians by the positions in lengths at fixed states before."""
        computed = self(all_pairs, pairs, before, times)
        return computed, self._derivatives(all_pairs, pairs, computed, times)

    def told(self, by_inner: Tensor) -> Tensor:
        """Derivatives by the states before, from those by the inner states ``[..., H]``.

        Raises:
            ValueError: In a first layer.
        """
        if self.before is None:
            raise ValueError("a first layer has no states before it")
        return by_inner @ self.before.T

    def _derivatives(self, all_pairs: AllPairs, pairs: Pairs, computed: Computed, times: Tensor) -> Derivatives:
        n, d = computed.displacement.shape[1:]
        c, hidden = self.n_vectors, self.embedding.shape[1]
        e = all_pairs.dense(pairs.direction) * all_pairs.orientation
        scalars_slope, weights_slope = self._moments(all_pairs, pairs.slope, times)
        turning = computed.vector_weights / pairs.distance
        radially, turning = all_pairs.dense(weights_slope - turning), all_pairs.dense(turning)

        by_pair_inner = (at_times(self.force, times) / n**0.5).unsqueeze(1) * silu_slope(computed.pair_inner)
        slope = (by_pair_inner * (pairs.slope @ at_times(self.pair_radial, times))).sum(-1, keepdim=True)
        slope = slope + pairs.slope @ at_times(self.force_radial / n**0.5, times).unsqueeze(-1)
        slope = slope + self._own_force(all_pairs, pairs.slope, times)
        force_turning = computed.force / pairs.distance
        outer = all_pairs.dense(slope - force_turning).squeeze(-1) + (radially @ computed.along.unsqueeze(-1)).squeeze(-1)
        straight = all_pairs.dense(force_turning).squeeze(-1) + (turning @ computed.along.unsqueeze(-1)).squeeze(-1)
        by_states = by_pair_inner @ self.pair_states.T  # ∂φ/∂g, the same for both particles of a pair
        by_states = all_pairs.dense(by_states)
        by_own = e.transpose(2, 3) @ by_states + computed.vectors.transpose(-1, -2) @ self.along_vectors.T

        products = self.embedding[self.n_scalars :].unflatten(0, (c, c))
        products = (products + products.transpose(0, 1)) / n
        by_vectors = (computed.vectors.transpose(2, 3) @ products.flatten(1)).unflatten(-1, (c, hidden)).flatten(2, 3)
        along = (e.unsqueeze(-1) * radially.unsqueeze(3)).flatten(3) @ by_vectors
        along = along + all_pairs.dense(scalars_slope @ (self.embedding[: self.n_scalars] / n**0.5))
        turned = (turning.sum(2)[:, :, None, None] @ by_vectors.unflatten(2, (d, c))).squeeze(3)
        return Derivatives(
            direction=e,
            displacement=_jacobian(outer, straight, e),
            along=along,
            turning=turning,
            by_vectors=by_vectors,
            own=e.transpose(2, 3) @ along + turned,
            by_state=torch.cat([by_states, by_own], dim=2),
            slope=silu_slope(computed.inner),
        )

    def _own_force(self, all_pairs: AllPairs, radial: Tensor, times: Tensor) -> Tensor:
        """The force ``[b, p, 1]`` that a pair of kinds has for itself, by radial functions around its own distance; zero without."""
        if self.force_own is None:
            return radial.new_zeros(())
        own = radial[..., -all_pairs.n_own :]
        return (own * at_times(all_pairs.of_kinds(self.force_own), times)).sum(-1, keepdim=True)

    def _moments(self, all_pairs: AllPairs, radial: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """What a pair gives to the scalar moments ``[b, p, F]`` and to the vector moments ``[b, p, C]`` of both its particles."""
        moments = radial @ at_times(self.moments, times)
        if self.partners is not None:
            moments = moments * all_pairs.of_kinds(self.partners)
        scalars, vectors = moments.split([self.n_scalars, self.n_vectors], dim=-1)
        return scalars, vectors


def _jacobian(outer: Tensor, straight: Tensor, e: Tensor) -> Tensor:
    """Σ_j [outer_ij e eᵀ + straight_ij 1] (x_i − x_j) as a matrix ``[b, n d, n d]``: the first index is that of x."""
    n, d = e.shape[2:]
    blocks = outer[..., None, None] * e.unsqueeze(-1) * e.unsqueeze(-2)
    blocks = blocks + straight[..., None, None] * torch.eye(d, dtype=e.dtype, device=e.device)
    blocks = torch.eye(n, dtype=e.dtype, device=e.device)[:, :, None, None] * blocks.sum(2).unsqueeze(2) - blocks
    return blocks.permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(1, 2)
