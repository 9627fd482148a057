"""What every collective variable is, and a vector of them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from boltzgen.errors import ConfigError, ShapeError


class CollectiveVariable(ABC):
    """A scalar function of a configuration.

    Args:
        name: What the user calls it.
        atoms: The atoms it is made of, in order.

    Attributes:
        period: Period in its unit, None where it has none.
        unit: Its unit: nm, rad, or 1 where it has none.

    Raises:
        ConfigError: If there are no atoms, an index is negative or an atom occurs twice.
    """

    period: float | None = None
    unit: str = "1"

    def __init__(self, name: str, atoms: Sequence[int]) -> None:
        if not atoms or len(set(atoms)) != len(atoms) or min(atoms) < 0:
            raise ConfigError(f"the {_kind(self)} {name!r} needs different atoms counted from 0, got {list(atoms)}")
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
                f"{self.name!r} is made of atoms {_listed(self.atoms)} of configurations [b, n, 3]; got coordinates {list(x.shape)}"
            )
        return self._value(x)

    @abstractmethod
    def _value(self, x: Tensor) -> Tensor:
        """The variable ``[b]`` at configurations ``[b, n, 3]`` that have all its atoms."""

    def _positions(self, x: Tensor) -> Tensor:
        """Positions ``[b, m, 3]`` of its atoms."""
        return x[:, list(self.atoms)]


class CollectiveVariables(Sequence[CollectiveVariable]):
    """A vector of collective variables, periodic or not.

    Args:
        variables: Its components.

    Attributes:
        names: Their names, all different.
        units: Their units.
        periods: Their periods, None where there is none.

    Raises:
        ConfigError: If two have the same name.

    Example:
        >>> from boltzgen.cvs import Dihedral, Distance
        >>> cvs = CollectiveVariables([Dihedral("phi", (4, 6, 8, 14)), Distance("ends", (0, 21))])
        >>> cvs.units, cvs(torch.randn(5, 22, 3)).shape
        (('rad', 'nm'), torch.Size([5, 2]))
    """

    def __init__(self, variables: Iterable[CollectiveVariable]) -> None:
        self._variables = tuple(variables)
        self.names = tuple(variable.name for variable in self._variables)
        self.units = tuple(variable.unit for variable in self._variables)
        self.periods = tuple(variable.period for variable in self._variables)
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"every collective variable needs a name of its own, got {', '.join(self.names)}")

    @overload
    def __getitem__(self, index: int) -> CollectiveVariable: ...
    @overload
    def __getitem__(self, index: slice) -> CollectiveVariables: ...
    def __getitem__(self, index: int | slice) -> CollectiveVariable | CollectiveVariables:
        return CollectiveVariables(self._variables[index]) if isinstance(index, slice) else self._variables[index]

    def __len__(self) -> int:
        return len(self._variables)

    def __call__(self, x: Tensor) -> Tensor:
        """Values of all components.

        Args:
            x: Configurations ``[b, n, 3]`` in nm.

        Returns:
            ``[b, k]``, every column in its own unit, in the precision of ``x``.

        Raises:
            ShapeError: If ``x`` has another shape or too few atoms.
        """
        return torch.stack([variable(x) for variable in self._variables], dim=1) if self._variables else x.new_zeros(len(x), 0)

    @property
    def atoms(self) -> tuple[int, ...]:
        """Every atom that takes part, ascending."""
        return tuple(sorted(set(itertools.chain.from_iterable(variable.atoms for variable in self._variables))))


def _kind(variable: CollectiveVariable) -> str:
    return type(variable).__name__.lower()


def _listed(atoms: Sequence[int]) -> str:
    """The atoms, or the first and the last of many."""
    return str(list(atoms)) if len(atoms) <= 12 else f"[{', '.join(map(str, atoms[:4]))}, ..., {max(atoms)} at most]"
