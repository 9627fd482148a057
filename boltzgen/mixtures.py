"""Flat densities within limits, and mixtures of densities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.core import Context, Distribution, summed_log_det_error
from boltzgen.errors import InputError, ShapeError


class Flat(Distribution):
    """Uniform values between limits.

    Args:
        low: ``[k]``.
        high: ``[k]``, above ``low``.

    Raises:
        InputError: If a limit is not above the other.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Sequence[float] | Tensor, high: Sequence[float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float64).clone())
        self.register_buffer("high", torch.as_tensor(high, dtype=torch.float64).clone())
        if self.low.shape != self.high.shape or not bool((self.high > self.low).all()):
            raise InputError(f"expected lower limits below upper ones, got {self.low.tolist()} and {self.high.tolist()}")
        self.event_shape = tuple(self.low.shape)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        share = torch.rand(n, *self.event_shape, generator=generator, dtype=torch.float64)
        x = self.low + (self.high - self.low) * share
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).all(dim=1)
        return torch.where(inside, -(self.high - self.low).log().sum(), -torch.inf)


class Mixture(Distribution):
    """Σ_c w_c ρ_c(x): for instance a learned density and a broad one beside it, so that no value is out of reach.

    Args:
        parts: Distributions over the same values.
        weights: Positive weights; they are normalised.

    Raises:
        InputError: If there are no parts, or the weights are not one positive number for each.
        ShapeError: If the parts are over different values.

    References:
        Hesterberg, Technometrics 37, 185 (1995) (defensive mixtures).
    """

    weights: Tensor

    def __init__(self, parts: Sequence[Distribution], weights: Sequence[float]) -> None:
        super().__init__()
        if not parts or len(parts) != len(weights) or min(weights) <= 0:
            raise InputError(f"expected one positive weight for each of {len(parts)} densities, got {list(weights)}")
        if len({tuple(part.event_shape) for part in parts}) != 1:
            raise ShapeError(f"expected densities over the same values, got {[list(part.event_shape) for part in parts]}")
        self.parts = nn.ModuleList(parts)
        given = torch.tensor([float(w) for w in weights], dtype=torch.float64)
        self.register_buffer("weights", given / given.sum())
        self.event_shape = tuple(parts[0].event_shape)

    @property
    def log_det_error(self) -> float | None:
        """Sum of the errors of the parts."""
        return summed_log_det_error(*(part.log_det_error for part in self.parts))  # type: ignore[arg-type]

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        part_of = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x = torch.empty(n, *self.event_shape, dtype=torch.float64)
        for number, part in enumerate(self.parts):
            mine = part_of == number
            if bool(mine.any()):
                x[mine] = part.sample(int(mine.sum()), generator=generator)[0].to(torch.float64)  # type: ignore[operator]
        return x, self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        logs = torch.stack([part.log_prob(x, context) for part in self.parts])  # type: ignore[operator]
        return torch.logsumexp(logs + self.weights.log()[:, None], dim=0)
