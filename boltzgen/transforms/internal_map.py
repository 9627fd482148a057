"""Maps of configurations onto configurations: of a molecule's shape at fixed placement, and of some atoms only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.errors import InputError, ShapeError
from boltzgen.transforms.coupling import wrap
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import ZMatrix

ShapeMap = Callable[[Tensor, Context | None], tuple[Tensor, Tensor]]


class InternalMap(Transform):
    r"""A map of internal coordinates as a map of configurations that stay where they are.

    x ↦ q(x) ↦ q' = m(q) ↦ x', placed so that the first atom of the Z-matrix, the direction to the second and the half plane of the third
    are those of x. With x = (t, R, q), dx = J(q) dt dR dq and J = b₁² b₂² sin θ₁ Π b_i² sin θ_i (:class:`InternalCoordinates`), and t, R
    kept, the determinant of the whole map of 3n coordinates is

        ln|det ∂x'/∂x| = ln J(q') − ln J(q) + ln|det ∂q'/∂q|

    The part of the first three atoms is in J: a map that fixes a frame and counts the other atoms only loses it.

    Args:
        coordinates: The internal coordinates, without constrained bonds.
        transform: m, from q to q', both ``[b, n_internal]``.

    Raises:
        InputError: If bonds are constrained.

    References:
        Jarzynski, Phys. Rev. E 65, 046122 (2002), eq. 8 (the Jacobian is that of all coordinates).
    """

    def __init__(self, coordinates: InternalCoordinates, transform: Transform) -> None:
        super().__init__()
        if coordinates.n_internal != 3 * coordinates.zmatrix.n_atoms - 6:
            raise InputError(
                "expected a molecule without constrained bonds: on them the map would have to keep lengths that it is free to "
                "change; make the system with constraints=None and rigidWater=False, or leave these atoms out of the map"
            )
        self.coordinates, self.transform = coordinates, transform

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        """That of the map of internal coordinates."""
        return self.transform.log_det_error

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.through(self.transform.forward, z, context)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.through(self.transform.inverse, x, context)

    def through(self, shape_map: ShapeMap, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """x' and ln|det ∂x'/∂x| of configurations ``[b, n, 3]`` for any map of internal coordinates, given as a function."""
        q, left = self.coordinates.inverse(x)
        q, turned = shape_map(q, context)
        shape, entered = self.coordinates(q)
        return placed(shape, x.to(shape), self.coordinates.zmatrix).to(x.dtype), left + turned + entered


def placed(shape: Tensor, x: Tensor, zmatrix: ZMatrix) -> Tensor:
    """Configurations in the standard frame ``[b, n, 3]``, moved and turned into the frame of the first three atoms of x."""
    first, second, third = (x[:, int(atom)] for atom in zmatrix.rows[:3, 0])
    along = second - first
    e1 = along / along.norm(dim=1, keepdim=True)
    aside = third - first
    aside = aside - (aside * e1).sum(dim=1, keepdim=True) * e1
    e2 = aside / aside.norm(dim=1, keepdim=True)
    frame = torch.stack([e1, e2, torch.linalg.cross(e1, e2)], dim=1)
    return first.unsqueeze(1) + shape @ frame


class OnAtoms(Transform):
    """A map of some atoms; all others are carried along where they are.

    The determinant of the whole is that of the part: ∂x'/∂x is block triangular with the unit matrix for carried atoms.

    Args:
        transform: Map of configurations of the chosen atoms ``[b, k, 3]``.
        atoms: Their indices in the whole, in the order that the map expects.
        n_atoms: Number of atoms of the whole.

    Raises:
        InputError: If an index is outside, or stands twice.
    """

    atoms: Tensor

    def __init__(self, transform: Transform, *, atoms: Sequence[int], n_atoms: int) -> None:
        super().__init__()
        chosen = [int(atom) for atom in atoms]
        if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= n_atoms:
            raise InputError(f"expected different atom indices from 0 to {n_atoms - 1}, got {chosen[:20]}")
        self.transform, self.n_atoms = transform, n_atoms
        self.register_buffer("atoms", torch.tensor(chosen), persistent=False)

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        """That of the map of the chosen atoms."""
        return self.transform.log_det_error

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.on_atoms(self.transform.forward, z, context)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.on_atoms(self.transform.inverse, x, context)

    def on_atoms(self, atom_map: ShapeMap, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """x' and ln|det ∂x'/∂x| of configurations ``[b, n_atoms, 3]`` for any map of the chosen atoms, given as a function."""
        if x.ndim != 3 or x.shape[1] != self.n_atoms:
            raise ShapeError(f"expected configurations [b, {self.n_atoms}, 3], got {list(x.shape)}")
        moved, log_det = atom_map(x[:, self.atoms], context)
        return x.index_copy(1, self.atoms, moved.to(x.dtype)), log_det


class Turned(Transform):
    """Adds an angle to each of the first coordinates, and keeps the rest: torsions of one basin start in another.

    Args:
        angles: What is added, ``[k]`` in rad.
    """

    angles: Tensor

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.register_buffer("angles", angles.to(torch.float64))

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._turned(z, self.angles)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._turned(x, -self.angles)

    def _turned(self, y: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        k = len(angles)
        return torch.cat([wrap(y[:, :k] + angles.to(y)), y[:, k:]], dim=1), torch.zeros(len(y), dtype=torch.float64, device=y.device)
