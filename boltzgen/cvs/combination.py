"""Linear combinations of variables and of their sines and cosines."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from boltzgen.cvs.variable import CollectiveVariable
from boltzgen.errors import ConfigError


class AngleFunction(CollectiveVariable):
    """A 2π-periodic function of an angle, without a unit.

    Args:
        of: The angle.
        name: What the user calls it; the function and the name of the angle by default.

    Raises:
        ConfigError: If ``of`` is not in rad, or has another period.
    """

    function: ClassVar[str]

    def __init__(self, of: CollectiveVariable, *, name: str | None = None) -> None:
        super().__init__(name or f"{self.function}({of.name})", of.atoms)
        if of.unit != "rad" or of.period not in (None, 2 * torch.pi):
            raise ConfigError(f"{self.name!r} needs an angle in rad, but {of.name!r} is in {of.unit} with period {of.period}")
        self.of = of

    def _value(self, x: Tensor) -> Tensor:
        return self._apply(self.of(x))

    @staticmethod
    @abstractmethod
    def _apply(angle: Tensor) -> Tensor:
        """The function ``[b]`` of the angles ``[b]`` in rad."""


class Cosine(AngleFunction):
    """Cosine of an angle."""

    function = "cos"

    @staticmethod
    def _apply(angle: Tensor) -> Tensor:
        return angle.cos()


class Sine(AngleFunction):
    """Sine of an angle."""

    function = "sin"

    @staticmethod
    def _apply(angle: Tensor) -> Tensor:
        return angle.sin()


class Combination(CollectiveVariable):
    """A linear combination of other variables, offset + Σ_k weight_k ξ_k(x).

    Args:
        name: What the user calls it.
        variables: Its terms ξ_k, none of them periodic: take sine and cosine of those.
        weights: ``[k]``, each per unit of its term.
        offset: What is added.
        unit: Its unit; that of the terms where they agree, else 1.

    Raises:
        ConfigError: If there is no term, the weights do not fit the terms, or a term is periodic.
    """

    def __init__(
        self, name: str, variables: Sequence[CollectiveVariable], weights: ArrayLike, *, offset: float = 0.0, unit: str | None = None
    ) -> None:
        self.variables, self.weights, self.offset = tuple(variables), np.array(weights, dtype=np.float64), float(offset)
        if not variables or self.weights.shape != (len(variables),) or not np.isfinite(self.weights).all():
            raise ConfigError(f"the combination {name!r} needs terms and a finite weight for each, got {len(variables)} terms and weights "
                              f"{self.weights.tolist()}")  # fmt: skip
        periodic = [variable.name for variable in variables if variable.period is not None]
        if periodic:
            raise ConfigError(f"the combination {name!r} would jump where {', '.join(periodic)} passes the end of its period; use sine and "
                              f"cosine of it")  # fmt: skip
        super().__init__(name, sorted(set(itertools.chain.from_iterable(variable.atoms for variable in variables))))
        units = {variable.unit for variable in variables}
        self.unit = unit if unit is not None else units.pop() if len(units) == 1 else "1"

    def _value(self, x: Tensor) -> Tensor:
        terms = torch.stack([variable(x) for variable in self.variables], dim=1)
        return terms @ torch.as_tensor(self.weights, dtype=x.dtype, device=x.device) + self.offset
