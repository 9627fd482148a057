"""Conditional affine map with a full lower-triangular matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.networks.mlp import MLP


class ConditionalTriangular(Transform):
    """Affine map of the stiff coordinates whose shift and triangular matrix depend on the torsions.

    y = μ + L (m(s) + A(s) z),  ln|dy/dz| = ln|L| + ln|A(s)|,

    with s the angles (the first ``n_angles`` columns, unchanged), A lower triangular with diagonal exp(a), and μ, L
    the mean and the Cholesky factor of the training data's covariance. On standard normal z it is the Gaussian with the full
    covariance of the stiff coordinates at given torsions: what the harmonic terms of a force field make, in one layer.

    Args:
        n_angles: Number of leading columns it is conditioned on.
        mean: μ ``[d]``.
        scale: L ``[d, d]``, lower triangular.
        hidden: Widths of the hidden layers of the conditioner.
        generator: Source of the initial weights.
    """

    #: Multiples of the torsions that the conditioner sees.
    HARMONICS = 3

    mean: Tensor
    scale: Tensor
    lower: Tensor

    def __init__(self, n_angles: int, *, mean: Tensor, scale: Tensor, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.n_angles, self.size = n_angles, len(mean)
        self.register_buffer("mean", mean.to(torch.float64).clone())
        self.register_buffer("scale", scale.to(torch.float64).clone())
        lower = torch.ones(self.size, self.size).tril(diagonal=-1)
        self.register_buffer("lower", lower.flatten(), persistent=False)
        n_out = 2 * self.size + self.size**2
        self.conditioner = MLP(2 * self.HARMONICS * n_angles, n_out, hidden=hidden, generator=generator)

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        angles, z_stiff = z[:, : self.n_angles], z[:, self.n_angles :]
        shift, log_diagonal, lower = self._affine(angles)
        inner = shift + log_diagonal.exp() * z_stiff + (lower @ z_stiff.unsqueeze(-1)).squeeze(-1)
        y = self.mean.to(z.dtype) + inner @ self.scale.T.to(z.dtype)
        return torch.cat([angles, y], dim=1), self._log_det(log_diagonal)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        angles, y = x[:, : self.n_angles], x[:, self.n_angles :]
        shift, log_diagonal, lower = self._affine(angles)
        inner = torch.linalg.solve_triangular(self.scale.to(x.dtype), (y - self.mean.to(x.dtype)).T, upper=False).T
        matrix = lower + torch.diag_embed(log_diagonal.exp())
        z = torch.linalg.solve_triangular(matrix, (inner - shift).unsqueeze(-1), upper=False).squeeze(-1)
        return torch.cat([angles, z], dim=1), -self._log_det(log_diagonal)

    def _affine(self, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift ``[b, d]``, log diagonal ``[b, d]`` and strictly lower part ``[b, d, d]`` at given torsions."""
        weight = next(self.conditioner.parameters())
        out = self.conditioner(harmonics(angles, self.HARMONICS).to(weight.dtype))
        shift, log_diagonal, lower = out.split([self.size, self.size, self.size**2], dim=1)
        lower = (lower * self.lower).to(angles.dtype).view(-1, self.size, self.size)
        return shift.to(angles.dtype), log_diagonal.to(angles.dtype), lower

    def _log_det(self, log_diagonal: Tensor) -> Tensor:
        return log_diagonal.sum(dim=1, dtype=torch.float64) + self.scale.diagonal().log().sum()


def harmonics(angle: Tensor, n: int) -> Tensor:
    """cos and sin of the first ``n`` multiples of angles ``[b, k]``: features ``[b, 2 n k]``."""
    multiples = torch.cat([m * angle for m in range(1, n + 1)], dim=1)
    return torch.cat([multiples.cos(), multiples.sin()], dim=1)
