"""A velocity field of a few angles and a few values on lines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.networks.field import VelocityField, time_features
from boltzgen.networks.mlp import MLP

#: Widths of the bounded features of values on lines: fine ones near the centre, and coarse ones further out.
_WIDTHS = (0.5, 1.5, 4.5)


class TorusField(VelocityField):
    """v(t, x) = MLP of cos πkt, of cos mθ and sin mθ for every angle θ, and of y/√(1 + (y/w)²), some widths w, for every other value y.

    It is periodic in the angles, and bounded: far out on a line the velocity does not depend on where, so that the tails are those of the
    base. At rest before it is trained. The divergence is exact, from the derivatives carried along through the layers.

    Args:
        n_angles: Number of angles in rad, the first columns.
        n_linear: Number of other values, of about unit spread.
        harmonics: Largest m.
        n_times: Number of features of time.
        hidden: Widths of the hidden layers.
        generator: Source of the initial weights.
    """

    mask: Tensor
    multiples: Tensor
    widths: Tensor

    def __init__(
        self, n_angles: int, n_linear: int, *, harmonics: int = 4, n_times: int = 6, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.n_angles, self.n_linear, self.n_times = n_angles, n_linear, n_times
        size, per_angle = n_angles + n_linear, 2 * harmonics
        columns = torch.tensor([i for i in range(size) for _ in range(per_angle if i < n_angles else len(_WIDTHS))], dtype=torch.int64)
        self.register_buffer("mask", (torch.arange(size)[:, None] == columns).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("multiples", torch.arange(1, harmonics + 1).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("widths", torch.tensor(_WIDTHS), persistent=False)
        self.network = MLP(n_times + len(columns), size, hidden=hidden, generator=generator)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The number of values."""
        return (self.n_angles + self.n_linear,)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        features, _ = self._features(x)
        return self.network(torch.cat([time_features(t.to(x), len(x), self.n_times), features], dim=1))

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v, jacobian = self.jacobian(t, x)
        return v, jacobian.diagonal(dim1=1, dim2=2).sum(dim=1)

    def jacobian(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        features, slopes = self._features(x)
        times = time_features(t.to(x), len(x), self.n_times)
        still = times.new_zeros(len(x), len(self.mask), self.n_times)
        return self.network.along(torch.cat([times, features], dim=1), torch.cat([still, slopes[:, None] * self.mask], dim=2))

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[b, f]`` and the derivative of each with respect to the one value it depends on."""
        multiples, widths = self.multiples, self.widths
        phase = x[:, : self.n_angles, None] * multiples
        cos, sin = torch.cos(phase), torch.sin(phase)
        y = x[:, self.n_angles :, None]
        shrink = (1 + (y / widths).square()).rsqrt()
        features = torch.cat([torch.cat([cos, sin], dim=2).flatten(1), (y * shrink / widths).flatten(1)], dim=1)
        slopes = torch.cat([torch.cat([-multiples * sin, multiples * cos], dim=2).flatten(1), (shrink**3 / widths).flatten(1)], dim=1)
        return features, slopes
