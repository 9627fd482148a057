"""Velocities of the particles around a central one, in a periodic box or not, with a closed-form divergence."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from boltzgen.networks.field import ParticleField, time_features
from boltzgen.networks.pairs import at_times, envelope, envelope_slope, nearest_images

#: Periodic images of the central particle that are within reach are among the nearest 27 up to this many shortest edges of the box.
MOST_EDGES = 1.5
#: Shortest distance of neighbours, and how far they push each other, in typical distances.
_NEAREST, _REACH = 0.7, 2.0


class SolventField(ParticleField):
    r"""Particles are pushed by a central one and by their neighbours, by these as their distances from the central one say.

        A_i^k = Σ_m w(s_im/S) B_k(s_im) s⃗_im,    G_i^l = Σ_m w(s_im/S) C_l(s_im),    s⃗_im = x_i − x_c + image m of the box
        v_i = Σ_k a_k A_i^k + Σ_j w(r_ij/R) Σ_q P_q(r_ij) [f_q(G_i) + g_q(G_j)] r⃗_ij − mean,    f, g linear with a constant
        ∇·v = Σ_i [∇·A_i a + Σ_j Σ_q (3 + r ∂_r)(w P_q) (f_q(G_i) + g_q(G_j)) + w P_q r⃗_ij·∇f_q(G_i)]

    with Gaussians B, C, P of the distance and the :func:`~boltzgen.networks.pairs.envelope` w, so that everything has three
    continuous derivatives. All images within S move a particle, which may be beyond half the box: velocities are periodic, and as symmetric
    as the box. r⃗_ij is that of the nearest image, with R within half the box. Subtracting the mean changes no relative motion, and no
    divergence, as the sum of all derivatives of a velocity that knows differences only is zero.

    a, f and g depend on time through cos π m t. With two functions of time a field can let a liquid out of its structure, move it, and
    take it in again, which no steady one can. Time swings of its divergence are what coarse steps get wrong: train by path gradients,
    which do not reward such errors as the mean works themselves do.

    It commutes with permutations of all particles but the central one, and with translations; with rotations and reflections
    too where there is no box.

    Args:
        n_particles: Number of particles.
        centre: Index of the central one.
        inner: Distance in nm from the centre that particles hardly come within.
        outer: Distance S in nm up to which the centre acts.
        length: Typical distance of neighbours in nm.
        box: Edges of a rectangular periodic box in nm ``[3]``; None without one.
        n_central: Number of functions B.
        n_places: Number of functions C.
        n_radial: Number of functions P.
        n_times: Number of functions of time.

    Raises:
        ValueError: A distance or a number does not fit.

    References:
        Jarzynski, Phys. Rev. E 65, 046122 (2002), section IV; Vaikuntanathan & Jarzynski, Phys. Rev. Lett. 100, 190601 (2008) (flows
        that escort a growing solute); Köhler, Klein & Noé, ICML 2020 (kernels with a closed-form divergence).
    """

    box: Tensor | None
    images: Tensor
    others: Tensor

    def __init__(
        self,
        n_particles: int,
        *,
        centre: int,
        inner: float,
        outer: float,
        length: float,
        box: Tensor | None = None,
        n_central: int = 10,
        n_places: int = 4,
        n_radial: int = 8,
        n_times: int = 2,
    ) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions, self.centre, self.outer = n_particles, 3, centre, outer
        self.reach = _REACH * length
        if (
            not 0 <= centre < n_particles
            or not 0 <= inner < outer
            or not length > 0
            or min(n_central, n_places, n_radial) < 2
            or n_times < 1
        ):
            raise ValueError(
                f"expected a centre from 0 to {n_particles - 1}, 0 <= inner < outer, a positive length, at least two functions of distance "
                f"and one of time, got {centre}, {inner}, {outer}, {length}, {n_central}, {n_places}, {n_radial} and {n_times}"
            )
        if box is not None:
            shortest = float(box.min())
            if outer > MOST_EDGES * shortest * (1 + 1e-9):
                raise ValueError(f"expected outer within {MOST_EDGES} times the shortest edge {shortest} of the box, got {outer}")
            self.reach = min(self.reach, 0.5 * shortest)
        self.register_buffer("box", None if box is None else box.to(torch.float64), persistent=False)
        shifts = itertools.product((-1, 0, 1), repeat=3) if box is not None else [(0, 0, 0)]
        self.register_buffer("images", torch.tensor(list(shifts), dtype=torch.get_default_dtype()), persistent=False)
        self.register_buffer("others", torch.tensor([k for k in range(n_particles) if k != centre]), persistent=False)
        self.central = _Gaussians(inner, 0.95 * outer, n_central)
        self.places = _Gaussians(inner, 0.95 * outer, n_places)
        self.radial = _Gaussians(_NEAREST * length, 0.9 * self.reach, n_radial)
        self.by_centre = nn.Parameter(torch.zeros(n_times, n_central))
        self.by_here = nn.Parameter(torch.zeros(n_times, n_places + 1, n_radial))
        self.by_there = nn.Parameter(torch.zeros(n_times, n_places + 1, n_radial))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.divergence(t, x)[0]

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n = len(x), self.n_particles - 1
        times = time_features(t.to(x.dtype), b, len(self.by_centre))
        d = nearest_images(x[:, self.others] - x[:, self.centre : self.centre + 1], self.box)
        v, divergence, place, slope = self._from_centre(d, at_times(self.by_centre, times))
        pushed, stretched = self._from_neighbours(d, place, slope, at_times(self.by_here, times), at_times(self.by_there, times))
        v = x.new_zeros(x.shape).index_copy(1, self.others, (v + pushed).unflatten(0, (b, n)))
        return v - v.mean(dim=1, keepdim=True), (divergence + stretched).unflatten(0, (b, n)).sum(dim=1)

    def _from_centre(self, d: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Velocities ``[b n, 3]`` by the centre, divergences ``[b n]``, places G ``[b, n, L + 1]``, their slopes ``[b, n, L + 1, 3]``."""
        b, n = d.shape[:2]
        images = self.images if self.box is None else self.images * self.box.to(d)
        every = d.flatten(0, 1).unsqueeze(1) + images
        particle, image = (every.detach().square().sum(dim=2) < self.outer**2).nonzero(as_tuple=True)
        vector = every[particle, image]
        s, row = _norm(vector), particle // n
        values, slopes = self.central(s, self.outer)
        push, push_slope = ((functions * weights[row]).sum(dim=1) for functions in (values, slopes))
        v = d.new_zeros(b * n, 3).index_add(0, particle, push.unsqueeze(1) * vector)
        divergence = d.new_zeros(b * n).index_add(0, particle, 3 * push + push_slope * s)
        values, slopes = self.places(s, self.outer)
        place = d.new_zeros(b * n, values.shape[1]).index_add(0, particle, values)
        slopes = slopes.unsqueeze(2) * (vector / s.unsqueeze(1)).unsqueeze(1)
        slope = d.new_zeros(b * n, *slopes.shape[1:]).index_add(0, particle, slopes)
        place = torch.cat([place, torch.ones_like(place[:, :1])], dim=1)
        slope = torch.cat([slope, torch.zeros_like(slope[:, :1])], dim=1)
        return v, divergence, place.unflatten(0, (b, n)), slope.unflatten(0, (b, n))

    def _from_neighbours(self, d: Tensor, place: Tensor, slope: Tensor, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities ``[b n, 3]`` by neighbours and their divergences ``[b n]``."""
        b, n = d.shape[:2]
        with torch.no_grad():
            square = nearest_images(d.unsqueeze(2) - d.unsqueeze(1), self.box).square().sum(dim=3)
            row, i, j = ((square < self.reach**2) & ~torch.eye(n, dtype=torch.bool, device=d.device)).nonzero(as_tuple=True)
        i, j = row * n + i, row * n + j
        flat = d.flatten(0, 1)
        vector = nearest_images(flat[i] - flat[j], self.box)
        r = _norm(vector)
        values, slopes = self.radial(r, self.reach)
        weights = (place @ here).flatten(0, 1)[i] + (place @ there).flatten(0, 1)[j]
        push = (values * weights).sum(dim=1)
        v = torch.zeros_like(flat).index_add(0, i, push.unsqueeze(1) * vector)
        divergence = r.new_zeros(b * n).index_add(0, i, 3 * push + r * (slopes * weights).sum(dim=1))
        moments = r.new_zeros(b * n, values.shape[1], 3).index_add(0, i, values.unsqueeze(2) * vector.unsqueeze(1))
        along = torch.einsum("bplx,blq->bpqx", slope, here).flatten(0, 1)
        return v, divergence + (along * moments).sum(dim=(1, 2))


class _Gaussians(nn.Module):
    """Functions w(s/S) exp(−½ ((s − c_k)/σ)²) of a distance, with centres a distance σ apart."""

    centres: Tensor

    def __init__(self, low: float, high: float, n: int) -> None:
        super().__init__()
        self.width = (high - low) / (n - 1)
        self.register_buffer("centres", torch.linspace(low, high, n), persistent=False)

    def forward(self, s: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Values and slopes ``[p, n]`` at distances ``[p]`` up to ``end``."""
        offset = (s.unsqueeze(1) - self.centres) / self.width
        values, w, slope = torch.exp(-0.5 * offset.square()), envelope(s / end).unsqueeze(1), envelope_slope(s / end).unsqueeze(1)
        return w * values, (slope / end - w * offset / self.width) * values


def _norm(d: Tensor) -> Tensor:
    """Lengths ``[p]`` of vectors ``[p, 3]``, with a derivative where they are zero."""
    return (d.square().sum(dim=1) + 1e-18).sqrt()
