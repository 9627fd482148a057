"""A map that pushes atoms away from a central one, or lets them in: solvent around a solute that grows or shrinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from boltzgen.core import Context, Transform
from boltzgen.errors import InputError, ShapeError
from boltzgen.networks.pairs import nearest_images
from boltzgen.transforms.coupling import UNIT_SLOPE, eager_spline


class RadialMap(Transform):
    r"""Every atom moves along the line to a central one, to a distance that is a learned growing function of its distance.

    x_i' = x_i + (R(r_i)/r_i − 1) d_i with d_i the nearest image of x_i − x_c and r_i = |d_i|. R is a monotone rational-quadratic spline of
    [inner, outer] onto itself with slope 1 at both ends, and the identity elsewhere. One R serves all atoms, so that the map commutes with
    their permutations, with rotations and with translations. An atom moves by its own distance only, and radially:

        ln|det ∂x'/∂x| = Σ_i 2 ln(R(r_i)/r_i) + ln R'(r_i)

    Within half the box every point has one nearest image, so that the ball of radius ``outer`` is mapped onto itself and nothing
    crosses its surface; all other periodic images move alike. It is the identity before training.

    Args:
        n_atoms: Number of atoms.
        centre: Index of the central atom, which stays.
        inner: Distance in nm below which nothing moves, where no atom ever is.
        outer: Distance in nm beyond which nothing moves.
        box: Edges of a rectangular box in nm ``[3]``; None without one.
        n_bins: Bins of the spline.

    Raises:
        InputError: If the distances do not ascend, or reach beyond half the box.

    References:
        Jarzynski, Phys. Rev. E 65, 046122 (2002), section IV (radial maps around a growing cavity); Durkan et al., Neural Spline Flows,
        NeurIPS 2019, eqs. 4-8.
    """

    box: Tensor | None
    others: Tensor

    def __init__(self, n_atoms: int, *, centre: int, inner: float, outer: float, box: Tensor | None = None, n_bins: int = 16) -> None:
        super().__init__()
        if not 0 <= centre < n_atoms:
            raise InputError(f"expected a central atom from 0 to {n_atoms - 1}, got {centre}")
        if not 0 <= inner < outer or n_bins < 2:
            raise InputError(f"expected distances 0 <= inner < outer and two bins or more, got {inner}, {outer} and {n_bins}")
        if box is not None and 2 * outer > float(box.min()) * (1 + 1e-9):
            raise InputError(
                f"nearest images are unique up to half the shortest edge of the box, {float(box.min()) / 2:.4f} nm, not {outer}"
            )
        self.n_atoms, self.centre, self.inner, self.outer = n_atoms, centre, inner, outer
        self.register_buffer("box", None if box is None else box.to(torch.float64), persistent=False)
        self.register_buffer("others", torch.tensor([atom for atom in range(n_atoms) if atom != centre]), persistent=False)
        self.widths = nn.Parameter(torch.zeros(n_bins, dtype=torch.float64))
        self.heights = nn.Parameter(torch.zeros(n_bins, dtype=torch.float64))
        self.slopes = nn.Parameter(torch.full((n_bins - 1,), UNIT_SLOPE, dtype=torch.float64))

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._moved(z, inverse=False)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._moved(x, inverse=True)

    def radius(self, r: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """R, or its inverse, at distances ``[...]`` in nm, and ln of the derivative."""
        middle, half = 0.5 * (self.outer + self.inner), 0.5 * (self.outer - self.inner)
        moves = (r > self.inner) & (r < self.outer)
        s = ((r - middle) / half).clamp(-1.0, 1.0).reshape(-1, 1)
        ends = self.slopes.new_full((1,), UNIT_SLOPE)
        slopes = torch.cat([ends, self.slopes, ends])
        widths, heights, slopes = (knots.expand(len(s), 1, -1) for knots in (self.widths, self.heights, slopes))
        moved, log_slope = eager_spline(s, widths, heights, slopes, inverse)
        moved, log_slope = (values.reshape(r.shape) for values in (moved, log_slope))
        return torch.where(moves, middle + half * moved, r), torch.where(moves, log_slope, 0.0)

    def _moved(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != (self.n_atoms, 3):
            raise ShapeError(f"expected configurations [b, {self.n_atoms}, 3], got {list(x.shape)}")
        exact = x.to(torch.float64)
        d = nearest_images(exact[:, self.others] - exact[:, self.centre : self.centre + 1], self.box)
        r = d.norm(dim=2)
        new, log_slope = self.radius(r, inverse=inverse)
        stretch = torch.where(r > self.inner, new / r.clamp_min(1e-12), 1.0)
        return exact.index_add(1, self.others, (stretch - 1).unsqueeze(2) * d).to(x.dtype), (2 * stretch.log() + log_slope).sum(dim=1)
