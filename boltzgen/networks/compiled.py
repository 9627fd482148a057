"""A velocity field whose forward pass and divergence run as compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from boltzgen.networks.field import ParticleField


class CompiledField(ParticleField):
    """Another field, compiled by ``torch.compile`` at first use: the same values to rounding, 1.6 to 2 times faster on a processor.

    Every new combination of shapes and gradients is compiled once, which takes about a minute; later calls of any batch size share it.

    Args:
        field: The field; its weights are shared.
    """

    def __init__(self, field: ParticleField) -> None:
        super().__init__()
        self.field = field
        self.n_particles, self.n_dimensions = field.n_particles, field.n_dimensions
        self._graphs: dict[str, Callable[..., Any]] = {}

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._graph("forward")(t, x)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._graph("divergence")(t, x)

    def _graph(self, name: str) -> Callable[..., Any]:
        if name not in self._graphs:
            self._graphs[name] = torch.compile(getattr(self.field, name), dynamic=True)
        return self._graphs[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": {}}  # a copy has weights of its own, and compiles for itself
