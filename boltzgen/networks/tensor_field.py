"""Graph network of spherical tensors in three dimensions: the only door to e3nn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import e3nn
import torch
from e3nn import o3
from torch import Tensor, nn

from boltzgen.networks.field import ParticleField
from boltzgen.networks.pairs import RadialBasis, bounded, draw_weights, kinds_and_times, one_hot_kinds


class TensorField(ParticleField):
    """Velocities from layers of messages whose features are tensors h^l of rank l = 0 … l_max, with 2l + 1 components.

        (h_j ⊗ Y)^l_i = c Σ_j Σ_{l1 l2} C^{l1 l2 l} R_{l1 l2}(B(ρ_ij), h⁰_i, h⁰_j) ⊙ h_j^{l1} Y^{l2}(r_ij/(ℓ (1 + ρ_ij)))
        h_i^l ← bounded[M_1 h_i^l + gate(M_2 (h ⊗ Y)^l_i)],   h⁰ = h_0(kind, t) at the start
        v_i = ℓ M h_i^{l=1} − mean

    with spherical harmonics Y as polynomials (smooth where particles coincide), Clebsch-Gordan coefficients C, linear maps M of
    the channels, c = 1/√n, and gates SiLU(h⁰) for scalars, sigmoid(h⁰') h^l for the others. It is equivariant to rotations and to
    permutations of equal particles; translation leaves it unchanged, and the centre of mass stays.

    **Reflections.** Paths with even l1 + l2 + l keep the natural parity (−1)^l of every tensor: with these alone, the field is
    equivariant to reflections too. The odd paths are the ones of the cross product: with them, polar and axial tensors are mixed, and
    the field tells a molecule from its mirror image.

    Args:
        n_particles: Number of particles n.
        n_dimensions: Dimensions of space: three.
        length: Unit ℓ of length; the typical distance of neighbours.
        labels: Kind of every particle (equal labels are equal particles); all equal by default.
        l_max: Highest rank of a tensor, at least 1.
        reflections: Whether the field is equivariant to reflections; if not, it has at least two layers.
        n_layers: Layers of messages.
        n_channels: Tensors of each rank.
        n_radial: Radial functions.
        hidden: Width of the hidden layer of R.
        generator: Source of the initial weights. The field starts as zero.

    Raises:
        ValueError: Space has not three dimensions, there is not exactly one label for each particle, or there are too few layers
            or ranks.

    References:
        Thomas et al., arXiv:1802.08219 (tensor field networks); Geiger & Smidt, arXiv:2207.09453 (e3nn); Batzner et al., Nat.
        Commun. 13, 2453 (2022), eqs. 5-8 (weights of each pair, gates).
    """

    N_TIMES = 6

    kinds: Tensor
    others: Tensor

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int = 3,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        l_max: int = 2,
        reflections: bool = True,
        n_layers: int = 3,
        n_channels: int = 16,
        n_radial: int = 24,
        hidden: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if n_dimensions != 3:
            raise ValueError(f"spherical tensors live in 3 dimensions, got {n_dimensions}: use EGNN")
        if l_max < 1 or n_layers < (1 if reflections else 2):
            raise ValueError(f"expected l_max ≥ 1 and a layer, two without reflections, got l_max {l_max} and {n_layers} layers")
        self.n_particles, self.n_dimensions, self.l_max, self.is_mirrored = n_particles, n_dimensions, l_max, reflections
        self.register_buffer("kinds", one_hot_kinds(labels, n_particles), persistent=False)
        self.register_buffer("others", 1.0 - torch.eye(n_particles).unsqueeze(-1), persistent=False)
        self.radial = RadialBasis(n_radial, length=length)
        self.harmonics = _spherical_harmonics(l_max)
        self.start = nn.Linear(self.kinds.shape[1] + self.N_TIMES, n_channels)
        self.push = nn.Linear(n_channels, n_channels)
        draw_weights(self, silent=[self.push], generator=generator)
        ranks = [0, *[l_max] * (n_layers - 1), 1]
        self.layers = nn.ModuleList(
            _Layer(
                _paths(l_in, l_max, l_out, reflections=reflections),
                n_channels=n_channels,
                n_radial=n_radial,
                hidden=hidden,
                generator=generator,
            )
            for l_in, l_out in itertools.pairwise(ranks)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        h = [self.start(kinds_and_times(self.kinds, t, x, self.N_TIMES)).unsqueeze(2)]
        r = x.unsqueeze(2) - x.unsqueeze(1)
        rho = self.radial.distance(r)
        y = self.harmonics(r / (self.radial.length * (1.0 + rho))) * self.others
        harmonics, functions = y.split([2 * rank + 1 for rank in range(self.l_max + 1)], dim=-1), self.radial(rho)
        for layer in self.layers:
            h = layer(h, harmonics, functions)
        v = self.radial.length * (self.push(h[0]) * h[1]).sum(-1)
        return v - v.mean(dim=1, keepdim=True)


class _Layer(nn.Module):
    """One update of tensors h^l ``[b, n, 2l + 1, n_channels]``, l = 0, 1 …, by products with spherical harmonics."""

    def __init__(
        self, paths: list[tuple[int, int, int]], *, n_channels: int, n_radial: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.paths, self.n_channels = paths, n_channels
        self.products = sorted({(l1, l2) for l1, l2, _ in paths})
        l_in, l_out = max(l1 for l1, _, _ in paths), max(l3 for _, _, l3 in paths)
        self.by_distance = nn.Linear(n_radial, hidden)
        self.by_here = nn.Linear(n_channels, hidden, bias=False)
        self.by_there = nn.Linear(n_channels, hidden, bias=False)
        self.weights = nn.Sequential(nn.SiLU(), nn.Linear(hidden, len(self.products) * n_channels))
        self.keep = nn.ModuleList(nn.Linear(n_channels, n_channels, bias=False) for _ in range(min(l_in, l_out) + 1))
        self.mix = nn.ModuleList()
        for rank in range(l_out + 1):
            n_out = n_channels if rank else n_channels * (1 + l_out)
            self.mix.append(nn.Linear(n_channels * sum(l3 == rank for _, _, l3 in paths), n_out, bias=rank == 0))
        draw_weights(self, silent=(), generator=generator)

    def forward(self, h: list[Tensor], harmonics: Sequence[Tensor], functions: Tensor) -> list[Tensor]:
        inner = self.by_distance(functions) + self.by_here(h[0]) + self.by_there(h[0]).transpose(1, 2)
        weights = self.weights(inner).chunk(len(self.products), dim=-1)
        scale = len(functions[0]) ** -0.5
        sums = {
            (l1, l2): scale * torch.einsum("bijmc,bjpc->bipmc", harmonics[l2].unsqueeze(-1) * w.unsqueeze(-2), h[l1])
            for (l1, l2), w in zip(self.products, weights, strict=True)
        }
        terms: list[list[Tensor]] = [[] for _ in self.mix]
        for l1, l2, l3 in self.paths:
            terms[l3].append(torch.einsum("bipmc,pmo->bioc", sums[l1, l2], _coupling(l1, l2, l3, functions.dtype, functions.device)))
        mixed = [mix(torch.cat(parts, dim=-1)) for mix, parts in zip(self.mix, terms, strict=True)]
        scalars, *gates = mixed[0].split(self.n_channels, dim=-1)
        new = [nn.functional.silu(scalars), *(torch.sigmoid(gate) * tensor for gate, tensor in zip(gates, mixed[1:], strict=True))]
        kept = [keep(old) for keep, old in zip(self.keep, h, strict=False)]
        return [bounded(tensor, dim=(-2, -1)) for tensor in [a + b for a, b in zip(new, kept, strict=False)] + new[len(kept) :]]


def _paths(l_in: int, l_harmonics: int, l_out: int, *, reflections: bool) -> list[tuple[int, int, int]]:
    """Products (l1, l2) → l3 of tensors and harmonics; those of odd sum, which mix polar and axial, without ``reflections`` only."""
    return [
        (l1, l2, l3)
        for l1 in range(l_in + 1)
        for l2 in range(l_harmonics + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, l_out) + 1)
        if not (reflections and (l1 + l2 + l3) % 2)
    ]


@functools.cache
def _coupling(l1: int, l2: int, l3: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coefficients ``[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]`` of the product of two tensors; a component of the product has variance one."""
    with torch.inference_mode(False):
        return (2 * l3 + 1) ** 0.5 * o3.wigner_3j(l1, l2, l3, dtype=dtype, device=device)


def _spherical_harmonics(l_max: int) -> o3.SphericalHarmonics:
    """Polynomials Y^l of a vector, l = 0 … l_max, not compiled: compiled code has no forward derivatives."""
    before = e3nn.get_optimization_defaults()["jit_mode"]
    e3nn.set_optimization_defaults(jit_mode="eager")
    try:
        return o3.SphericalHarmonics(list(range(l_max + 1)), normalize=False, normalization="component")
    finally:
        e3nn.set_optimization_defaults(jit_mode=before)
