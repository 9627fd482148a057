"""Deep field whose exact divergence costs d directional derivatives of its last layer, for any number of particles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from boltzgen.networks.field import ParticleField, along_directions
from boltzgen.networks.pairs import RadialBasis, bounded, draw_weights, kinds_and_times, one_hot_kinds


class HollowField(ParticleField):
    """Velocities of particles in surroundings that were described without them.

    The conditioner gives the state g_k^(i) of every particle k in a world without particle i, in layers over pairs (i, k):

        u_kl = r_kl / (ℓ (1 + ρ_kl))
        s_k^(i) = Σ_{l≠i,k} W(ρ_kl) ⊙ g_l^(i),   a_k^(i) = Σ_{l≠i,k} (U(ρ_kl) ⊙ P g_l^(i)) u_kl
        g_k^(i) ← bounded[g_k^(i) + G(g_k^(i), s_k^(i), √(1 + |a_k^(i)|²))],   g = g_0(kind, t) at the start

    The readout then puts particle i into that world:

        s_i = Σ_j ψ(ρ_ij, g_j^(i)),   A_i^c = Σ_j χ_c(ρ_ij, g_j^(i)) u_ij,   f_i = F(s_i, P_i, kind_i, t)
        P_i^{cc'} = A_i^c·A_i^c' / √(1 + Σ_c |A_i^c|²)
        v_i = ℓ [Σ_j φ(ρ_ij, g_j^(i), f_i) u_ij + Σ_c w_c(f_i) A_i^c] − mean

    It is equivariant to rotations and reflections and to permutations of equal particles; translation leaves it unchanged, and the
    centre of mass stays.

    **Divergence.** Messages on the directed edge k → i never contain x_i, so nothing has to be cut when they pass through further
    layers: x_i enters v_i in the readout only, through the vectors r_ij. ∂v_i/∂x_i is the derivative of the readout along the d
    directions of space with all states held fixed, for all i at once. The mean has no part in it, because the field is invariant
    to translations. Sums over l are products of n × n matrices, one for each channel: O(n³) multiplications, though few.

    Args:
        n_particles: Number of particles n.
        n_dimensions: Dimensions d of space.
        length: Unit ℓ of length; the typical distance of neighbours.
        labels: Kind of every particle (equal labels are equal particles); all equal by default.
        n_layers: Layers of the conditioner.
        n_radial: Radial functions.
        n_channels: Width of states g and of scalar moments.
        n_vectors: Vector moments.
        hidden: Width of the hidden layers.
        generator: Source of the initial weights. The field starts as zero.

    Raises:
        ValueError: There is not exactly one label for each particle.

    References:
        Chen & Duvenaud, NeurIPS 2019 (networks with cheap differential operators); Gloy & Olsson, NeurIPS 2025 (HollowFlow: a
        Jacobian of blocks from messages that do not return, on sparse graphs).
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
        n_layers: int = 2,
        n_radial: int = 24,
        n_channels: int = 32,
        n_vectors: int = 8,
        hidden: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = n_particles, n_dimensions
        self.register_buffer("kinds", one_hot_kinds(labels, n_particles), persistent=False)
        self.register_buffer("others", 1.0 - torch.eye(n_particles).unsqueeze(-1), persistent=False)
        self.radial = RadialBasis(n_radial, length=length)
        n_fixed = self.kinds.shape[1] + self.N_TIMES
        self.start = nn.Linear(n_fixed, n_channels)
        draw_weights(self.start, silent=(), generator=generator)
        self.layers = nn.ModuleList(
            _WorldLayer(n_radial=n_radial, n_channels=n_channels, n_vectors=n_vectors, hidden=hidden, generator=generator)
            for _ in range(n_layers)
        )
        self.readout = _Readout(
            n_fixed=n_fixed, n_radial=n_radial, n_channels=n_channels, n_vectors=n_vectors, hidden=hidden, generator=generator
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        r, fixed, states = self._surroundings(t, x)
        v = self.readout(r, fixed, states, self.radial, self.others)
        return v - v.mean(dim=1, keepdim=True)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r, fixed, states = self._surroundings(t, x)

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            """Velocities, and Σ_i ∂v_i/∂x_i along one direction of space."""
            shift = direction.expand_as(r).contiguous()
            v, moved = along_directions(lambda y: self.readout(y, fixed, states, self.radial, self.others), (r,), (shift,))
            return v, (moved * direction).sum(dim=(1, 2))

        axes = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        v, parts = vmap(along, out_dims=(None, 0))(axes)  # type: ignore[arg-type]
        return v - v.mean(dim=1, keepdim=True), parts.sum(dim=0)

    def _surroundings(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors r_ij ``[b, n, n, d]``, kinds and times ``[b, n, n_fixed]``, states g_j^(i) ``[b, i, j, n_channels]``."""
        r = x.unsqueeze(2) - x.unsqueeze(1)
        fixed = kinds_and_times(self.kinds, t, x, self.N_TIMES)
        rho = self.radial.distance(r)
        unit, functions = r / (self.radial.length * (1.0 + rho)), self.radial(rho)
        states = self.start(fixed).unsqueeze(1).expand(-1, self.n_particles, -1, -1)
        for layer in self.layers:
            states = layer(states, unit, functions, self.others)
        return r, fixed, states


class _WorldLayer(nn.Module):
    """One update of the states g_k^(i) ``[b, i, k, n_channels]``; particle i sends nothing in its row."""

    def __init__(self, *, n_radial: int, n_channels: int, n_vectors: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.filters = nn.Sequential(nn.Linear(n_radial, hidden), nn.SiLU(), nn.Linear(hidden, n_channels + n_vectors))
        self.senders = nn.Linear(n_channels, n_channels + n_vectors)
        self.update = nn.Sequential(nn.Linear(2 * n_channels + n_vectors, hidden), nn.SiLU(), nn.Linear(hidden, n_channels))
        draw_weights(self, silent=(), generator=generator)

    def forward(self, states: Tensor, unit: Tensor, functions: Tensor, others: Tensor) -> Tensor:
        scale = states.shape[1] ** -0.5
        filters = self.filters(functions) * others
        senders = self.senders(states) * others
        w, u = filters[..., : self.n_channels], filters[..., self.n_channels :]
        g, p = senders[..., : self.n_channels], senders[..., self.n_channels :]
        s = scale * torch.einsum("bklc,bilc->bikc", w, g)
        a = scale * torch.einsum("bklvx,bilv->bikvx", u.unsqueeze(-1) * unit.unsqueeze(-2), p)
        norms = (1.0 + a.square().sum(-1)).sqrt()
        return bounded(states + self.update(torch.cat([states, s, norms], dim=-1)))


class _Readout(nn.Module):
    """Velocities ``[b, n, d]``, before the mean is taken off, from vectors r_ij and the states of the j in worlds without i."""

    def __init__(self, *, n_fixed: int, n_radial: int, n_channels: int, n_vectors: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.by_distance = nn.Linear(n_radial, 2 * hidden)
        self.by_state = nn.Linear(n_channels, 2 * hidden, bias=False)
        self.moments = nn.Sequential(nn.SiLU(), nn.Linear(hidden, n_channels + n_vectors))
        self.own_state = nn.Sequential(nn.Linear(n_channels + n_vectors**2 + n_fixed, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.force = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.along_vectors = nn.Linear(hidden, n_vectors)
        draw_weights(self, silent=[self.force[-1], self.along_vectors], generator=generator)  # type: ignore[list-item]

    def forward(self, r: Tensor, fixed: Tensor, states: Tensor, radial: RadialBasis, others: Tensor) -> Tensor:
        scale = r.shape[1] ** -0.5
        rho = radial.distance(r)
        unit = others * r / (radial.length * (1.0 + rho))
        for_moments, for_force = (self.by_distance(radial(rho)) + self.by_state(states)).chunk(2, dim=-1)
        moments = self.moments(for_moments) * others
        s = scale * moments[..., : self.n_channels].sum(2)
        a = scale * torch.einsum("bijv,bijx->bivx", moments[..., self.n_channels :], unit)
        products = (a @ a.transpose(-1, -2)).flatten(-2) / (1.0 + a.square().sum(dim=(-1, -2))).sqrt().unsqueeze(-1)
        f = self.own_state(torch.cat([s, products, fixed], dim=-1))
        force = self.force(for_force + f.unsqueeze(2))
        return radial.length * (scale * (force * unit).sum(2) + (self.along_vectors(f).unsqueeze(-1) * a).sum(2))
