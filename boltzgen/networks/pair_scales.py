"""How far apart the particles of every pair are on the way from base to data, and by how much that varies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from boltzgen.networks.pairs import shared_by_kinds

#: Centres of the functions, in spreads from the middle; they are as wide as they are apart.
_CENTRES = (-3.0, 3.0, 8)


@dataclass(frozen=True)
class PairStatistics:
    """Distances of the particles i and j in the base and in the data, symmetric ``[n, n]`` each.

    Attributes:
        base: Mean squared distance in the base, nm².
        data: Mean squared distance in the data, nm².
        variance: Variance of the distance in the data, nm².
        base_variance: Variance of the distance in the base, nm², where that is an ensemble of the same molecule; None for a normal base.
    """

    base: Tensor
    data: Tensor
    variance: Tensor
    base_variance: Tensor | None = None

    @classmethod
    def of(cls, base: Tensor, x: Tensor) -> PairStatistics:
        """From mean squared distances ``[n, n]`` in the base and data ``[m, n, d]``, both in nm."""
        return cls(base, *(values.to(base) for values in _squares_and_variances(x)))

    @classmethod
    def between(cls, x0: Tensor, x1: Tensor) -> PairStatistics:
        """From configurations ``[m, n, d]`` of two ensembles, in nm."""
        (base, base_variance), (data, variance) = _squares_and_variances(x0), _squares_and_variances(x1)
        return cls(base, data, variance, base_variance)

    def shared(self, kinds: Tensor) -> PairStatistics:
        """The same for all pairs of equal kinds ``[n]``: their mean, so that equal particles stay equal."""
        own = None if self.base_variance is None else shared_by_kinds(self.base_variance, kinds)
        base, data, variance = (shared_by_kinds(values, kinds) for values in (self.base, self.data, self.variance))
        return PairStatistics(base, data, variance, own)


def _squares_and_variances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares and variances of all distances in configurations ``[m, n, d]``, each ``[n, n]``."""
    square = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    mean = torch.zeros_like(square)
    for i in range(x.shape[1]):
        r = (x - x[:, i : i + 1]).double().square().sum(-1)
        square[i], mean[i] = r.mean(0), r.sqrt().mean(0)
    return square, (square - mean.square()).clamp_min(0.0)


class PairScales(nn.Module):
    """Functions of the distance ρ of a pair, centred where it is at time t and as wide as it varies there.

    On straight paths from the base to data, r_t = (1 − t) r_0 + t r_1, with independent ends,

        s²(t) = (1 − t)² ⟨r_0²⟩/d + t² Var r_1
        m²(t) = (1 − t)² ⟨r_0²⟩ + t² ⟨r_1²⟩ + ε² − s²(t)
        B_k(ρ, t) = exp(−½ ((u − c_k)/σ)²),  u = (ρ − m)/s

    so that a bond is resolved to a fraction of its own width near t = 1, which functions as wide as half a bond length cannot do. Where
    base and data are coupled m is off by a part of s, and far pairs, which vary widely, are described by other functions as well.

    Between two ensembles of one molecule, turned onto each other, a pair points the same way at both ends, up to the little that it turns;
    with means and variances of |r_0| and |r_1|

        m(t) = √([(1 − t) ⟨|r_0|⟩ + t ⟨|r_1|⟩]² + ε²),   s²(t) = (1 − t) Var r_0 + t Var r_1

    Args:
        statistics: Of all pairs ``[n, n]``, nm².
        first, second: Particles of the pairs ``[p]``.
        length: Unit of length, nm.
        softening: ε², in lengths squared.
        n_dimensions: d.
    """

    base: Tensor
    data: Tensor
    variance: Tensor
    base_variance: Tensor
    centres: Tensor

    def __init__(
        self, statistics: PairStatistics, first: Tensor, second: Tensor, *, length: float, softening: float, n_dimensions: int
    ) -> None:
        super().__init__()
        self.softening, self.between = softening, statistics.base_variance is not None
        own = statistics.base / n_dimensions if statistics.base_variance is None else statistics.base_variance
        chosen = {"base": statistics.base, "data": statistics.data, "variance": statistics.variance, "base_variance": own}
        for name, values in chosen.items():
            self.register_buffer(name, (values[first, second] / length**2).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("centres", torch.linspace(*_CENTRES), persistent=False)

    def __len__(self) -> int:
        return len(self.centres)

    def forward(self, t: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Functions and their derivatives by ρ, each ``[b, p, k]``, of distances ρ ``[b, p, 1]`` in lengths at times ``[b or 1]``."""
        t = t.reshape(-1, 1).to(distance.dtype)
        if self.between:
            variance = (1 - t) * self.base_variance + t * self.variance
            start, end = ((square - v).clamp_min(0).sqrt() for square, v in ((self.base, self.base_variance), (self.data, self.variance)))
            square = ((1 - t) * start + t * end).square() + self.softening
        else:
            from_base, from_data = (1 - t).square(), t.square()
            variance = from_base * self.base_variance + from_data * self.variance
            square = from_base * self.base + from_data * self.data + self.softening - variance
        middle = square.clamp_min(self.softening).sqrt().unsqueeze(-1)
        width = (self.centres[1] - self.centres[0]) * variance.sqrt().unsqueeze(-1)
        offset = (distance - middle) / width - self.centres / (self.centres[1] - self.centres[0])
        values = torch.exp(-0.5 * offset.square())
        return values, -offset * values / width
