"""Affine map of many coordinates that differs from a diagonal one in a few directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.networks.mlp import MLP
from boltzgen.transforms.triangular import harmonics


class LowRankAffine(Transform):
    r"""Affine map of the stiff coordinates by a matrix of low rank beside the unit matrix, and by shifts and scales.

        y = b(s) + e^{a(s)} ⊙ (z + U Vᵀ z),    ln|dy/dz| = Σ a(s) + ln|det(1 + Vᵀ U)|

    with U and V ``[d, r]``, and s some of the angles, which are unchanged. The determinant is Sylvester's, det(1_d + U Vᵀ) =
    det(1_r + Vᵀ U), and the inverse Woodbury's, (1 + U Vᵀ)⁻¹ = 1 − U (1 + Vᵀ U)⁻¹ Vᵀ: both cost what r × r matrices cost. Two states of a
    large molecule differ in a few collective directions: 2 d r numbers describe them, where a full matrix has d², which d coordinates
    of a few thousand frames cannot determine. It is the identity before training.

    Args:
        n_angles: Number of leading columns, all of them kept.
        size: d, the number of columns after them.
        rank: r.
        given: Angles that shifts and scales depend on; none makes them the same for all rows.
        hidden: Widths of the hidden layers of that dependence.
        generator: Source of the initial weights.

    References:
        Woodbury, Princeton Memorandum 42 (1950); van den Berg et al., Sylvester Normalizing Flows, UAI 2018, theorem 1.
    """

    #: Multiples of the torsions that shifts and scales see.
    HARMONICS = 3

    given: Tensor

    def __init__(
        self, n_angles: int, size: int, *, rank: int, given: Sequence[int] = (), hidden: Sequence[int] = (), generator: torch.Generator
    ) -> None:
        super().__init__()
        self.n_angles, self.size = n_angles, size
        self.register_buffer("given", torch.as_tensor(list(given), dtype=torch.int64), persistent=False)
        self.left = torch.nn.Parameter(torch.randn(size, rank, generator=generator) / math.sqrt(size))
        self.right = torch.nn.Parameter(torch.zeros(size, rank))
        self.shift = torch.nn.Parameter(torch.zeros(size))
        self.log_scale = torch.nn.Parameter(torch.zeros(size))
        self.conditioner = MLP(2 * self.HARMONICS * len(given), 2 * size, hidden=hidden, generator=generator) if given else None

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        angles, z_stiff = z[:, : self.n_angles], z[:, self.n_angles :]
        shift, log_scale, left, right = self._parts(angles)
        y = shift + log_scale.exp() * (z_stiff + (z_stiff @ right) @ left.T)
        return torch.cat([angles, y], dim=1), self._log_det(log_scale)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        angles, y = x[:, : self.n_angles], x[:, self.n_angles :]
        shift, log_scale, left, right = self._parts(angles)
        inner = (y - shift) * (-log_scale).exp()
        z = inner - torch.linalg.solve(self._small(left, right), (inner @ right).T).T @ left.T
        return torch.cat([angles, z], dim=1), -self._log_det(log_scale)

    def _parts(self, angles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shift and log scale ``[b, d]`` at given torsions, and both factors ``[d, r]``, in the precision of the input."""
        shift, log_scale = self.shift.expand(len(angles), -1), self.log_scale.expand(len(angles), -1)
        if self.conditioner is not None:
            out = self.conditioner(harmonics(angles[:, self.given], self.HARMONICS).to(self.shift.dtype))
            shift, log_scale = shift + out[:, : self.size], log_scale + out[:, self.size :]
        return tuple(part.to(angles.dtype) for part in (shift, log_scale, self.left, self.right))  # type: ignore[return-value]

    @staticmethod
    def _small(left: Tensor, right: Tensor) -> Tensor:
        """1 + Vᵀ U ``[r, r]``."""
        return torch.eye(left.shape[1], dtype=left.dtype, device=left.device) + right.T @ left

    def _log_det(self, log_scale: Tensor) -> Tensor:
        small = self._small(self.left.to(torch.float64), self.right.to(torch.float64))
        return log_scale.sum(dim=1, dtype=torch.float64) + torch.linalg.slogdet(small)[1]
