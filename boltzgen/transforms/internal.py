"""Internal coordinates: bonds, angles and torsions of a Z-matrix as a transform onto Cartesian coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from boltzgen.core import Context, Transform
from boltzgen.errors import DomainError, ShapeError, TopologyError
from boltzgen.transforms.zmatrix import ZMatrix

#: ln of the volume of the rotation group, 8π² (Haar measure as dα sin β dβ dγ over Euler angles).
LOG_FRAME = math.log(8 * math.pi**2)


class InternalCoordinates(Transform):
    r"""Map from internal coordinates q to Cartesian coordinates x, per unit volume of the removed translation.

    With x = (translation, rotation, q), integrated over all rotations,

        log_det = ln(b₁² b₂² sin θ₁) + Σ_{i≥4} ln(b_i² sin θ_i) + ln 8π²

    The first term and the last belong to the frame of the first three atoms; docs/internal_coordinates.md derives them.
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

    References:
        Gō & Scheraga, Macromolecules 9, 535 (1976).
    """

    bond_columns: Tensor
    angle_columns: Tensor
    torsion_columns: Tensor
    bond_rows: Tensor
    angle_rows: Tensor
    torsion_rows: Tensor
    _rows: Tensor
    _order: Tensor
    _fixed: Tensor
    _log_fixed: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        n = zmatrix.n_atoms
        self.zmatrix = zmatrix
        fixed = torch.as_tensor(zmatrix.fixed_bond, dtype=torch.float64)
        free = torch.arange(1, n)[torch.isnan(fixed[1:])]
        m = len(free)
        self.n_internal = m + (n - 2) + (n - 3)
        self._tree = _Tree(zmatrix)
        buffers = {
            "bond_rows": free, "angle_rows": torch.arange(2, n), "torsion_rows": torch.arange(3, n),
            "bond_columns": torch.arange(m), "angle_columns": torch.arange(m, m + n - 2),
            "torsion_columns": torch.arange(m + n - 2, self.n_internal),
            "_rows": torch.as_tensor(zmatrix.rows), "_order": torch.argsort(torch.as_tensor(zmatrix.rows[:, 0])),
            "_fixed": torch.nan_to_num(fixed).unsqueeze(1), "_log_fixed": 2 * torch.log(fixed[~torch.isnan(fixed)]).sum(),
        }  # fmt: skip
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

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
        q = self._checked(z).T.contiguous()
        bonds, angles, torsions = q.split([len(self.bond_rows), len(self.angle_rows), len(self.torsion_rows)])
        lengths = self._fixed.expand(-1, len(z)).index_copy(0, self.bond_rows, bonds)
        x = _Placement.apply(lengths, angles, self._tree.about_axis(torsions), self._tree)
        return x.permute(2, 1, 0)[:, self._order], self._log_det(bonds, angles)

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
        r = x.to(torch.float64).permute(2, 1, 0).contiguous()
        to_parent = r[:, self._rows[1:, 1]] - r[:, self._rows[1:, 0]]
        axis = r[:, self._rows[2:, 2]] - r[:, self._rows[2:, 1]]
        reference = r[:, self._rows[3:, 3]] - r[:, self._rows[3:, 2]]
        normal = torch.linalg.cross(to_parent[:, 1:], axis, dim=0)
        bonds = _length(to_parent[:, self.bond_rows - 1])
        angles = torch.atan2(_length(normal), (to_parent[:, 1:] * axis).sum(0).neg())
        torsions = _torsion(to_parent[:, 2:], axis[:, 1:], normal[:, 1:], reference)
        return torch.cat([bonds, angles, torsions]).T, -self._log_det(bonds, angles)

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

    def _log_det(self, bonds: Tensor, angles: Tensor) -> Tensor:
        return 2 * torch.log(bonds).sum(0) + torch.log(torch.sin(angles)).sum(0) + self._log_fixed + LOG_FRAME


class _Tree(nn.Module):
    """The order in which a Z-matrix is placed; index tensors over rows 2 and up count from 0.

    Attributes:
        parent: ``[n − 2]`` row of every row's parent; ``frame`` its place among all frames.
        sibling: ``[n − 2]`` row of the sibling that an improper row refers to; ``improper`` ``[n − 2, 1]`` says which rows do.
        path: ``[n, n]``: 1 where the bond of the column's row lies on the way from the first atom to the row's.
        root: ``[3, 3, 2, 1]`` frames (vector, component) of the first two rows.
    """

    parent: Tensor
    frame: Tensor
    sibling: Tensor
    improper: Tensor
    path: Tensor
    root: Tensor
    _children: Tensor
    _above: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        rows = zmatrix.rows.tolist()
        n = len(rows)
        row_of = {row[0]: i for i, row in enumerate(rows)}
        parent = [1] + [row_of[row[1]] for row in rows[1:]]
        _require_tree(rows, zmatrix.improper.tolist(), parent)
        path, depth = torch.eye(n, dtype=torch.float64), [0] * n
        for i in range(1, n):
            path[i] += path[parent[i]]
            depth[i] = depth[parent[i]] + 1 if i > 1 else 0
        with_frame = [i for i in range(n) if i < 2 or i in parent]
        levels = [[i for i in with_frame if depth[i] == d] for d in range(max(depth[i] for i in with_frame) + 1)]
        place = {i: p for p, i in enumerate(i for level in levels for i in level)}
        self._sizes = [len(level) for level in levels[1:]]
        buffers = {
            "parent": parent[2:], "frame": [place[j] for j in parent[2:]],
            "sibling": [row_of[row[3]] - 2 if flag else 0 for row, flag in zip(rows[2:], zmatrix.improper[2:], strict=True)],
            "_children": [i - 2 for level in levels[1:] for i in level],
            "_above": [above.index(parent[i]) for above, level in pairwise(levels) for i in level],
        }  # fmt: skip
        for name, indices in buffers.items():
            self.register_buffer(name, torch.tensor(indices, dtype=torch.int64), persistent=False)
        self.register_buffer("improper", torch.as_tensor(zmatrix.improper[2:, None]), persistent=False)
        self.register_buffer("path", path, persistent=False)
        frames = torch.stack([torch.diag(torch.tensor([-1.0, 1.0, -1.0])), torch.eye(3)], dim=-1).to(torch.float64)
        self.register_buffer("root", frames.unsqueeze(-1), persistent=False)

    @property
    def generations(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per generation, the rows that get a frame and the place of each one's parent in the generation before."""
        return zip(self._children.split(self._sizes), self._above.split(self._sizes), strict=True)

    def about_axis(self, torsions: Tensor) -> Tensor:
        """Torsions of rows 2 and up about j–k from the proper reference: an improper one adds to that of its sibling."""
        padded = nn.functional.pad(torsions, (0, 0, 1, 0))
        return padded + padded[self.sibling] * self.improper


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
            expected = [atom[i], atom[j], atom[k], reference]
            raise TopologyError(f"row {i} of the Z-matrix is {rows[i]}; expected {expected}: atom, parent, grandparent, "
                                "great-grandparent or first sibling; make the Z-matrix with build_zmatrix")  # fmt: skip


