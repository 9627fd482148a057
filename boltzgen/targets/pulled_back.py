"""A target seen in the latent coordinates of a fixed transform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.core import Target, Transform


class PulledBack(Target):
    """The density of y when x = T(y) follows a target: u_T(y) = u(T(y)) − ln|dT/dy|.

    A flow with a fixed last transform is trained in the coordinates before it, so that the fixed part is passed once per step.

    Args:
        target: Target of x.
        transform: T, without trainable parameters.
        event_shape: Shape of y.
    """

    def __init__(self, target: Target, transform: Transform, *, event_shape: tuple[int, ...]) -> None:
        self.target, self.transform, self.event_shape = target, transform, event_shape
        self.log_z = target.log_z
        self.is_exact = target.is_exact

    def reduced_potential(self, x: Tensor) -> Tensor:
        physical, log_det = self.transform(x)
        return self.target.reduced_potential(physical) - log_det

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            physical, log_det = self.transform(leaf)
            u, physical_gradient = self.target.value_and_grad(physical.detach())
            (gradient,) = torch.autograd.grad((physical * physical_gradient).sum() - log_det.sum(), leaf)
        return u - log_det.detach(), gradient

    def reduced_potentials(self, x: Tensor, states: Sequence[float]) -> Tensor:
        """u(T(x)) in every state − ln|dT/dx|, ``[K, b]``; the Jacobian does not depend on temperature."""
        physical, log_det = self.transform(x)
        return self.target.reduced_potentials(physical, states) - log_det

    def at(self, temperature_kelvin: float) -> PulledBack:
        return PulledBack(self.target.at(temperature_kelvin), self.transform, event_shape=self.event_shape)
