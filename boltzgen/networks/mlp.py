"""Multilayer perceptrons that start as the zero function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """A multilayer perceptron with SiLU activations whose output is zero at initialisation.

    A coupling layer conditioned by it starts as the identity. With no input it is a learnable constant.

    Args:
        n_in: Number of inputs; may be 0.
        n_out: Number of outputs.
        hidden: Widths of the hidden layers.
        generator: Source of the initial weights.
    """

    def __init__(self, n_in: int, n_out: int, *, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        widths = [n_in, *hidden] if n_in else [0]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], n_out) if n_in else None
        self.constant = None if n_in else nn.Parameter(torch.zeros(n_out))
        for layer in self.hidden:
            bound = (3.0 / layer.in_features) ** 0.5  # type: ignore[operator]
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        if self.out is not None:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs ``[b, n_out]`` for inputs ``[b, n_in]``."""
        if self.out is None:
            return self.constant.expand(len(inputs), -1)  # type: ignore[union-attr]
        for layer in self.hidden:
            inputs = nn.functional.silu(layer(inputs))
        return self.out(inputs)

    def along(self, inputs: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[b, n_out]``, and their derivatives ``[b, k, n_out]`` along k directions ``[b, k, n_in]`` of the inputs."""
        if self.out is None:
            return self(inputs), tangents.new_zeros(*tangents.shape[:2], len(self.constant))  # type: ignore[arg-type]
        for layer in self.hidden:
            before = layer(inputs)
            gate = torch.sigmoid(before)
            slope = gate * (1 + before * (1 - gate))
            inputs, tangents = before * gate, nn.functional.linear(tangents, layer.weight) * slope[:, None]  # type: ignore[arg-type]
        return self.out(inputs), nn.functional.linear(tangents, self.out.weight)
