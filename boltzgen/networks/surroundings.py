"""Smooth numbers of the atoms around given points, by kind and distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.networks.pairs import envelope, nearest_images, one_hot_kinds

#: Distances between points and atoms that are looked at in one go.
_PAIRS = 2_000_000

#: Spread, in atoms, below which a number does not vary: it is left out, as zero.
_CONSTANT = 1e-6


class Surroundings(nn.Module):
    r"""What the atoms around some points look like: numbers and directions that are smooth, and blind to the order of equal atoms.

    With r the vector from point p to the nearest image of atom j, r its length and r_c the cutoff,

        n_pkg = Σ_{j of kind k} B_g(r),   v_pkg = Σ_{j of kind k} B_g(r) r/|r|,   B_g(r) = exp(−½ (ln(r/r_g)/σ)²) w(r/r_c)

    with r_g = r_0 e^{gσ} up to r_c, finest at short distances, and w the :func:`~boltzgen.networks.pairs.envelope`. No image jumps inside
    a cutoff of half the shortest edge. n is invariant to a common rotation of points and atoms, v turns with it. Both are given in units
    of the data's spread, n from the data's mean (:meth:`standardise`); these travel with the weights.

    Args:
        n_points: Number of points.
        kinds: A label for every atom; equal labels are one kind.
        inner: Distance r_0 of the first function in nm.
        cutoff: Distance r_c in nm beyond which atoms do not count.
        n_functions: Number of functions of distance, at least two; the last one has its centre at the cutoff.
        box: Edges of a rectangular periodic box in nm ``[3]``, None without one.

    Raises:
        ValueError: If the cutoff is above half the shortest edge, distances are not 0 < inner < cutoff, or there are too few functions.
    """

    member: Tensor
    box: Tensor | None
    centres: Tensor
    mean: Tensor
    spread: Tensor
    length: Tensor

    def __init__(
        self, n_points: int, kinds: Sequence[int], *, inner: float, cutoff: float, n_functions: int, box: Tensor | None = None
    ) -> None:
        super().__init__()
        if not 0 < inner < cutoff or n_functions < 2:
            raise ValueError(f"expected 0 < inner < cutoff and at least 2 functions, got {inner}, {cutoff} and {n_functions}")
        if box is not None and cutoff > 0.5 * float(box.min()):
            raise ValueError(f"expected a cutoff of at most half the shortest edge, {0.5 * float(box.min()):.4g} nm, got {cutoff:.4g} nm")
        member = one_hot_kinds(kinds, len(kinds))
        self.n_points, self.n_kinds, self.n_functions = n_points, member.shape[1], n_functions
        self.cutoff = cutoff
        self.register_buffer("member", member.argmax(1), persistent=False)
        self.register_buffer("box", None if box is None else box.to(torch.float64), persistent=False)
        self.register_buffer("centres", torch.linspace(math.log(inner), math.log(cutoff), n_functions, dtype=torch.float64))
        shape = (n_points, self.n_features)
        for name, value in (("mean", torch.zeros(shape)), ("spread", torch.ones(shape)), ("length", torch.ones(shape))):
            self.register_buffer(name, value.to(torch.float64))

    @property
    def n_features(self) -> int:
        """Numbers for each point: kinds times functions."""
        return self.n_kinds * self.n_functions

    def forward(self, points: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised numbers ``[b, p, f]`` and directions ``[b, p, f, 3]`` for points ``[b, p, 3]`` and atoms ``[b, m, 3]`` in nm."""
        n, v = self._sums(points, around)
        return _over(n - self.mean, self.spread), _over(v, self.length.unsqueeze(-1))

    @torch.no_grad()
    def standardise(self, points: Tensor, around: Tensor) -> None:
        """Take mean and spread from data: points ``[b, p, 3]`` and atoms ``[b, m, 3]`` in nm."""
        n, v = self._sums(points, around)
        self.mean.copy_(n.mean(dim=0))
        self.spread.copy_(n.std(dim=0))
        self.length.copy_(v.square().sum(dim=-1).mean(dim=0).sqrt())

    def _sums(self, points: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, _PAIRS // max(1, points.shape[1] * around.shape[1]))
        parts = [self._sums_of(*part) for part in zip(points.split(rows), around.split(rows), strict=True)]
        return torch.cat([n for n, _ in parts]), torch.cat([v for _, v in parts])

    def _sums_of(self, points: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
        """n and v before they are standardised; only pairs within the cutoff are computed."""
        with torch.no_grad():
            apart = nearest_images(around.unsqueeze(1) - points.unsqueeze(2), self.box).square().sum(dim=-1)
            row, point, atom = (apart < self.cutoff**2).nonzero(as_tuple=True)
        d = nearest_images(around[row, atom] - points[row, point], self.box)
        r = d.square().sum(dim=-1, keepdim=True).clamp_min(1e-12).sqrt()
        offset = (r.log() - self.centres) / (self.centres[1] - self.centres[0])
        value = torch.exp(-0.5 * offset.square()) * envelope(r / self.cutoff)
        terms = torch.cat([value.unsqueeze(-1), value.unsqueeze(-1) * (d / r).unsqueeze(1)], dim=-1)
        to = (row * self.n_points + point) * self.n_kinds + self.member[atom]
        sums = terms.new_zeros(len(points) * self.n_points * self.n_kinds, self.n_functions, 4).index_add(0, to, terms)
        sums = sums.view(len(points), self.n_points, self.n_features, 4)
        return sums[..., 0], sums[..., 1:]


def _over(values: Tensor, spread: Tensor) -> Tensor:
    """Values in units of their spread; zero where they do not vary."""
    return torch.where(spread > _CONSTANT, values / spread.clamp_min(_CONSTANT), 0.0)
