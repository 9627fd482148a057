"""Graph network of invariant states and moving positions, over all pairs or over pairs within a cutoff."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.networks.field import ParticleField
from boltzgen.networks.pairs import RadialBasis, bounded, draw_weights, envelope, kinds_and_times, one_hot_kinds


class EGNN(ParticleField):
    """Velocities from layers of messages that update states h and positions y of the particles.

        m_ij = φ_m(h_i, h_j, B(ρ_ij)),   r_ij = y_i − y_j
        y_i ← y_i + c Σ_j w_ij φ_y(m_ij) r_ij / (1 + ρ_ij)
        h_i ← bounded[h_i + φ_h(h_i, c Σ_j w_ij m_ij)]
        v_i = y_i − x_i − mean,   y = x and h = φ_0(kind, t) at the start

    with radial functions B of the smooth distance ρ (:class:`RadialBasis`), c = 1/√(number of neighbours), and w_ij = 1, or the
    :func:`envelope` of ρ_ij/cutoff at the positions x. It is equivariant to rotations and reflections and to permutations of equal
    particles; translation leaves it unchanged, and the centre of mass stays.

    The divergence is that of the base class: n·d directions side by side.

    Args:
        n_particles: Number of particles n.
        n_dimensions: Dimensions d of space.
        length: Unit ℓ of length; the typical distance of neighbours.
        labels: Kind of every particle (equal labels are equal particles); all equal by default.
        n_layers: Layers of messages.
        n_radial: Radial functions.
        hidden: Width of states, messages and hidden layers.
        cutoff: Distance, in lengths, from which particles send no messages; their influence falls to zero smoothly. Only pairs
            within it are computed, which pays when most pairs are outside: with one particle in a volume ℓ³ and a cutoff of 2, a
            training step is as fast for 22 particles, and takes less than half the time for 55 and an eighth for 200. All pairs,
            at any distance, by default.
        generator: Source of the initial weights. The field starts as zero.

    Raises:
        ValueError: There is not exactly one label for each particle, no layer, or the cutoff is not positive.

    References:
        Satorras, Hoogeboom & Welling, ICML 2021, eqs. 3-6.
    """

    N_TIMES = 6

    kinds: Tensor

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        n_layers: int = 3,
        n_radial: int = 24,
        hidden: int = 64,
        cutoff: float | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if n_layers < 1 or (cutoff is not None and not cutoff > 0):
            raise ValueError(f"expected at least one layer and a positive cutoff or none, got {n_layers} layers and cutoff {cutoff}")
        self.n_particles, self.n_dimensions, self.cutoff = n_particles, n_dimensions, cutoff
        self.register_buffer("kinds", one_hot_kinds(labels, n_particles), persistent=False)
        self.radial = RadialBasis(n_radial, length=length)
        self.start = nn.Linear(self.kinds.shape[1] + self.N_TIMES, hidden)
        n_neighbours = n_particles if cutoff is None else min(n_particles, 4.0 * cutoff**n_dimensions)
        scale = n_neighbours**-0.5
        self.layers = nn.ModuleList(
            _Layer(hidden, n_radial, scale=scale, last=k == n_layers - 1, generator=generator) for k in range(n_layers)
        )
        draw_weights(self.start, silent=(), generator=generator)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        h = self.start(kinds_and_times(self.kinds, t, x, self.N_TIMES))
        y = x
        pairs = self._pairs(x)
        for layer in self.layers:
            h, y = layer(h, y, pairs, self.radial)
        v = y - x
        return v - v.mean(dim=1, keepdim=True)

    def _pairs(self, x: Tensor) -> _Pairs:
        """All pairs, or those within the cutoff."""
        n = self.n_particles
        if self.cutoff is None:
            return _AllPairs(1.0 - torch.eye(n, dtype=x.dtype, device=x.device).unsqueeze(-1))
        distance = self.radial.distance(x.unsqueeze(2) - x.unsqueeze(1)).reshape(-1) / self.cutoff
        apart = ~torch.eye(n, dtype=torch.bool, device=x.device).expand(len(x), n, n).reshape(-1)
        chosen = torch.nonzero((distance.detach() < 1.0) & apart).squeeze(1)
        here, within = chosen // n, chosen % n
        return _ListedPairs(here, here // n * n + within, envelope(distance[chosen]).unsqueeze(-1), b=len(x), n=n)


class _Pairs(ABC):
    """Which particles see each other: takes arrays ``[b, n, ...]`` of particles to arrays of pairs (i, j) and back."""

    @abstractmethod
    def here(self, values: Tensor) -> Tensor:
        """Values at i."""

    @abstractmethod
    def there(self, values: Tensor) -> Tensor:
        """Values at j."""

    @abstractmethod
    def sums(self, values: Tensor) -> Tensor:
        """Weighted sums over j, ``[b, n, ...]``."""


class _AllPairs(_Pairs):
    """Every pair, as axes 1 and 2."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def here(self, values: Tensor) -> Tensor:
        return values.unsqueeze(2)

    def there(self, values: Tensor) -> Tensor:
        return values.unsqueeze(1)

    def sums(self, values: Tensor) -> Tensor:
        return (self.weights * values).sum(dim=2)


class _ListedPairs(_Pairs):
    """Pairs by the numbers of their particles, counted through a batch of b rows."""

    def __init__(self, i: Tensor, j: Tensor, weights: Tensor, *, b: int, n: int) -> None:
        self.i, self.j, self.weights = i, j, weights
        self.b, self.n = b, n

    def here(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1)[self.i]

    def there(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1)[self.j]

    def sums(self, values: Tensor) -> Tensor:
        weighted = self.weights * values
        zeros = weighted.new_zeros(self.b * self.n, weighted.shape[-1])
        return zeros.index_add(0, self.i, weighted).unflatten(0, (self.b, self.n))


class _Layer(nn.Module):
    """One update of states ``[b, n, hidden]`` and positions ``[b, n, d]``; the last one leaves the states alone."""

    def __init__(self, hidden: int, n_radial: int, *, scale: float, last: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.by_distance = nn.Linear(n_radial, hidden)
        self.by_here = nn.Linear(hidden, hidden, bias=False)
        self.by_there = nn.Linear(hidden, hidden, bias=False)
        self.message = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.push = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.update = None if last else nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        draw_weights(self, silent=[self.push[-1]], generator=generator)  # type: ignore[list-item]

    def forward(self, h: Tensor, y: Tensor, pairs: _Pairs, radial: RadialBasis) -> tuple[Tensor, Tensor]:
        r = pairs.here(y) - pairs.there(y)
        rho = radial.distance(r)
        m = self.message(self.by_distance(radial(rho)) + pairs.here(self.by_here(h)) + pairs.there(self.by_there(h)))
        y = y + self.scale * pairs.sums(self.push(m) * r / (1.0 + rho))
        if self.update is not None:
            h = bounded(h + self.update(torch.cat([h, self.scale * pairs.sums(m)], dim=-1)))
        return h, y