class _Placement(torch.autograd.Function):
    """Positions ``[3, n, b]`` from the lengths of all rows ``[n, b]``, angles and torsions about j–k of rows 2 and up ``[n − 2, b]``.

    Every bond k→j carries a frame: e₁ along it, e₂ towards the reference atom of torsion 0, e₃ = e₁ × e₂. A child i of j has
    u = cos τ e₂ + sin τ e₃ and the bond direction d = −cos θ e₁ + sin θ u; its own frame is (d, −sin θ e₁ − cos θ u,
    −sin τ e₂ + cos τ e₃). Frames are computed one generation at a time, positions as sums of bonds along the tree.

    Backward by virtual work: with the force F and the torque T about j that the gradient exerts on everything beyond
    the bond j–i, dL/db = d·F, dL/dτ = e₁·T and dL/dθ = w·T, w = sin τ e₂ − cos τ e₃.
    """

    @staticmethod
    def forward(ctx: Any, lengths: Tensor, angles: Tensor, torsions: Tensor, tree: _Tree) -> Tensor:  # type: ignore[override]
        cos, sin, cos_t, sin_t = angles.cos(), angles.sin(), torsions.cos(), torsions.sin()
        generation = tree.root.expand(-1, -1, -1, lengths.shape[1])
        frames = [generation]
        for children, parents in tree.generations:
            e1, e2, e3 = generation[:, :, parents]
            u = cos_t[children] * e2 + sin_t[children] * e3
            c, s = cos[children], sin[children]
            generation = torch.stack([s * u - c * e1, -s * e1 - c * u, cos_t[children] * e3 - sin_t[children] * e2])
            frames.append(generation)
        e1, e2, e3 = torch.cat(frames, dim=2)[:, :, tree.frame]
        directions = sin * (cos_t * e2 + sin_t * e3) - cos * e1
        along_x = tree.root[0, :, 1:].expand(-1, 2, lengths.shape[1])
        directions = torch.cat([along_x, directions], dim=1)
        x = tree.path @ (directions * lengths)
        ctx.save_for_backward(x, directions, e1, sin_t * e2 - cos_t * e3)
        ctx.tree = tree
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, directions, axis, normal = ctx.saved_tensors
        beyond = ctx.tree.path.T
        force = beyond @ gradient
        torque = (beyond @ torch.linalg.cross(x, gradient, dim=0))[:, 2:]
        torque = torque - torch.linalg.cross(x[:, ctx.tree.parent], force[:, 2:], dim=0)
        return (directions * force).sum(0), (normal * torque).sum(0), (axis * torque).sum(0), None


def _length(v: Tensor) -> Tensor:
    """Lengths of vectors along the first axis (several times faster there than ``norm``)."""
    return v.square().sum(0).sqrt()


def _torsion(to_parent: Tensor, axis: Tensor, normal: Tensor, reference: Tensor) -> Tensor:
    """Dihedral angle in [−π, π) of l–k–j–atom (IUPAC sign) from j − atom, k − j, their cross product and l − k, ``[3, m, b]``."""
    right = torch.linalg.cross(axis, reference, dim=0)
    angle = torch.atan2(_length(axis) * (to_parent * right).sum(0), (normal * right).sum(0))
    return torch.where(angle >= math.pi, angle - 2 * math.pi, angle)
