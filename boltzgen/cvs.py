"""Collective variables: differentiable functions of the coordinates that a user reads, histograms or steers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from boltzgen.errors import ConfigError, ShapeError

CVKind = Literal["distance", "angle", "dihedral"]


class CollectiveVariable(ABC):
    """A scalar function of a configuration.

    Args:
        name: What the user calls it.
        atoms: The atoms it is made of, in order.

    Attributes:
        n_atoms: How many atoms it takes.
        period: Period in its unit, None where it has none.
        unit: Its unit.

    Raises:
        ConfigError: If the number of atoms is wrong, an index is negative or an atom occurs twice.
    """

    n_atoms: ClassVar[int]
    period: ClassVar[float | None] = None
    unit: ClassVar[str]

    def __init__(self, name: str, atoms: Sequence[int]) -> None:
        kind = type(self).__name__.lower()
        if len(atoms) != self.n_atoms:
            raise ConfigError(f"the {kind} {name!r} takes {self.n_atoms} atoms, got {list(atoms)}")
        if len(set(atoms)) != len(atoms) or min(atoms) < 0:
            raise ConfigError(f"the {kind} {name!r} needs different atoms counted from 0, got {list(atoms)}")
        self.name = name
        self.atoms = tuple(int(atom) for atom in atoms)

    def __call__(self, x: Tensor) -> Tensor:
        """Values of the variable.

        Args:
            x: Configurations ``[b, n, 3]`` in nm.

        Returns:
            ``[b]`` in ``unit``, in the precision of ``x``.

        Raises:
            ShapeError: If ``x`` has another shape or too few atoms.
        """
        if x.ndim != 3 or x.shape[2] != 3 or x.shape[1] <= max(self.atoms):
            raise ShapeError(
                f"{self.name!r} is made of atoms {list(self.atoms)} of configurations [b, n, 3]; got coordinates {list(x.shape)}"
            )
        return self._value(*(x[:, atom] for atom in self.atoms))

    @abstractmethod
    def _value(self, *positions: Tensor) -> Tensor:
        """The variable ``[b]`` from the positions ``[b, 3]`` of its atoms."""


class Distance(CollectiveVariable):
    """Distance of two atoms in nm, |x_b − x_a|."""

    n_atoms = 2
    unit = "nm"

    def _value(self, *positions: Tensor) -> Tensor:
        a, b = positions
        return (b - a).norm(dim=-1)


class Angle(CollectiveVariable):
    """Angle a–b–c at atom b, in [0, π]."""

    n_atoms = 3
    unit = "rad"

    def _value(self, *positions: Tensor) -> Tensor:
        a, b, c = positions
        left, right = a - b, c - b
        return torch.atan2(torch.linalg.cross(left, right).norm(dim=-1), (left * right).sum(-1))


class Dihedral(CollectiveVariable):
    """Dihedral angle a–b–c–d in [−π, π), IUPAC sign: positive when d is turned clockwise from a, looking from b to c."""

    n_atoms = 4
    period = 2 * math.pi
    unit = "rad"

    def _value(self, *positions: Tensor) -> Tensor:
        a, b, c, d = positions
        first, axis, last = b - a, c - b, d - c
        left, right = torch.linalg.cross(first, axis), torch.linalg.cross(axis, last)
        angle = torch.atan2(axis.norm(dim=-1) * (first * right).sum(-1), (left * right).sum(-1))
        return torch.where(angle >= math.pi, angle - 2 * math.pi, angle)


_KINDS: dict[str, type[CollectiveVariable]] = {"distance": Distance, "angle": Angle, "dihedral": Dihedral}


def build_cv(name: str, kind: CVKind, atoms: Sequence[int]) -> CollectiveVariable:
    """Collective variable of a configuration file.

    Args:
        name: What the user calls it.
        kind: ``distance``, ``angle`` or ``dihedral``.
        atoms: Atoms it is made of, counted from 0.

    Returns:
        The variable.

    Raises:
        ConfigError: If the kind is unknown or the atoms do not fit it.
    """
    if kind not in _KINDS:
        raise ConfigError(f"unknown kind {kind!r} of the collective variable {name!r}; expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](name, atoms)
