"""Losses that teach a velocity field to carry a base to data without integrating it: flow matching and denoising scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from boltzgen.core import Distribution, Objective
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import InputError, ShapeError
from boltzgen.networks.field import VelocityField, along_directions, late_times
from boltzgen.training.couplings import Coupling, independent
from boltzgen.training.objectives import WeightedRows


@dataclass(frozen=True)
class Interpolant:
    """A path x_t = a(t) x0 + b(t) x1 + γ(t) ζ from a base sample x0 to a configuration x1: a(0) = b(1) = 1, a(1) = b(0) = 0.

    ζ is standard normal noise of its own, with γ(0) = γ(1) = 0, so that both ends are what they are without it.

    Attributes:
        of_base: a, a function of times ``[b]``, differentiable.
        of_data: b, likewise.
        of_noise: γ, likewise; none by default.

    References:
        Albergo & Vanden-Eijnden, ICLR 2023, eq. 4; Lipman et al., ICLR 2023, section 4; Albergo, Boffi & Vanden-Eijnden,
        arXiv:2303.08797, definition 1 (noise).
    """

    of_base: Callable[[Tensor], Tensor]
    of_data: Callable[[Tensor], Tensor]
    of_noise: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        got = torch.cat([self.of_base(ends), self.of_data(ends)])
        if not torch.allclose(got, torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-6):
            raise InputError(f"an interpolant needs a(0) = b(1) = 1 and a(1) = b(0) = 0; got a(0), a(1), b(0), b(1) = {got.tolist()}")
        if self.of_noise is not None and not bool((self.of_noise(ends).abs() < 1e-6).all()):
            raise InputError(f"the noise of an interpolant needs g(0) = g(1) = 0, got {self.of_noise(ends).tolist()}")

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b, da/dt and db/dt at times ``[b]``, each ``[b]``."""
        one = torch.ones_like(t)
        a, a_rate = along_directions(self.of_base, (t,), (one,))
        b, b_rate = along_directions(self.of_data, (t,), (one,))
        return a, b, a_rate, b_rate

    def noise_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """γ and dγ/dt at times ``[b]``, each ``[b]``; zero without noise."""
        if self.of_noise is None:
            return torch.zeros_like(t), torch.zeros_like(t)
        gamma, rate = along_directions(self.of_noise, (t,), (torch.ones_like(t),))
        return gamma, rate


#: Straight lines at constant speed.
STRAIGHT = Interpolant(lambda t: 1 - t, lambda t: t)
#: a² + b² = 1: the variance stays where base and data have the same; the path of a variance-preserving diffusion.
VARIANCE_PRESERVING = Interpolant(lambda t: torch.cos(0.5 * math.pi * t), lambda t: torch.sin(0.5 * math.pi * t))


def straight_with_noise(scale: float) -> Interpolant:
    """Straight lines with γ(t) = s sin(π t); straight ones alone for s = 0.

    Between two ensembles that agree in a stiff direction of width σ, straight lines between independent ends are as narrow as
    σ √((1 − t)² + t²): the field has to squeeze it, and let it go again. With γ² = 2 t (1 − t) σ² the width would stay, and the field at
    rest; s = σ/√2 comes close, without the infinite rate of a root at the ends.

    Args:
        scale: s, in the unit of the configurations.
    """
    return STRAIGHT if scale == 0 else Interpolant(STRAIGHT.of_base, STRAIGHT.of_data, lambda t: scale * torch.sin(math.pi * t))


