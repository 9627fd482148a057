"""Flow matching and denoising scores against the closed form between two Gaussians; couplings against what they promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from boltzgen.core import Chain, Flow
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import InputError, ShapeError
from boltzgen.networks.field import ParticleField
from boltzgen.training.couplings import Aligned, Coupling, independent, minibatch_transport, rotation_onto
from boltzgen.training.flow_matching import (
    STRAIGHT,
    VARIANCE_PRESERVING,
    DenoisingScore,
    FlowMatching,
    Frames,
    Interpolant,
    mean_noise,
    straight_with_noise,
)
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from tests.assertions import assert_z
from tests.registry import noise, seeded

N, D, SPREAD = 3, 2, 0.4


class BetweenGaussians(ParticleField):
    """The exact velocity from a mean-free normal of scale 1 to one of scale s, times 1 + a sine series in t whose weights start at zero.

    x_t = a x0 + b x1 + γ ζ is normal with variance a² + b² s² + γ², so E[ẋ_t | x_t] = x_t (ȧ a + ḃ b s² + γ̇ γ) / (a² + b² s² + γ²).
    """

    def __init__(self, interpolant: Interpolant) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions, self.interpolant = N, D, interpolant
        self.weights = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        a, b, a_rate, b_rate = (c[:, None, None] for c in self.interpolant.at(t.reshape(-1)))
        gamma, gamma_rate = (c[:, None, None] for c in self.interpolant.noise_at(t.reshape(-1)))
        exact = x * (a_rate * a + b_rate * b * SPREAD**2 + gamma_rate * gamma) / (a**2 + b**2 * SPREAD**2 + gamma**2)
        series = torch.cos(math.pi * t.reshape(-1, 1) * torch.arange(4)) @ self.weights
        v = exact + series[:, None, None] * x
        return v - v.mean(dim=1, keepdim=True)


CUBIC = Interpolant(lambda t: 1 - t**3, lambda t: t**2 * (3 - 2 * t))
NOISY = straight_with_noise(0.6)
BASE = ParticleNormal.isotropic(N, D)
DATA = ParticleNormal.isotropic(N, D, scale=SPREAD).sample(200_000, generator=seeded(11))[0]


class BackInTime(FlowMatching):
    """Mutant: the base moves the wrong way."""

    def _loss(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        a, b, a_rate, b_rate = (c[:, None, None] for c in self.interpolant.at(t))
        return (self.field(t, a * x0 + b * x1) - (b_rate * x1 - a_rate * x0)).square().sum(dim=(1, 2)).mean()


class StillNoise(FlowMatching):
    """Mutant: the noise of the path does not move."""

    def _loss_with_noise(self, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor) -> Tensor:
        a, b, a_rate, b_rate = (c[:, None, None] for c in self.interpolant.at(t))
        gamma = self.interpolant.noise_at(t)[0][:, None, None]
        v = self.field(t, a * x0 + b * x1 + gamma * noise)
        return (v - (a_rate * x0 + b_rate * x1)).square().sum(dim=(1, 2)).mean()


class ScoreOfOneNoise(DenoisingScore):
    """Mutant: the velocity is read as if it were the noise."""

    def _loss(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        a, b, _, _ = (c[:, None, None] for c in self.interpolant.at(t))
        return (self.field(t, a * x0 + b * x1) - x0).square().sum(dim=(1, 2)).mean()


def assert_stationary(objective: FlowMatching) -> None:
    """At the exact velocity the gradient of the loss by every weight is zero, within its error over batches."""
    field, generator = objective.field, seeded(5)
    gradients = torch.stack(
        [torch.autograd.grad(objective(Flow(BASE, ContinuousTransform(field, FixedStep(1))), generator=generator)[0], field.weights)[0]
         for _ in range(60)]
    )  # fmt: skip
    for column in gradients.T:
        assert_z(float(column.mean()), 0.0, float(column.std()) / len(column) ** 0.5)


def test_late_times_are_half_even_and_half_logarithmic() -> None:
    """P(t > s) of the second half is ln((1.03 − s)/1.03)-linear: 1 − ln((1.03 − s)/1.03) / ln(0.03/1.03)."""
    late = FlowMatching(BetweenGaussians(STRAIGHT), BASE, DATA, batch_size=4, late=True)
    t = late._times(100_000, DATA, seeded())
    for s in (0.3, 0.9, 0.97):
        expected = 0.5 * (1 - s) + 0.5 * (1 - math.log((1.03 - s) / 1.03) / math.log(0.03 / 1.03))
        assert float((t > s).double().mean()) == pytest.approx(expected, abs=0.005)
    assert 0 <= float(t.min()) < float(t.max()) <= 1
    assert_stationary(FlowMatching(BetweenGaussians(STRAIGHT), BASE, DATA, batch_size=2000, late=True))


@pytest.mark.parametrize("interpolant", [STRAIGHT, VARIANCE_PRESERVING, CUBIC])
def test_the_mean_velocity_minimises_flow_matching(interpolant: Interpolant) -> None:
    field = BetweenGaussians(interpolant)
    assert_stationary(FlowMatching(field, BASE, DATA, batch_size=2000, interpolant=interpolant))
    with pytest.raises(AssertionError):
        assert_stationary(BackInTime(field, BASE, DATA, batch_size=2000, interpolant=interpolant))
    with torch.no_grad():
        field.weights += 0.05
    with pytest.raises(AssertionError):
        assert_stationary(FlowMatching(field, BASE, DATA, batch_size=2000, interpolant=interpolant))


def test_the_mean_velocity_of_noisy_paths_minimises_flow_matching() -> None:
    """With γ(t) = s sin(π t); the base may be samples alone; a velocity without γ̇ ζ is caught, and so is the one of paths without noise."""
    field = BetweenGaussians(NOISY)
    assert_stationary(FlowMatching(field, BASE, DATA, batch_size=2000, interpolant=NOISY))
    frames = Frames(BASE.sample(200_000, generator=seeded(12))[0])
    assert_stationary(FlowMatching(field, frames, DATA, batch_size=2000, interpolant=NOISY))
    for wrong in (
        StillNoise(field, BASE, DATA, batch_size=2000, interpolant=NOISY),
        FlowMatching(BetweenGaussians(STRAIGHT), BASE, DATA, batch_size=2000, interpolant=NOISY),
    ):
        with pytest.raises(AssertionError):
            assert_stationary(wrong)


def test_noise_vanishes_at_both_ends_and_moves_as_its_derivative_says() -> None:
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    gamma, rate = NOISY.noise_at(t)
    torch.testing.assert_close(gamma[[0, -1]], torch.zeros(2, dtype=torch.float64), atol=1e-15, rtol=0)
    step = 1e-6
    finite = (NOISY.noise_at(t + step)[0] - NOISY.noise_at(t - step)[0]) / (2 * step)
    torch.testing.assert_close(rate, finite, atol=1e-8, rtol=0)
    assert float(gamma[3]) == pytest.approx(0.6)
    assert straight_with_noise(0.0) is STRAIGHT
    for values in STRAIGHT.noise_at(t):
        assert not bool(values.any())


def test_weights_choose_the_data() -> None:
    wide = ParticleNormal.isotropic(N, D, scale=0.8).sample(200_000, generator=seeded(12))[0]
    narrow, broad = ParticleNormal.isotropic(N, D, scale=SPREAD), ParticleNormal.isotropic(N, D, scale=0.8)
    log_w = narrow.log_prob(wide) - broad.log_prob(wide)
    assert_stationary(FlowMatching(BetweenGaussians(STRAIGHT), BASE, wide, batch_size=2000, log_w=log_w))
    with pytest.raises(AssertionError):
        assert_stationary(FlowMatching(BetweenGaussians(STRAIGHT), BASE, wide, batch_size=2000))


@pytest.mark.parametrize("interpolant", [VARIANCE_PRESERVING, STRAIGHT])
def test_the_probability_flow_minimises_the_denoising_score(interpolant: Interpolant) -> None:
    field = BetweenGaussians(interpolant)
    assert_stationary(DenoisingScore(field, BASE, DATA, batch_size=2000, interpolant=interpolant))
    with pytest.raises(AssertionError):
        assert_stationary(ScoreOfOneNoise(field, BASE, DATA, batch_size=2000, interpolant=interpolant))
    t, x = torch.linspace(0.05, 0.95, 7, dtype=torch.float64), BASE.sample(7, generator=seeded())[0]
    a, b, _, _ = (c[:, None, None] for c in interpolant.at(t))
    expected = x * a / (a**2 + b**2 * SPREAD**2)
    torch.testing.assert_close(mean_noise(field, t, x, interpolant=interpolant).detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("interpolant", [STRAIGHT, VARIANCE_PRESERVING, CUBIC, NOISY])
def test_the_flow_of_the_mean_velocity_has_the_density_of_the_data(interpolant: Interpolant) -> None:
    flow = Flow(BASE, ContinuousTransform(BetweenGaussians(interpolant), FixedStep(80)))
    with torch.no_grad():
        x, log_q = flow.sample(20, generator=seeded())
    torch.testing.assert_close(log_q, ParticleNormal.isotropic(N, D, scale=SPREAD).log_prob(x), atol=1e-5, rtol=0)


def test_training_finds_the_closed_form() -> None:
    field = BetweenGaussians(STRAIGHT)
    with torch.no_grad():
        field.weights += torch.tensor([0.5, -0.3, 0.2, 0.1])
    flow, generator = Flow(BASE, ContinuousTransform(field, FixedStep(1))), seeded()
    objective = FlowMatching(field, BASE, DATA, batch_size=2000)
    optimiser = torch.optim.Adam(field.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        objective(flow, generator=generator)[0].backward()
        optimiser.step()
    assert float(field.weights.detach().abs().max()) < 0.05


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"a\(0\) = b\(1\) = 1"):
        Interpolant(lambda t: 1 - 0.5 * t, lambda t: t)
    with pytest.raises(InputError, match=r"g\(0\) = g\(1\) = 0"):
        Interpolant(STRAIGHT.of_base, STRAIGHT.of_data, lambda t: t)
    with pytest.raises(InputError, match="base of a diffusion"):
        DenoisingScore(BetweenGaussians(STRAIGHT), BASE, DATA, batch_size=2, interpolant=NOISY)
    with pytest.raises(ShapeError, match="must agree"):
        FlowMatching(BetweenGaussians(STRAIGHT), BASE, noise(10, 4, 2), batch_size=2)
    with pytest.raises(InputError, match="normal base"):
        DenoisingScore(BetweenGaussians(STRAIGHT), Flow(BASE, Chain()), DATA, batch_size=2)
    with pytest.raises(InputError, match="one round"):
        Aligned([0, 0], reflections=False, rounds=0)


def cost(coupling: Coupling, x0: Tensor, x1: Tensor) -> float:
    x0, x1 = coupling(x0, x1)
    return float((x0 - x1).square().sum())


def test_minibatch_transport_is_optimal() -> None:
    x0, x1 = noise(5, 3, 2), noise(6, 3, 2)[1:] * 2 + 1
    best = min(float((x0[list(order)] - x1).square().sum()) for order in itertools.permutations(range(5)))
    assert cost(minibatch_transport, x0, x1) == pytest.approx(best)
    assert best < cost(independent, x0, x1)


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("d", [2, 3])
def test_aligned_pairs_are_closer_and_the_same_shapes(d: int, reflections: bool) -> None:
    labels = [0, 0, 1, 1, 1, 2]
    x0, x1 = noise(40, 6, d), noise(41, 6, d)[1:] * 1.3 + 2.0
    y0, y1 = Aligned(labels, reflections=reflections)(x0, x1)
    assert torch.equal(y1, x1)
    assert ((y0 - y1).square().sum((1, 2)) <= (x0 - x1).square().sum((1, 2)) + 1e-9).all()
    for kind in ([0, 1], [2, 3, 4], [5]):  # distances to the centre within a kind are the same numbers
        before, after = ((x - x.mean(1, keepdim=True))[:, kind].norm(dim=-1).sort(dim=1).values for x in (x0, y0))
        torch.testing.assert_close(after, before)
    both = Aligned(labels, reflections=reflections, across_batch=True)
    assert cost(both, x0, x1) < cost(Aligned(labels, reflections=reflections), x0, x1)


def test_alignment_undoes_small_turns_and_relabelling() -> None:
    x1 = noise(10, 5, 3)
    x1 = x1 - x1.mean(1, keepdim=True)
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, 0.1, 0.05], [-0.1, 0.0, -0.08], [-0.05, 0.08, 0.0]], dtype=torch.float64))
    y0, _ = Aligned([0] * 5, reflections=False)((x1 @ turn)[:, [2, 0, 1, 4, 3]], x1)
    torch.testing.assert_close(y0, x1, atol=1e-10, rtol=0)


def test_mirror_images_are_taken_only_where_allowed() -> None:
    x1 = noise(10, 5, 3)
    x1 = x1 - x1.mean(1, keepdim=True)
    mirrored = x1 * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.allclose(torch.linalg.det(rotation_onto(mirrored, x1, reflections=False)), torch.ones(10, dtype=torch.float64))
    labels = range(5)
    assert cost(Aligned(labels, reflections=True), mirrored, x1) < 1e-10
    assert cost(Aligned(labels, reflections=False), mirrored, x1) > 0.1


def test_gaussian_bases_are_normalised_and_fit_their_data() -> None:
    springs = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 1.5, -0.5], [-1.0, -0.5, 1.5]], dtype=torch.float64)
    made = ParticleNormal(springs, 1)
    # two coordinates of the mean-free plane, in an orthonormal basis
    basis = torch.linalg.qr(torch.eye(3, dtype=torch.float64) - 1 / 3)[0][:, :2]
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis) @ basis.T
    assert float(made.log_prob(plane.unsqueeze(-1)).exp().sum()) * 0.04**2 == pytest.approx(1.0, abs=1e-8)
    x, log_prob = made.sample(200_000, generator=seeded())
    torch.testing.assert_close(log_prob, made.log_prob(x))
    torch.testing.assert_close(x.mean(1), torch.zeros(200_000, 1, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(ParticleNormal.fitted(x).precision, springs, atol=0.02, rtol=0)
    order, kinds = [1, 0, *range(2, len(springs))], torch.tensor([5, 5, *range(2, len(springs))])
    alike = ParticleNormal.fitted(x, kinds=kinds).precision
    torch.testing.assert_close(alike[order][:, order], alike, atol=1e-10, rtol=1e-10)
    assert float((ParticleNormal.fitted(x).precision[order][:, order] - springs).abs().max()) > 0.1
    widened = ParticleNormal.fitted(x, narrowest=0.65)
    assert widened.scales.tolist() == pytest.approx([2**-0.5, 0.65], abs=5e-3)  # 3**-0.5 in the data
    torch.testing.assert_close(ParticleNormal.fitted(x, narrowest=3.0).precision, ParticleNormal.isotropic(3, 1, scale=3.0).precision)
    held = ParticleNormal.isotropic(2, 1, scale=0.7, centre_scale=0.3)
    grid = torch.cartesian_prod(axis / 2, axis / 2).unsqueeze(-1)
    assert float(held.log_prob(grid).exp().sum()) * 0.02**2 == pytest.approx(1.0, abs=1e-8)
    chain = ParticleNormal.harmonic(torch.tensor([[0, 1], [1, 2]]), n_particles=3, length=0.15)
    y, _ = chain.sample(100_000, generator=seeded())
    assert float((y[:, 0] - y[:, 1]).square().sum(-1).mean()) == pytest.approx(0.15**2, rel=0.02)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (torch.eye(3), "rows sum to zero"),
        (torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]]), "connected"),
        (torch.zeros(2, 3), "symmetric"),
    ],
)
def test_impossible_gaussians_are_refused(precision: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParticleNormal(precision, 3)
