"""Internal coordinates: bonds, angles and torsions of a Z-matrix as a transform onto Cartesian coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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
        TopologyError: If a row refers to an atom that is not placed before it.

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
        self._generations = _Generations(zmatrix)
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
        x = _Placement.apply(lengths, angles, torsions, self._generations)
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
        inside = torch.isfinite(q)
        inside[:, : m + a] &= q[:, : m + a] > 0
        inside[:, m : m + a] &= q[:, m : m + a] < math.pi
        if not bool(inside.all()):
            row, column = (~inside).nonzero()[0].tolist()
            if column >= m + a:
                raise DomainError(f"the torsion in column {column} is {float(q[row, column])} in row {row}; expected a finite angle")
            kind, end = ("bond", 2) if column < m else ("angle", 3)
            atoms = self._rows[self.bond_rows[column] if column < m else self.angle_rows[column - m], :end].tolist()
            expected = "a positive length in nm" if kind == "bond" else "an angle inside (0, π)"
            raise DomainError(f"column {column} (the {kind} {'–'.join(map(str, atoms))}) is {float(q[row, column])} in row {row}; expected "
                              f"{expected}: bound the coordinates before this transform")  # fmt: skip
        return q

    def _log_det(self, bonds: Tensor, angles: Tensor) -> Tensor:
        return 2 * torch.log(bonds).sum(0) + torch.log(torch.sin(angles)).sum(0) + self._log_fixed + LOG_FRAME


class _Generations(nn.Module):
    """The order in which a Z-matrix is placed: rows whose references are all placed form the next generation.

    Attributes:
        refs: ``[3, n − 3]`` rows of the references j, k and l of rows 3 and up.
    """

    refs: Tensor
    _members: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        row_of = {int(atom): i for i, atom in enumerate(zmatrix.rows[:, 0])}
        refs = _references(zmatrix.rows.tolist(), row_of)
        depth = [0, 0, 0]
        for row in refs:
            depth.append(1 + max(depth[r] for r in row))
        members = [[i for i, d in enumerate(depth) if d == g] for g in range(1, max(depth) + 1)]
        self._sizes = [len(rows) for rows in members]
        self.register_buffer("refs", torch.tensor(refs, dtype=torch.int64).reshape(-1, 3).T.contiguous(), persistent=False)
        self.register_buffer("_members", torch.tensor([i - 3 for rows in members for i in rows], dtype=torch.int64), persistent=False)

    def __iter__(self) -> Iterator[Tensor]:
        """Columns of ``refs`` that are placed together, generation by generation."""
        return iter(self._members.split(self._sizes))


def _references(rows: list[list[int]], row_of: Mapping[int, int]) -> list[list[int]]:
    """Rows of the references of rows 3 and up.

    Raises:
        TopologyError: Unless the references of every row are different atoms that were placed before it.
    """
    found = []
    for i, (atom, *references) in enumerate(rows):
        placed = [row_of.get(r, i) for r in references[:i]]
        if len(set(placed)) < len(placed) or any(r >= i for r in placed):
            raise TopologyError(
                f"row {i} of the Z-matrix places atom {atom} by atoms {references}; expected different atoms of the rows before it; "
                "make the Z-matrix with build_zmatrix"
            )
        found.append(placed)
    if [row[1:3] for row in rows[1:3]] != [[rows[0][0], -1], [rows[1][0], rows[0][0]]]:
        raise TopologyError("the first three rows of the Z-matrix must be a bonded chain; make the Z-matrix with build_zmatrix")
    return found[3:]


class _Frames(NamedTuple):
    """Directions at every row i from 3 up, ``[3, m, b]``, from its references j, k and l.

    Attributes:
        axis: e₁, along k→j; ``length`` is |j − k|.
        cis: e₂, perpendicular to the axis towards l; ``distance`` is that of l from the axis, ``along`` its component on it.
        third: e₁ × e₂.
    """

    axis: Tensor
    length: Tensor
    cis: Tensor
    distance: Tensor
    along: Tensor
    third: Tensor


def _frames(j: Tensor, k: Tensor, far: Tensor) -> _Frames:
    axis = j - k
    length = _length(axis)
    axis = axis / length
    reference = far - k
    along = (reference * axis).sum(0)
    perpendicular = reference - along * axis
    distance = _length(perpendicular)
    cis = perpendicular / distance
    return _Frames(axis, length, cis, distance, along, torch.linalg.cross(axis, cis, dim=0))


class _Placement(torch.autograd.Function):
    """Positions ``[3, n, b]`` from the lengths of all rows ``[n, b]``, angles of rows 2 and up, torsions of rows 3 and up.

    Row i is placed at x_j + b d, d = −cos θ e₁ + sin θ u, u = cos τ e₂ + sin τ e₃ (:class:`_Frames`).

    Backward by virtual work, from the last generation to the first. With the total gradient g on atom i, v = −sin τ e₂ + cos τ e₃ and
    w = sin θ e₁ + cos θ u, the coordinates of the row get dL/db = d·g, dL/dθ = b w·g, dL/dτ = b sin θ v·g. What keeps them fixed
    when the references move passes g on to those: as dq = Σ_a s_a·dx_a = 0 (s_a: Wilson's vectors of θ and τ, Blondel & Karplus,
    J. Comput. Chem. 17, 1132 (1996), eq. 27), l gets −T, k gets Q + T and j gets g − Q, where T = dL/dτ · s_l, s_l = −e₃/distance,
    Q = dL/dθ · u/length + (b cos θ/length) (v·g) v − (along/length) T.
    """

    @staticmethod
    def forward(ctx: Any, lengths: Tensor, angles: Tensor, torsions: Tensor, generations: _Generations) -> Tensor:  # type: ignore[override]
        cos, sin, cos_t, sin_t = angles.cos(), angles.sin(), torsions.cos(), torsions.sin()
        x = lengths.new_zeros(3, *lengths.shape)
        x[0, 1] = lengths[1]
        x[0, 2], x[1, 2] = lengths[1] - lengths[2] * cos[0], lengths[2] * sin[0]
        for m in generations:
            j, k, far = (x[:, rows[m]] for rows in generations.refs)
            frames = _frames(j, k, far)
            u = cos_t[m] * frames.cis + sin_t[m] * frames.third
            x[:, m + 3] = j + lengths[m + 3] * (sin[m + 1] * u - cos[m + 1] * frames.axis)
        ctx.save_for_backward(x, lengths, cos, sin, cos_t, sin_t)
        ctx.generations = generations
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, lengths, cos, sin, cos_t, sin_t = ctx.saved_tensors
        j, k, far = ctx.generations.refs
        f = _frames(x[:, j], x[:, k], x[:, far])
        b, c, s = lengths[3:], cos[1:], sin[1:]
        u, v = cos_t * f.cis + sin_t * f.third, cos_t * f.third - sin_t * f.cis
        d, w = s * u - c * f.axis, s * f.axis + c * u
        by_angle, by_turn, by_reference = b / f.length * u, b * c / f.length * v, -b * s / f.distance * f.third
        total = gradient.clone()
        slopes = b.new_empty(3, *b.shape)
        for m in reversed(list(ctx.generations)):
            g = total[:, m + 3]
            radial, polar, turn = ((direction[:, m] * g).sum(0) for direction in (d, w, v))
            slopes[0, m], slopes[1, m], slopes[2, m] = radial, polar, turn
            reference = turn * by_reference[:, m]
            shared = polar * by_angle[:, m] + turn * by_turn[:, m] - f.along[m] / f.length[m] * reference
            total.index_add_(1, j[m], g - shared)
            total.index_add_(1, k[m], shared + reference)
            total.index_add_(1, far[m], -reference)
        third = total[:, 2]
        of_lengths = torch.stack([torch.zeros_like(third[0]), total[0, 1] + third[0], sin[0] * third[1] - cos[0] * third[0]])
        of_angle = lengths[2] * (sin[0] * third[0] + cos[0] * third[1])
        return torch.cat([of_lengths, slopes[0]]), torch.cat([of_angle[None], b * slopes[1]]), b * s * slopes[2], None


def _length(v: Tensor) -> Tensor:
    """Lengths of vectors along the first axis (several times faster there than ``norm``)."""
    return v.square().sum(0).sqrt()


def _torsion(to_parent: Tensor, axis: Tensor, normal: Tensor, reference: Tensor) -> Tensor:
    """Dihedral angle in [−π, π) of l–k–j–atom (IUPAC sign) from j − atom, k − j, their cross product and l − k, ``[3, m, b]``."""
    right = torch.linalg.cross(axis, reference, dim=0)
    angle = torch.atan2(_length(axis) * (to_parent * right).sum(0), (normal * right).sum(0))
    return torch.where(angle >= math.pi, angle - 2 * math.pi, angle)