class Sampled(Protocol):
    """What paths can start from: anything with samples, whether its density is known or not."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a sample."""

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Samples ``[n, *event]``, then whatever is known of them."""


@dataclass(frozen=True)
class Frames:
    """Samples of an ensemble, to be drawn again in random order; their density is not known.

    Attributes:
        x: Configurations ``[m, n, d]``.
    """

    x: Tensor

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a configuration."""
        return tuple(self.x.shape[1:])

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Configurations ``[n, n, d]`` and nothing else."""
        return (self.x[torch.randint(len(self.x), (n,), generator=generator)],)


class FlowMatching(Objective[nn.Module]):
    """E |v(t, x_t) − ẋ_t|², x_t on paths from the base to data: least where v is the mean velocity of all paths through x_t.

    The flow of that mean carries the base to the data exactly. The loss itself does not go to zero: the velocities of single paths
    scatter about their mean. Where the paths carry noise, ẋ_t = ȧ x0 + ḃ x1 + γ̇ ζ: its own motion is part of the velocity, or the flow
    would end elsewhere. ζ has no centre, as positions of particles in a velocity field have none.

    Args:
        field: The field that is trained, part of the model.
        base: What x0 is drawn from; anything that can be sampled, another ensemble too (:class:`Frames`).
        x: Data ``[m, *event]``.
        batch_size: Pairs per step.
        log_w: Log weights ``[m]`` of the data; equal by default. Reweighted samples of a flow make training from energies alone.
        interpolant: The paths.
        coupling: Which x0 goes to which x1, found anew for every batch: pairs that came back would be learned by heart.
        late: Half of the times are late ones (:func:`~boltzgen.networks.field.late_times`): what is stiff in the data takes shape only
            when the noise is as small as its width. The field with the least loss stays the same; where errors are made changes.

    References:
        Lipman et al., ICLR 2023, theorem 2; Albergo & Vanden-Eijnden, ICLR 2023, proposition 1.
    """

    def __init__(
        self,
        field: VelocityField,
        base: Sampled,
        x: Tensor,
        *,
        batch_size: int,
        log_w: Tensor | None = None,
        interpolant: Interpolant = STRAIGHT,
        coupling: Coupling = independent,
        late: bool = False,
    ) -> None:
        sizes = tuple(field.event_shape), tuple(base.event_shape), tuple(x.shape[1:])
        if len(set(sizes)) > 1:
            raise ShapeError("field, base and data must agree about the shape of a configuration, got {}, {} and {}".format(*sizes))
        self.field, self.base, self.x = field, base, x
        self.rows = WeightedRows(len(x), batch_size=batch_size, log_w=log_w)
        self.interpolant, self.coupling, self.late = interpolant, coupling, late

    def __call__(self, model: nn.Module, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        rows = self.rows.draw(generator)
        x1 = self.x[rows]
        x0, x1 = self.coupling(self.base.sample(len(x1), generator=generator)[0].to(x1), x1)
        t = self._times(len(x1), x1, generator)
        if self.interpolant.of_noise is None:
            loss = self._loss(t, x0, x1)
        else:
            noise = torch.randn(x1.shape, generator=generator, dtype=torch.float64).to(x1)
            loss = self._loss_with_noise(t, x0, x1, noise - noise.mean(dim=1, keepdim=True))
        return loss, {"flow_matching": float(loss.detach())}

    def _times(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Times ``[n]``, one in each n-th of [0, 1] in random order: less noise than independent ones."""
        order = torch.randperm(n, generator=generator)
        even = (order + torch.rand(n, generator=generator)) / n
        if not self.late:
            return even.to(like)
        return torch.where(torch.arange(n) % 2 == 0, even, late_times(even)).to(like)

    def _loss(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        a, b, a_rate, b_rate = (c.reshape(-1, *[1] * (x0.ndim - 1)) for c in self.interpolant.at(t))
        v = self.field(t, a * x0 + b * x1)
        return (v - (a_rate * x0 + b_rate * x1)).square().flatten(1).sum(dim=1).mean()

    def _loss_with_noise(self, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor) -> Tensor:
        a, b, a_rate, b_rate = (c[:, None, None] for c in self.interpolant.at(t))
        gamma, gamma_rate = (c[:, None, None] for c in self.interpolant.noise_at(t))
        v = self.field(t, a * x0 + b * x1 + gamma * noise)
        return (v - (a_rate * x0 + b_rate * x1 + gamma_rate * noise)).square().sum(dim=(1, 2)).mean()


class DenoisingScore(FlowMatching):
    """E |x̂0 − x0|², the denoising score objective of a diffusion from data to the normal base, in terms of a velocity.

    With x0 ~ N(0, K⁻¹) independent of x1, the velocity v of the probability-flow ODE and the mean noise x̂0 = E[x0 | x_t] determine
    each other, and the score is ∇ln p_t = −K x̂0 / a. So the network stays a velocity field, its flow
    is the probability-flow ODE, and its density is computed as for any other:

        x_t = a x0 + b x1,  ẋ_t = ȧ x0 + ḃ x1   ⟹   x̂0 = (ḃ x_t − b v) / (a ḃ − ȧ b)

    The loss weighs the error of the noise alike at all times (that of the score is K/a times as large); flow matching that of the velocity.

    Args:
        field, base, x, batch_size, log_w: As for :class:`FlowMatching`; the base must be normal.
        interpolant: Variance preserving by default.

    Raises:
        InputError: If the base is another one.

    References:
        Vincent, Neural Comput. 23, 1661 (2011), eq. 11; Song et al., ICLR 2021, eq. 13 (probability flow).
    """

    def __init__(
        self,
        field: VelocityField,
        base: Distribution,
        x: Tensor,
        *,
        batch_size: int,
        log_w: Tensor | None = None,
        interpolant: Interpolant = VARIANCE_PRESERVING,
    ) -> None:
        if not isinstance(base, ParticleNormal):
            raise InputError(f"the score of a diffusion needs a normal base, a ParticleNormal, got {type(base).__name__}")
        if interpolant.of_noise is not None:
            raise InputError("the base of a diffusion is its noise: give an interpolant without another")
        super().__init__(field, base, x, batch_size=batch_size, log_w=log_w, interpolant=interpolant)

    def __call__(self, model: nn.Module, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        loss, _ = super().__call__(model, generator=generator)
        return loss, {"denoising_score": float(loss.detach())}

    def _loss(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        a, b, _, _ = (c[:, None, None] for c in self.interpolant.at(t))
        noise = mean_noise(self.field, t, a * x0 + b * x1, interpolant=self.interpolant)
        return (noise - x0).square().sum(dim=(1, 2)).mean()


def mean_noise(field: VelocityField, t: Tensor, x: Tensor, *, interpolant: Interpolant) -> Tensor:
    """E[x0 | x_t = x] ``[b, n, d]`` that a velocity field implies, for base and data paired independently.

    The score of a base N(0, σ²) on the way is −mean_noise / (σ² a(t)).

    Args:
        field: Velocity field.
        t: Times ``[b]`` in [0, 1).
        x: Positions ``[b, n, d]``.
        interpolant: The paths the field was trained on.
    """
    a, b, a_rate, b_rate = (c[:, None, None] for c in interpolant.at(t))
    return (b_rate * x - b * field(t, x)) / (a * b_rate - a_rate * b)
