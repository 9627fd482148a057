"""Internal coordinates: bonds, angles and torsions of a Z-matrix as a transform onto Cartesian coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.errors import DomainError, ShapeError, TopologyError
from boltzgen.transforms.zmatrix import ZMatrix

#: ln of the volume of the rotation group, 8π² (Haar measure as dα sin β dβ dγ over Euler angles).
LOG_FRAME = math.log(8 * math.pi**2)


class InternalCoordinates(Transform):
    r"""Map from internal coordinates q to Cartesian coordinates x, per unit volume of the removed translation.

    With x = (translation, rotation, q), integrated over all rotations,

        log_det = ln(b₁² b₂² sin θ₁) + Σ_{i≥4} ln(b_i² sin θ_i) + ln 8π²

    (Gō & Scheraga, Macromolecules 9, 535 (1976), eq. 12; the first term belongs to the frame of the first three atoms).
    ``forward`` returns x in the standard frame: the first atom of the Z-matrix at the origin, the second on the positive x
    axis, the third in the xy plane with y > 0. ``inverse`` accepts any placement. Everything is float64.

    Constrained bonds (``zmatrix.fixed_bond``) are constants, not columns: then log_det is the same expression at the fixed
    lengths, and ``inverse`` ignores what ``x`` says about them. Which density constrained dynamics samples on
    that manifold is the matter of :class:`boltzgen.targets.constrained.ConstrainedTarget`.

    Args:
        zmatrix: Which atoms place which atom.

    Attributes:
        n_internal: Number of columns of q: 3n − 6 − (number of constrained bonds).
        bond_columns: Columns of q that are bond lengths in nm; ``angle_columns`` (rad, in (0, π)) and ``torsion_columns``
            (rad, in [−π, π)) follow them.
        bond_rows: Row of the Z-matrix of every bond column; likewise ``angle_rows`` and ``torsion_rows``.

    Raises:
        TopologyError: If the Z-matrix is not a tree of the kind that ``build_zmatrix`` makes.
    """

    bond_columns: Tensor
    angle_columns: Tensor
    torsion_columns: Tensor
    bond_rows: Tensor
    angle_rows: Tensor
    torsion_rows: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        n = zmatrix.n_atoms
        self.zmatrix = zmatrix
        fixed = torch.as_tensor(zmatrix.fixed_bond, dtype=torch.float64)
        free = torch.arange(1, n)[torch.isnan(fixed[1:])]
        m = len(free)
        self.n_internal = m + (n - 2) + (n - 3)
        tree = _Tree.of(zmatrix)
        buffers = {
            "bond_rows": free, "angle_rows": torch.arange(2, n), "torsion_rows": torch.arange(3, n),
            "bond_columns": torch.arange(m), "angle_columns": torch.arange(m, m + n - 2),
            "torsion_columns": torch.arange(m + n - 2, self.n_internal),
            "_rows": torch.as_tensor(zmatrix.rows), "_order": torch.argsort(torch.as_tensor(zmatrix.rows[:, 0])),
            "_fixed": torch.nan_to_num(fixed), "_log_fixed": 2 * torch.log(fixed[1:][~torch.isnan(fixed[1:])]).sum(),
            "_parent_frame": tree.parent_frame, "_sibling": tree.sibling, "_has_sibling": tree.has_sibling, "_path": tree.path,
            "_root": torch.stack([torch.diag(torch.tensor([-1.0, 1.0, -1.0])), torch.eye(3)]).to(torch.float64),
        }  # fmt: skip
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self._generations = tree.generations

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Internal to Cartesian coordinates.

        Args:
            z: Internal coordinates q ``[b, n_internal]``; torsions may be given outside [−π, π).
            context: Unused.

        Returns:
            Coordinates ``[b, n, 3]`` in nm in the standard frame, and log_det ``[b]``.

        Raises:
            ShapeError: If ``z`` has another shape.
            DomainError: If a bond is not positive or an angle is not inside (0, π).
        """
        q = self._checked(z)
        bonds, angles, torsions = q.split([len(self.bond_rows), len(self.angle_rows), len(self.torsion_rows)], dim=1)
        padded = torch.nn.functional.pad(torsions, (1, 0))
        around = padded + padded[:, self._sibling] * self._has_sibling
        x = self._place(self._lengths(bonds), angles, around)
        return x, self._log_det(bonds, angles)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Cartesian to internal coordinates.

        Args:
            x: Coordinates ``[b, n, 3]`` in nm, in any placement.
            context: Unused.

        Returns:
            q ``[b, n_internal]`` (nm, rad; torsions in [−π, π)) and −log_det ``[b]``.

        Raises:
            ShapeError: If ``x`` has another shape.
        """
        n = self.zmatrix.n_atoms
        if x.ndim != 3 or tuple(x.shape[1:]) != (n, 3):
            raise ShapeError(f"expected coordinates [b, {n}, 3], got {list(x.shape)}")
        x = x.to(torch.float64)
        to_parent = x[:, self._rows[1:, 1]] - x[:, self._rows[1:, 0]]
        bonds = to_parent[:, self.bond_rows - 1].norm(dim=-1)
        axis = x[:, self._rows[2:, 2]] - x[:, self._rows[2:, 1]]
        normal = torch.linalg.cross(axis, to_parent[:, 1:])
        angles = torch.atan2(normal.norm(dim=-1), -(axis * to_parent[:, 1:]).sum(-1))
        reference = x[:, self._rows[3:, 3]] - x[:, self._rows[3:, 2]]
        torsions = _torsion(to_parent[:, 2:], axis[:, 1:], reference)
        return torch.cat([bonds, angles, torsions], dim=1), -self._log_det(bonds, angles)

    def _checked(self, q: Tensor) -> Tensor:
        """``q`` in float64, inside its domain."""
        if q.ndim != 2 or q.shape[1] != self.n_internal:
            raise ShapeError(f"expected internal coordinates [b, {self.n_internal}], got {list(q.shape)}")
        q = q.to(torch.float64)
        m, a = len(self.bond_rows), len(self.angle_rows)
        inside = q[:, : m + a] > 0
        inside[:, m:] &= q[:, m : m + a] < math.pi
        if not bool(inside.all()):
            row, column = (~inside).nonzero()[0].tolist()
            kind, end = ("bond", 2) if column < m else ("angle", 3)
            atoms = self._rows[self.bond_rows[column] if column < m else self.angle_rows[column - m], :end].tolist()
            expected = "a positive length in nm" if kind == "bond" else "an angle inside (0, π)"
            raise DomainError(f"column {column} (the {kind} {'–'.join(map(str, atoms))}) is {float(q[row, column])} in row {row}; expected "
                              f"{expected}: bound the coordinates before this transform")  # fmt: skip
        return q

    def _lengths(self, bonds: Tensor) -> Tensor:
        """Lengths of the bonds of all rows ``[b, n]``, the constrained ones included; 0 in the first row."""
        return self._fixed.expand(len(bonds), -1).index_copy(1, self.bond_rows, bonds)

    def _log_det(self, bonds: Tensor, angles: Tensor) -> Tensor:
        return 2 * torch.log(bonds).sum(1) + torch.log(torch.sin(angles)).sum(1) + self._log_fixed + LOG_FRAME

    def _place(self, lengths: Tensor, angles: Tensor, torsions: Tensor) -> Tensor:
        """Coordinates from the lengths of all rows, angles and torsions about j–k of rows 2 and up.

        Every bond j→i carries a frame (e₁ along it, e₂ towards the reference atom of torsion 0); that of a child follows by a
        rotation M(θ, τ), and its bond direction is M's first column. Frames are computed one generation at a time.
        """
        b = len(lengths)
        cos, sin = torch.cos(angles), torch.sin(angles)
        cos_t, sin_t = torch.cos(torsions), torch.sin(torsions)
        first = torch.stack([-cos, sin * cos_t, sin * sin_t], dim=-1)
        second = torch.stack([-sin, -cos * cos_t, -cos * sin_t], dim=-1)
        third = torch.stack([torch.zeros_like(cos), -sin_t, cos_t], dim=-1)
        rotations = torch.stack([first, second, third], dim=-1)
        generation = self._root.expand(b, 2, 3, 3)
        frames = [generation]
        for children, parents in self._generations:
            generation = generation[:, parents] @ rotations[:, children]
            frames.append(generation)
        directions = (torch.cat(frames, dim=1)[:, self._parent_frame] @ first.unsqueeze(-1)).squeeze(-1)
        along_x = self._root[1, 0].expand(b, 2, 3)
        steps = torch.cat([along_x, directions], dim=1) * lengths.unsqueeze(-1)
        return (self._path @ steps)[:, self._order]


@dataclass(frozen=True)
class _Tree:
    """The order in which the frames of a Z-matrix are computed; rows 2 and up count from 0.

    Attributes:
        generations: Per generation the rows that get a frame (those with children) and the place of each one's parent in the
            generation before.
        parent_frame: ``[n − 2]`` place of every row's parent among all frames.
        sibling: ``[n − 2]`` row of the sibling that an improper row refers to, where ``has_sibling``.
        path: ``[n, n]``: 1 where the bond of the column's row is on the way from the first atom to the row's.
    """

    generations: list[tuple[Tensor, Tensor]]
    parent_frame: Tensor
    sibling: Tensor
    has_sibling: Tensor
    path: Tensor

    @classmethod
    def of(cls, zmatrix: ZMatrix) -> _Tree:
        rows = zmatrix.rows.tolist()
        n = len(rows)
        row_of = {row[0]: i for i, row in enumerate(rows)}
        parent = [-1] + [row_of[row[1]] for row in rows[1:]]
        _require_tree(rows, zmatrix.improper.tolist(), [parent[1] + 1, *parent[1:]])
        path = torch.zeros(n, n, dtype=torch.float64)
        depth = [0, 0]
        for i in range(1, n):
            path[i] = path[parent[i]]
            path[i, i] = 1
        for i in range(2, n):
            depth.append(depth[parent[i]] + 1)
        with_frame = [i for i in range(n) if i < 2 or i in parent]
        levels = [[i for i in with_frame if depth[i] == d] for d in range(max(depth[i] for i in with_frame) + 1)]
        place = {i: p for p, i in enumerate(i for level in levels for i in level)}
        generations = [(torch.tensor([i - 2 for i in level]), torch.tensor([above.index(parent[i]) for i in level]))
                       for above, level in zip(levels, levels[1:], strict=False)]  # fmt: skip
        sibling = [row_of[row[3]] - 2 if improper else 0 for row, improper in zip(rows[2:], zmatrix.improper[2:], strict=True)]
        return cls(generations=generations, parent_frame=torch.tensor([place[parent[i]] for i in range(2, n)]),
                   sibling=torch.tensor(sibling), has_sibling=torch.as_tensor(zmatrix.improper[2:]), path=path)  # fmt: skip


def _require_tree(rows: list[list[int]], improper: list[bool], parent: list[int]) -> None:
    """Raise unless every row refers to the parent, the grandparent and the great-grandparent or the first sibling."""
    atom = [row[0] for row in rows]
    for i in range(3, len(rows)):
        j = parent[i]
        k = parent[j]
        if improper[i]:
            siblings = [s for s in range(2, i) if parent[s] == j and not improper[s]]
            reference = atom[siblings[0]] if siblings else None
        else:
            reference = atom[2] if j == 0 else atom[parent[k]]
        if rows[i][1:] != [atom[j], atom[k], reference]:
            raise TopologyError(f"row {i} of the Z-matrix is {rows[i]}; expected [{atom[i]}, {atom[j]}, {atom[k]}, {reference}]: atom, parent, "
                                "grandparent, great-grandparent or first sibling; make the Z-matrix with build_zmatrix")  # fmt: skip


def _torsion(to_parent: Tensor, axis: Tensor, reference: Tensor) -> Tensor:
    """Dihedral angle in [−π, π) of l–k–j–atom, from j − atom, k − j and l − k (IUPAC sign)."""
    left, right = torch.linalg.cross(to_parent, axis), torch.linalg.cross(axis, reference)
    sine = axis.norm(dim=-1) * (to_parent * right).sum(-1)
    angle = torch.atan2(sine, (left * right).sum(-1))
    return torch.where(angle >= math.pi, -math.pi, angle)
