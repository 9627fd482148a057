"""Distances, angles and dihedral angles of atoms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from boltzgen.cvs.variable import CollectiveVariable
from boltzgen.errors import ConfigError

#: How far box vectors may be from OpenMM's reduced form, relative to the edge they are compared with.
_BOX_TOLERANCE = 1e-6


class Distance(CollectiveVariable):
    """Distance of two atoms, |x_b − x_a|, in nm.

    Args:
        name: What the user calls it.
        atoms: Two atoms.
        box: Box vectors ``[3, 3]`` in nm (rows, OpenMM's reduced form): the distance is then that of the nearest images.

    Raises:
        ConfigError: If there are not two different atoms, or the box is not in reduced form.
    """

    unit = "nm"

    def __init__(self, name: str, atoms: Sequence[int], *, box: ArrayLike | None = None) -> None:
        _require_number(self, name, atoms, 2)
        super().__init__(name, atoms)
        self.box = None if box is None else reduced_box(box)

    @classmethod
    def between_ends(cls, name: str, chain: Sequence[int], *, box: ArrayLike | None = None) -> Distance:
        """End-to-end distance: of the first and the last atom of a chain."""
        if len(chain) < 2:
            raise ConfigError(f"the end-to-end distance {name!r} needs at least two atoms, got {list(chain)}")
        return cls(name, (chain[0], chain[-1]), box=box)

    def _value(self, x: Tensor) -> Tensor:
        a, b = self._positions(x).unbind(1)
        return nearest_image(b - a, self.box).norm(dim=-1)


class Angle(CollectiveVariable):
    """Angle a–b–c at atom b, in [0, π].

    Raises:
        ConfigError: If there are not three different atoms.
    """

    unit = "rad"

    def __init__(self, name: str, atoms: Sequence[int]) -> None:
        _require_number(self, name, atoms, 3)
        super().__init__(name, atoms)

    def _value(self, x: Tensor) -> Tensor:
        a, b, c = self._positions(x).unbind(1)
        left, right = a - b, c - b
        return torch.atan2(torch.linalg.cross(left, right).norm(dim=-1), (left * right).sum(-1))


class Dihedral(CollectiveVariable):
    """Dihedral angle a–b–c–d in [−π, π), IUPAC sign: positive when d is turned clockwise from a, looking from b to c.

    Raises:
        ConfigError: If there are not four different atoms.
    """

    period = 2 * math.pi
    unit = "rad"

    def __init__(self, name: str, atoms: Sequence[int]) -> None:
        _require_number(self, name, atoms, 4)
        super().__init__(name, atoms)

    def _value(self, x: Tensor) -> Tensor:
        a, b, c, d = self._positions(x).unbind(1)
        first, axis, last = b - a, c - b, d - c
        left, right = torch.linalg.cross(first, axis), torch.linalg.cross(axis, last)
        angle = torch.atan2(axis.norm(dim=-1) * (first * right).sum(-1), (left * right).sum(-1))
        return torch.where(angle >= math.pi, angle - 2 * math.pi, angle)


def reduced_box(box: ArrayLike) -> Tensor:
    """Box vectors ``[3, 3]`` in nm, float64, checked to be in OpenMM's reduced form.

    Raises:
        ConfigError: If they are not: a along x, b in the xy plane, none leaning over by more than half an edge.
    """
    edges = torch.as_tensor(np.array(box, dtype=np.float64))
    if edges.shape == (3, 3):
        diagonal, slack = edges.diagonal(), _BOX_TOLERANCE * edges.abs().max()
        below = torch.stack([edges[1, 0], edges[2, 0], edges[2, 1]]).abs() <= 0.5 * diagonal[[0, 0, 1]] + slack
        if bool((diagonal > 0).all() and (edges.triu(1).abs() <= slack).all() and below.all()):
            return edges
    raise ConfigError(f"expected box vectors [3, 3] in nm in OpenMM's reduced form (a along x, b in the xy plane, none leaning over by "
                      f"more than half an edge), got {edges.tolist()}")  # fmt: skip


def nearest_image(difference: Tensor, box: Tensor | None) -> Tensor:
    """Differences ``[..., 3]`` in nm, moved by box vectors to the nearest image by OpenMM's rule: whole c, then b, then a.

    Exact for a rectangular box; in a leaning one for all differences shorter than half its smallest width.
    """
    if box is None:
        return difference
    for row in (2, 1, 0):
        vector = box[row].to(difference)
        difference = difference - torch.floor(difference[..., row : row + 1] / vector[row] + 0.5) * vector
    return difference


def _require_number(variable: CollectiveVariable, name: str, atoms: Sequence[int], n: int) -> None:
    if len(atoms) != n:
        raise ConfigError(f"the {type(variable).__name__.lower()} {name!r} takes {n} atoms, got {list(atoms)}")
