"""A field of two interaction layers whose exact divergence is written out: the cost of a few forward passes for any number of particles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from boltzgen.networks.field import ParticleField, time_features

#: Softening ε² of distances, in lengths squared: directions turn smoothly within a fifth of a length, for the sake of the solver.
_SOFTENING = 0.04


class Pairs(NamedTuple):
    """Geometry of the pairs i < j, in lengths: softened distance, direction from j to i, radial functions and their derivatives."""

    distance: Tensor  # [b, p, 1]
    direction: Tensor  # [b, p, d]
    toward: Tensor  # [b, n d, p], the direction of every pair at its first particle, the opposite one at its second
    radial: Tensor  # [b, p, k]
    slope: Tensor  # [b, p, k]


class Layers(NamedTuple):
    """What both layers computed on the way to the velocity."""

    scalars: Tensor  # σ [b, p, F]
    weights: Tensor  # η [b, p, C]
    vectors: Tensor  # A [b, n, C, d]
    inner: Tensor  # h [b, n, H], before the activation
    state: Tensor  # g [b, n, H]
    pair_inner: Tensor  # [b, p, H], before the activation
    force: Tensor  # φ [b, p, 1]
    along: Tensor  # α [b, n, C]
    exchanges: tuple[Tensor, ...]  # inner states after each exchange of messages [b, n, H], in fields that have them


class EmbeddedField(ParticleField):
    """Velocities from pair forces between particles that know their surroundings: as in the embedded-atom method, with vectors.

        S_i = Σ_j σ(r_ij, t),  A_i^c = Σ_j η_c(r_ij, t) e_ij          moments of the surroundings
        g_i = silu(W [S_i, A_i^c·A_i^c'] + b(t))                        invariant state of a particle
        v_i = Σ_j φ(r_ij, g_i + g_j, t) e_ij + Σ_c α_c(g_i, t) A_i^c − mean

    It is equivariant to rotations and reflections, and to permutations of equal particles; translation leaves it unchanged, and
    the centre of mass stays. e_ij = r_ij / ρ_ij with ρ = √(r² + ε²), so that coinciding particles have finite velocities. The force
    φ is the same for i and j, as it is for every gradient of a function of distances, so each pair is computed once.

    **Divergence.** x_i moves v_i through its own pairs, through g_i, and through every g_j, which depends on x_i by the one
    pair (j, i) only; and of all displacements of x_i only that along e_ij counts in φ_ij. So ∂v_i/∂x_i needs, for each pair, the
    derivative along e_ij of the moments of both particles, weighted with the derivative of φ by their states: O(n²) work, as the
    velocity itself. The mean has no part in it: the field is invariant to translation, so the rows of its Jacobian sum to zero.

    Args:
        n_particles: Number of particles.
        n_dimensions: Dimensions of space.
        length: Typical distance of neighbours; the unit of the radial functions.
        labels: Kind of every particle (equal kinds are equal particles); all equal by default.
        n_radial: Radial functions.
        n_scalars: Scalar moments F.
        n_vectors: Vector moments C.
        hidden: Width of the states and of the pair layer H.
        reach: Distance, in lengths, that the radial functions resolve evenly; further away they level off smoothly.
        generator: Source of the initial weights. The field starts as zero.

    References:
        Daw & Baskes, Phys. Rev. B 29, 6443 (1984), eq. 8 (embedding); Satorras, Hoogeboom & Welling, ICML 2021, eqs. 3-6
        (equivariant pair sums).
    """

    N_TIMES = 6

    kinds: Tensor
    centres: Tensor
    first: Tensor
    second: Tensor
    signs: Tensor

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        n_radial: int = 16,
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
        kinds = torch.unique(kinds, return_inverse=True)[1]
        n_kinds, n_moments = int(kinds.max()) + 1, n_scalars + n_vectors
        first, second = torch.triu_indices(n_particles, n_particles, 1)
        signs = nn.functional.one_hot(first, n_particles).T - nn.functional.one_hot(second, n_particles).T
        for name, value in (
            ("kinds", kinds), ("first", first), ("second", second), ("signs", signs.to(torch.get_default_dtype())),
            ("centres", torch.linspace(0.0, reach, n_radial)),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

        def weights(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * (3.0 / fan_in) ** 0.5)

        times, n_products = self.N_TIMES, n_vectors**2
        self.moments = weights(times, n_radial, n_moments, fan_in=4 * times)
        self.partners = nn.Parameter(torch.full((n_kinds, n_kinds, n_moments), 0.5)) if n_kinds > 1 else None
        self.embedding = weights(n_scalars + n_products, hidden, fan_in=n_scalars + n_products)
        self.embedding_shift = weights(times, n_kinds, hidden, fan_in=times)
        self.pair_radial = weights(times, n_radial, hidden, fan_in=4 * times)
        self.pair_states = weights(hidden, hidden, fan_in=hidden)
        self.pair_shift = weights(n_kinds, n_kinds, hidden, fan_in=1) if n_kinds > 1 else None
        self.force = nn.Parameter(torch.zeros(times, hidden))
        self.force_radial = nn.Parameter(torch.zeros(times, n_radial))
        self.along_vectors = nn.Parameter(torch.zeros(hidden, n_vectors))
        self.along_shift = nn.Parameter(torch.zeros(times, n_vectors))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        times = time_features(t.to(x.dtype), t.numel(), self.N_TIMES)
        pairs = self._pairs(x)
        return self._velocity(pairs, self._layers(pairs, times))

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        times = time_features(t.to(x.dtype), t.numel(), self.N_TIMES)
        pairs = self._pairs(x)
        layers = self._layers(pairs, times)
        return self._velocity(pairs, layers), self._trace(pairs, layers, times) / self.length

    def _pairs(self, x: Tensor) -> Pairs:
        r = self.signs.to(x.dtype).T @ x / self.length
        distance = (r.square().sum(-1, keepdim=True) + _SOFTENING).sqrt()
        direction = r / distance
        toward = self.signs.to(x.dtype).unsqueeze(1) * direction.transpose(1, 2).unsqueeze(1)
        spacing = self.reach / (len(self.centres) - 1)
        tail = 1 + (distance / self.reach).pow(4)
        offset = (distance * tail.pow(-0.25) - self.centres.to(x.dtype)) / spacing
        radial = torch.exp(-0.5 * offset.square())
        slope = -offset * radial * tail.pow(-1.25) / spacing
        return Pairs(distance, direction, toward.flatten(1, 2), radial, slope)

    def _layers(self, pairs: Pairs, times: Tensor) -> Layers:
        scalars, weights = self._moments(pairs.radial, times)
        s, a = self._gather(scalars), self._gather_vectors(pairs, weights).transpose(-1, -2)
        products = (a @ a.transpose(-1, -2)).flatten(2)
        surroundings = torch.cat([s / self.n_particles**0.5, products / self.n_particles], dim=-1)
        inner = surroundings @ self.embedding + at_times(self.embedding_shift, times)[:, self.kinds]
        state, exchanges = self._exchange(pairs, nn.functional.silu(inner), times)
        pair_inner = pairs.radial @ at_times(self.pair_radial, times) + self._spread(state @ self.pair_states)
        if self.pair_shift is not None:
            pair_inner = pair_inner + self._of_kinds(self.pair_shift)
        force = nn.functional.silu(pair_inner) @ at_times(self.force, times).unsqueeze(-1)
        force = force + pairs.radial @ at_times(self.force_radial, times).unsqueeze(-1)
        along = state @ self.along_vectors + at_times(self.along_shift, times).unsqueeze(1)
        return Layers(scalars, weights, a, inner, state, pair_inner, force, along, exchanges)

    def _exchange(self, pairs: Pairs, state: Tensor, times: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States after exchanges of messages, and the inner state of each; there is none here."""
        return state, ()

    def _velocity(self, pairs: Pairs, layers: Layers) -> Tensor:
        pushed = self._gather_vectors(pairs, layers.force).squeeze(-1) / self.n_particles**0.5
        v = pushed + (layers.along.unsqueeze(-1) * layers.vectors).sum(2)
        return v - v.mean(dim=1, keepdim=True)

    def _trace(self, pairs: Pairs, layers: Layers, times: Tensor) -> Tensor:
        """Σ_i ∂v_i/∂x_i ``[b]`` with positions in lengths, term by term."""
        rho, scale = pairs.distance, self.n_particles**-0.5
        square = 1 - _SOFTENING / rho.square()  # |e|², which is also the change of ρ along e
        spread = (self.n_dimensions - square) / rho  # ∇·e
        scalars_slope, weights_slope = self._moments(pairs.slope, times)
        by_inner = (scale * at_times(self.force, times)).unsqueeze(1) * silu_slope(layers.pair_inner)
        own_slope = (by_inner * (pairs.slope @ at_times(self.pair_radial, times))).sum(-1, keepdim=True)
        own_slope = own_slope + scale * (pairs.slope @ at_times(self.force_radial, times).unsqueeze(-1))
        direct = 2 * (own_slope * square + scale * layers.force * spread).sum(dim=(1, 2))
        direct = direct + (layers.along * self._gather(weights_slope * square + layers.weights * spread)).sum(dim=(1, 2))

        by_states = by_inner @ self.pair_states.T  # ∂φ/∂g, the same for both particles of a pair
        return direct + self._through_states(pairs, layers, by_states, scalars_slope, weights_slope, times)

    def _through_states(
        self, pairs: Pairs, layers: Layers, by_states: Tensor, scalars_slope: Tensor, weights_slope: Tensor, times: Tensor
    ) -> Tensor:
        """The part of the trace in which x_i moves v_i through states of particles, ``[b]``."""
        square, through_state = 1 - _SOFTENING / pairs.distance.square(), silu_slope(layers.inner)
        cotangent = self._own_cotangent(pairs, layers, by_states) * through_state.unsqueeze(-2)
        own = self._own_states(pairs, layers, cotangent, scalars_slope, weights_slope)
        return own + self._other_states(pairs, layers, by_states, through_state, scalars_slope * square, weights_slope * square)

    def _own_cotangent(self, pairs: Pairs, layers: Layers, by_states: Tensor) -> Tensor:
        """Derivatives of every component of v_i by the last state of i ``[b, n, d, H]``."""
        return self._gather_vectors(pairs, by_states) + layers.vectors.transpose(-1, -2) @ self.along_vectors.T

    def _other_states(
        self, pairs: Pairs, layers: Layers, by_states: Tensor, through_state: Tensor, scalars_along: Tensor, weights_along: Tensor
    ) -> Tensor:
        """The part in which x_i moves v_i through the state of another particle of the pair, ``[b]``; slopes are along e."""
        weights_along = weights_along + layers.weights * _SOFTENING / pairs.distance.pow(3)  # change of η e along e
        by_scalars = self.embedding[: self.n_scalars].T * self.n_particles**-0.5
        total = ((by_states * self._spread(through_state)) @ by_scalars * scalars_along).sum(dim=(1, 2))
        by_products = (self.embedding[self.n_scalars :] + self._transposed_products()).T / self.n_particles
        for side, sign in ((self.first, 1.0), (self.second, -1.0)):
            along_a = sign * (layers.vectors[:, side] * pairs.direction.unsqueeze(-2)).sum(-1)  # A·e
            change = (weights_along.unsqueeze(-1) * along_a.unsqueeze(-2)).flatten(2)
            total = total + ((by_states * through_state[:, side]) @ by_products * change).sum(dim=(1, 2))
        return total

    def _own_states(self, pairs: Pairs, layers: Layers, cotangent: Tensor, scalars_slope: Tensor, weights_slope: Tensor) -> Tensor:
        """The part in which x_i moves v_i through the moments of i itself, ``[b]``, from derivatives by its state ``[b, n, d, H]``."""
        b, n, d, c = len(cotangent), self.n_particles, self.n_dimensions, self.n_vectors
        by_s = cotangent @ self.embedding[: self.n_scalars].T * n**-0.5
        total = (by_s * self._gather_vectors(pairs, scalars_slope)).sum(dim=(1, 2, 3))
        by_products = cotangent @ (self.embedding[self.n_scalars :] + self._transposed_products()).T / n
        by_vectors = by_products.reshape(b, n, d, c, c) @ layers.vectors.unsqueeze(2)  # [b, n, k, C, a]
        # ∂A^{c,a}/∂x^k of the own particle: outer products of e, and the turning of e
        turning = layers.weights / pairs.distance
        outer = (pairs.direction.unsqueeze(-1) * pairs.direction.unsqueeze(-2)).flatten(2)
        change = self._gather(((weights_slope - turning).unsqueeze(-1) * outer.unsqueeze(-2)).flatten(2)).reshape(b, n, c, d, d)
        total = total + (by_vectors * change.permute(0, 1, 4, 2, 3)).sum(dim=(1, 2, 3, 4))
        straight = torch.diagonal(by_vectors, dim1=2, dim2=4).sum(-1)
        return total + (straight * self._gather(turning)).sum(dim=(1, 2))

    def _moments(self, radial: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """What a pair gives to the scalar moments ``[b, p, F]`` and to the vector moments ``[b, p, C]`` of both its particles."""
        moments = radial @ at_times(self.moments, times)
        if self.partners is not None:
            moments = moments * self._of_kinds(self.partners)
        scalars, vectors = moments.split([self.n_scalars, self.n_vectors], dim=-1)
        return scalars, vectors

    def _of_kinds(self, table: Tensor) -> Tensor:
        """Entries ``[p, m]`` of every pair in a table ``[kinds, kinds, m]``, whatever the order of its particles."""
        first, second = self.kinds[self.first], self.kinds[self.second]
        return table[first, second] + table[second, first]

    def _transposed_products(self) -> Tensor:
        """Rows of the embedding that belong to A^c'·A^c instead of A^c·A^c' ``[C C, H]``."""
        c = self.n_vectors
        return self.embedding[self.n_scalars :].reshape(c, c, -1).transpose(0, 1).reshape(c * c, -1)

    def _gather(self, pairs: Tensor) -> Tensor:
        """Sums over the pairs ``[b, p, m]`` of every particle ``[b, n, m]``."""
        return self.signs.to(pairs.dtype).abs() @ pairs

    def _gather_vectors(self, pairs: Pairs, weights: Tensor) -> Tensor:
        """Σ_j weights_ij e_ij of every particle, ``[b, n, d, m]``, from weights of pairs ``[b, p, m]``."""
        return (pairs.toward @ weights).unflatten(1, (self.n_particles, self.n_dimensions))

    def _spread(self, particles: Tensor) -> Tensor:
        """Sums ``[b, p, m]`` over the two particles of a pair ``[b, n, m]``."""
        return particles[:, self.first] + particles[:, self.second]


def at_times(coefficients: Tensor, times: Tensor) -> Tensor:
    """Weights ``[b, *shape]`` at times given by their features ``[b, T]``, from coefficients ``[T, *shape]``."""
    return (times @ coefficients.flatten(1)).reshape(len(times), *coefficients.shape[1:])


def silu_slope(x: Tensor) -> Tensor:
    """Derivative of x · sigmoid(x)."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))
