"""Views of another target: tempered, regularised for training, or restricted to a region."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import InputError, ShapeError


class Tempered(Target):
    """A target raised to a power, u'(x) = factor · u(x).

    For targets without a temperature; where there is one, use :meth:`Target.at`, which also knows temperature-dependent terms.

    Args:
        target: The original.
        factor: T / T' > 0; below 1 is hotter.
    """

    def __init__(self, target: Target, *, factor: float) -> None:
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(f"expected a finite factor > 0, got {factor}")
        self.target, self.factor = target, factor
        self.event_shape, self.labels, self.box, self.is_exact = target.event_shape, target.labels, target.box, target.is_exact
        self.log_z = target.log_z if factor == 1 else None

    def reduced_potential(self, x: Tensor) -> Tensor:
        return self.factor * self.target.reduced_potential(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self.target.value_and_grad(x)
        return self.factor * u, self.factor * gradient

    def at(self, temperature_kelvin: float) -> Tempered:
        return Tempered(self.target.at(temperature_kelvin), factor=self.factor)


class Regularised(Target):
    """A target with high energies flattened, for training only: linear up to ``u_cut``, logarithmic above, constant from ``u_max``.

    u' = u for u ≤ u_cut, else min(u_cut + L ln(1 + (u − u_cut)/L), u_max); +inf becomes u_max. The gradient is that of u', so it fades as
    1 / (1 + (u − u_cut)/L) and vanishes at the cap. ``is_exact`` is False: no estimate may rest on these energies.

    A small L invites a flow to leave: where u' hardly rises, the entropy of unbound atoms (7 kT per factor ten and atom) wins.

    Args:
        target: The original.
        u_cut: Energy in kT above which the logarithm begins.
        u_max: Largest value of u' in kT.
        scale: L in kT.

    References:
        Noé et al., Science 365, eaaw1147 (2019), supplement (regularised energy).
    """

    is_exact = False

    def __init__(self, target: Target, *, u_cut: float, u_max: float, scale: float = 1.0) -> None:
        if not (math.isfinite(u_cut) and math.isfinite(u_max) and u_cut < u_max):
            raise InputError(f"expected finite u_cut < u_max, got u_cut = {u_cut} and u_max = {u_max} kT")
        if not scale > 0:
            raise InputError(f"expected a positive scale, got {scale} kT")
        self.target, self.u_cut, self.u_max, self.scale = target, u_cut, u_max, scale
        self.event_shape, self.labels, self.box = target.event_shape, target.labels, target.box

    def reduced_potential(self, x: Tensor) -> Tensor:
        return self._flattened(self.target.reduced_potential(x))

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self.target.value_and_grad(x)
        flattened = self._flattened(u)
        slope = torch.where(u > self.u_cut, 1.0 / (1.0 + self._excess(u) / self.scale), 1.0) * (flattened < self.u_max)
        slope = slope.reshape(-1, *[1] * (gradient.ndim - 1))
        return flattened, torch.where(slope > 0, slope * gradient, 0.0)

    def at(self, temperature_kelvin: float) -> Regularised:
        return Regularised(self.target.at(temperature_kelvin), u_cut=self.u_cut, u_max=self.u_max, scale=self.scale)

    def _excess(self, u: Tensor) -> Tensor:
        return (u - self.u_cut).clamp(min=0.0)

    def _flattened(self, u: Tensor) -> Tensor:
        return torch.where(u > self.u_cut, self.u_cut + self.scale * torch.log1p(self._excess(u) / self.scale), u).clamp(max=self.u_max)


class Counted(Target):
    """A target that counts the energies and gradients that were asked of it.

    Args:
        target: The original.

    Attributes:
        n_evaluations: Rows so far.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.n_evaluations = target, 0
        self.event_shape, self.labels, self.box, self.is_exact = target.event_shape, target.labels, target.box, target.is_exact
        self.log_z = target.log_z

    def reduced_potential(self, x: Tensor) -> Tensor:
        self.n_evaluations += len(x)
        return self.target.reduced_potential(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.n_evaluations += len(x)
        return self.target.value_and_grad(x)

    def at(self, temperature_kelvin: float) -> Counted:
        return Counted(self.target.at(temperature_kelvin))


class Restricted(Target):
    """A target inside a region: u unchanged where the indicator holds, +inf (weight zero, gradient zero) elsewhere.

    ln Z is then that of the region: ln Z + ln P(region). Energies are evaluated inside only.

    Args:
        target: The original.
        indicator: Takes ``x [b, *event]`` and returns bool ``[b]``.
    """

    def __init__(self, target: Target, indicator: Callable[[Tensor], Tensor]) -> None:
        self.target, self.indicator = target, indicator
        self.event_shape, self.labels, self.box, self.is_exact = target.event_shape, target.labels, target.box, target.is_exact

    def reduced_potential(self, x: Tensor) -> Tensor:
        inside = self._inside(x)
        u = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        if not inside.any():
            return u
        values = self.target.reduced_potential(x[inside])
        return u.to(values.device).masked_scatter(inside.to(values.device), values)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = self._inside(x)
        u, gradient = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device), torch.zeros_like(x)
        if inside.any():
            values, gradients = self.target.value_and_grad(x[inside])
            u[inside], gradient[inside] = values.to(u), gradients.to(gradient)
        return u, gradient

    def at(self, temperature_kelvin: float) -> Restricted:
        return Restricted(self.target.at(temperature_kelvin), self.indicator)

    def _inside(self, x: Tensor) -> Tensor:
        inside = self.indicator(x)
        if inside.dtype != torch.bool or inside.shape != (len(x),):
            raise ShapeError(f"expected the indicator to return bool [{len(x)}], got {inside.dtype} {list(inside.shape)}")
        return inside
