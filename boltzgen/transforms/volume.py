"""How a solve along a velocity field finds by how much it changes volume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from boltzgen.networks.field import VelocityField, along_directions
from boltzgen.transforms.matrices import log_determinants

#: Of field, time, positions and what is carried along: the velocity, and the rate of what is carried.
Moving = Callable[[VelocityField, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class VolumeChange(ABC):
    """What is integrated beside the positions for the log determinant of a step.

    Attributes:
        is_exact: False where it is only estimated; such a density is refused wherever weights are made.
        of_steps: Whether it is the log determinant of the steps as they are, not of the flow that they follow. Then the inverse undoes
            the steps, where it otherwise follows the flow backwards.
    """

    is_exact: bool = True
    of_steps: bool = False

    @abstractmethod
    def begin(self, x: Tensor) -> Moving:
        """At the start of a solve from ``x``: what moves positions and what is carried."""

    def nothing(self, x: Tensor) -> Tensor:
        """What is carried at the start of a step from ``x``."""
        return torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def total(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Log determinants of the step and their signs, each ``[b]``, from what was carried to its end."""
        return carried, torch.ones_like(carried)


class Unmeasured(VolumeChange):
    """None: positions alone are asked for."""

    is_exact = False

    def begin(self, x: Tensor) -> Moving:
        return lambda field, t, y, carried: (field(t, y), torch.zeros_like(carried))


class IntegratedDivergence(VolumeChange):
    """∫ ∇·v dt by the same scheme as the positions: right to the error of the solver."""

    def begin(self, x: Tensor) -> Moving:
        return lambda field, t, y, carried: field.divergence(t, y)


class Hutchinson(VolumeChange):
    """∫ ν·(∂v/∂x ν) dt with random signs ν, fresh in every solve and the same throughout it: unbiased for ln q, not for q.

    Its exponential has another mean than the density, so that weights made of it are biased: for training only.

    Args:
        generator: Source of the signs.

    References:
        Grathwohl et al., FFJORD, ICLR 2019, eq. 8.
    """

    is_exact = False

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def begin(self, x: Tensor) -> Moving:
        signs = (torch.randint(0, 2, x.shape, generator=self.generator) * 2 - 1).to(x.device)

        def estimate(field: VelocityField, t: Tensor, y: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
            v, tangent = along_directions(lambda moved: field(t, moved), (y,), (signs.to(y.dtype),))
            return v, (tangent * signs).flatten(1).sum(1)

        return estimate


class StepJacobian(VolumeChange):
    """ln |det ∂x_{k+1}/∂x_k| of every Runge–Kutta step x_k → x_{k+1}: the density of what the steps make, whatever they should follow.

    The scheme applied to ẋ = v and Ṁ = M ∂v/∂x, M = 1, gives x_{k+1} and M = ∂x_{k+1}/∂x_k together: a stage is x + h Σ a v, its
    derivative 1 + h Σ a M ∂v/∂x, which is what the scheme does to M. Composed of such steps the map T has no error of discretisation,
    with any number of them.

    **Where T is not one to one.** Steps short beside 1/|∂v/∂x| are, longer ones may fold space: det ∂T/∂z is negative in the fold, and T
    arrives more than once at what lies behind it. 1/|det| is then not the density of T(z), but averages are still exact if weights keep
    the sign of the determinant. Where velocities are bounded, as those of the default field are, T is proper and h → 0 turns it
    continuously into the identity, so that its degree is one: the signs over all z that lead to an x sum to one. Hence, for p the
    density of z, and any f

        ∫ f(x) e^{−u(x)} dx = ∫ f(T(z)) e^{−u(T(z))} det ∂T/∂z dz = E_p[f(T(z)) e^{−u(T(z))} (det ∂T/∂z) / p(z)].

    :meth:`~boltzgen.transforms.continuous.ContinuousTransform.signed` gives the sign; whoever asks for a density instead is refused at
    folded rows.

    References:
        Hairer, Lubich & Wanner, Geometric Numerical Integration, 2nd ed., lemma VI.4.1 (Runge–Kutta and the variational equation);
        Fonseca & Gangbo, Degree Theory in Analysis and Applications, Oxford 1995, ch. 1 and 5 (degree, change of variables).
    """

    of_steps = True

    def begin(self, x: Tensor) -> Moving:
        def move(field: VelocityField, t: Tensor, y: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
            v, jacobian = field.jacobian(t, y)
            return v, carried @ jacobian

        return move

    def nothing(self, x: Tensor) -> Tensor:
        size = x[0].numel()
        return torch.eye(size, dtype=x.dtype, device=x.device).expand(len(x), size, size)

    def total(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        sign, log_det = log_determinants(carried)
        return log_det, sign.detach()
