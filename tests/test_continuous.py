"""Integration of velocity fields: known flows, orders of convergence, measured errors of the density, failures."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from boltzgen.core import Context, Estimate, Flow, Target, WeightedSamples, require_exact_density
from boltzgen.distributions import ParticleNormal, log_prob_where_known
from boltzgen.errors import InexactDensityError, InputError, SolverError, WeightsError
from boltzgen.estimators.profiles import profile_1d
from boltzgen.estimators.reweighting import free_energy_difference, log_z, mean
from boltzgen.estimators.weights import negative_share
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField
from boltzgen.sampling.chains import run_chain
from boltzgen.sampling.importance import importance_sample, resample
from boltzgen.targets.analytic import Gaussian
from boltzgen.transforms.continuous import Adaptive, ContinuousTransform, FixedStep, measure_log_det_error
from boltzgen.transforms.volume import Hutchinson, IntegratedDivergence, StepJacobian, VolumeChange
from tests.registry import noise, seeded


class Linear(ParticleField):
    """v = rate(t) · A x on one particle in three dimensions."""

    def __init__(self, *, swings: bool = False) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions, self.swings = 1, 3, swings
        self.matrix = nn.Parameter(noise(3, 3, scale=0.7))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.rate(t) * x @ self.matrix.T

    def rate(self, t: Tensor) -> Tensor:
        return 1 + torch.cos(3 * t) if self.swings else torch.ones_like(t)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, x), (self.rate(t) * self.matrix.trace()).expand(len(x))


class Cubic(ParticleField):
    """v = −x³ cos t: x(1) = z / √(1 + 2 z² sin 1) for every coordinate by itself."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = 2, 1
        self.sign = nn.Parameter(torch.tensor(sign, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.sign * x**3 * torch.cos(t)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, x), (-3 * self.sign * x**2 * torch.cos(t)).flatten(1).sum(1)


class BlowUp(ParticleField):
    """v = 8 x²: infinite at t = 1 / (8 z)."""

    def __init__(self) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = 1, 1
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return 8 * x**2


def embedded(n: int = 4, d: int = 2) -> EmbeddedField:
    generator = seeded()
    field = EmbeddedField(n, d, length=1.0, n_scalars=4, n_vectors=2, hidden=8, n_radial=8, generator=generator).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return field


def flow(n_steps: int = 10) -> Flow:
    return Flow(ParticleNormal.isotropic(4, 2), ContinuousTransform(embedded(), FixedStep(n_steps)))


def cubic_exact(z: Tensor) -> tuple[Tensor, Tensor]:
    growth = 2 * math.sin(1)
    return z / (1 + growth * z**2).sqrt(), (-1.5 * (1 + growth * z**2).log()).flatten(1).sum(1)


@pytest.mark.parametrize(("field", "shape"), [(Linear(), (1, 3)), (Linear(swings=True), (1, 3)), (Cubic(), (2, 1))])
def test_divergences_in_closed_form_are_those_of_differentiation(field: ParticleField, shape: tuple[int, int]) -> None:
    """So that many steps of the solvers are cheap below."""
    t, x = torch.tensor(0.4, dtype=torch.float64), noise(5, *shape)
    for closed, differentiated in zip(field.divergence(t, x), ParticleField.divergence(field, t, x), strict=True):
        torch.testing.assert_close(closed, differentiated, atol=1e-12, rtol=0)


@pytest.mark.parametrize("swings", [False, True])
@pytest.mark.parametrize(
    "solver", [FixedStep(40), FixedStep(80, late=True), FixedStep(400, "midpoint"), FixedStep(400, "heun2"), Adaptive(1e-9, 1e-9)]
)
def test_a_linear_field_gives_the_matrix_exponential(swings: bool, solver: FixedStep | Adaptive) -> None:
    field, z = Linear(swings=swings), noise(5, 1, 3)
    duration = 1 + math.sin(3) / 3 if swings else 1.0
    x, log_det = ContinuousTransform(field, solver)(z)
    exact = torch.linalg.matrix_exp(duration * field.matrix)
    torch.testing.assert_close(x, z @ exact.T, atol=1e-4 if isinstance(solver, FixedStep) and solver.order == 2 else 1e-6, rtol=0)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(exact).logabsdet.expand(5), atol=1e-4, rtol=0)


def convergence(method: str, *, sign: float = 1.0, late: bool = False) -> tuple[float, float]:
    """Measured orders of position and log determinant, from 32 and 64 steps."""
    z = noise(50, 2, 1).tanh()
    x, log_det = cubic_exact(z)
    errors = []
    for n in (256, 512) if late else (32, 64):  # late steps begin five times as long
        got, got_log_det = ContinuousTransform(Cubic(sign), FixedStep(n, method, late))(z)  # type: ignore[arg-type]
        errors.append((float((got - x).abs().max()), float((got_log_det - log_det).abs().max())))
    return math.log2(errors[0][0] / errors[1][0]), math.log2(errors[0][1] / errors[1][1])


@pytest.mark.parametrize(("method", "order"), [("rk4", 4), ("heun2", 2), ("midpoint", 2)])
def test_orders_of_convergence(method: str, order: int) -> None:
    assert FixedStep(1, method).order == order  # type: ignore[arg-type]
    assert convergence(method) == pytest.approx((order, order), abs=0.25)
    assert convergence(method, late=True) == pytest.approx((order, order), abs=0.4)
    assert convergence(method, sign=1.001)[0] < 1  # another field: its error does not fall


@pytest.mark.parametrize("backwards", [False, True])
def test_log_det_is_that_of_the_discrete_map(backwards: bool) -> None:
    transform, x = ContinuousTransform(embedded(), FixedStep(80)), noise(1, 4, 2)
    steps = 1e-6 * torch.eye(8, dtype=torch.float64).reshape(8, 4, 2)
    with torch.no_grad():
        moved = (transform.pull if backwards else transform.push)(torch.cat([x + steps, x - steps]))
        _, log_det = transform.inverse(x) if backwards else transform(x)
    jacobian = (moved[:8] - moved[8:]).flatten(1) / 2e-6
    assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(log_det), abs=1e-5)


def by_steps(n_steps: int, method: Any = "rk4", *, checkpointing: bool = False) -> ContinuousTransform:
    return ContinuousTransform(embedded(), FixedStep(n_steps, method), volume=StepJacobian(), checkpointing=checkpointing)


@pytest.mark.parametrize("method", ["rk4", "heun2", "midpoint"])
def test_however_few_the_steps_their_log_det_and_inverse_are_exact(method: str) -> None:
    transform, z = by_steps(6, method), noise(3, 4, 2)
    x, log_det = transform(z)
    for k in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(transform.push, z[k : k + 1]).reshape(8, 8)
        assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(log_det[k]), abs=1e-12)
    back, log_det_back = transform.inverse(x)
    torch.testing.assert_close(back, z, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-11, rtol=0)
    torch.testing.assert_close(transform.pull(x), z, atol=1e-12, rtol=0)
    follows = transform.with_solver(transform.solver, volume=IntegratedDivergence())
    assert float((follows(z)[1] - log_det).detach().abs().max()) > 1e-4  # the flow that the steps follow has another


class Slope(ParticleField):
    """v = 3 sin 2r along the distance r of two particles on a line: steep beside its steps, and it folds in a single one."""

    def __init__(self, strength: float = 3.0) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = 2, 1
        self.strength = nn.Parameter(torch.tensor(strength, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.strength * torch.sin(2 * (x - x.flip(1))) / 2


@pytest.mark.parametrize(("volume", "is_one"), [(StepJacobian(), True), (IntegratedDivergence(), False)])
def test_the_density_of_coarse_steps_is_normalised_if_it_is_that_of_the_steps(volume: VolumeChange, is_one: bool) -> None:
    """∫ q on the mean-free line by the trapezoidal rule; the integral of the divergence is the mutant."""
    coarse = Flow(ParticleNormal.isotropic(2, 1), ContinuousTransform(Slope(1.2), FixedStep(3), volume=volume))
    s = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    with torch.no_grad():
        density = coarse.log_prob(torch.stack([s, -s], dim=1).unsqueeze(-1) / 2**0.5).exp()
    total = float(torch.trapezoid(density, s))
    assert (abs(total - 1) < 1e-6) == is_one
    assert is_one or abs(total - 1) > 1e-3


def test_steps_that_fold_space_are_refused() -> None:
    z = torch.linspace(-2, 2, 50, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"inside out.*Use more steps"):
        ContinuousTransform(Slope(), FixedStep(1), volume=StepJacobian())(z)
    ContinuousTransform(Slope(), FixedStep(20), volume=StepJacobian())(z)
    with pytest.raises(InputError, match="no steps whose log determinant"):
        ContinuousTransform(Slope(), Adaptive(), volume=StepJacobian())
    with pytest.raises(SolverError, match=r"a step cannot be undone|inside out"):
        ContinuousTransform(Slope(30.0), FixedStep(1), volume=StepJacobian()).inverse(z)


def test_rows_that_cannot_be_undone_are_named_and_the_others_do_not_suffer() -> None:
    z = torch.linspace(-2, 2, 50, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    flow = Flow(ParticleNormal.isotropic(2, 1), ContinuousTransform(Slope(2.0), FixedStep(1), volume=StepJacobian()))
    with torch.no_grad():
        log_q = log_prob_where_known(flow, z)
        known = ~torch.isnan(log_q)
        assert 5 < int(known.sum()) < 45
        torch.testing.assert_close(flow.log_prob(z[known]), log_q[known])
        torch.testing.assert_close(flow.transform.push(flow.transform.pull(z[known])), z[known], atol=1e-12, rtol=0)
        with pytest.raises(SolverError) as failure:
            flow.log_prob(z)
    assert set(failure.value.rows) <= set(torch.nonzero(~known).flatten().tolist()) != set()


class OnLine(Target):
    """A normal density of the distance of two particles, along the mean-free line."""

    def __init__(self, mean: float, width: float) -> None:
        self.event_shape, self.mean, self.width = (2, 1), mean, width

    def reduced_potential(self, x: Tensor) -> Tensor:
        return 0.5 * (((x[:, 0, 0] - x[:, 1, 0]) / 2**0.5 - self.mean) / self.width).square().double()


def test_averages_over_steps_that_fold_space_are_exact_if_weights_keep_their_sign() -> None:
    """∫ f e^{−u} det ∂T/∂z dz over the line; without the sign it is another number."""
    target, s = OnLine(1.0, 0.5), torch.linspace(-30, 30, 60001, dtype=torch.float64)
    with torch.no_grad():
        x, log_det, sign = ContinuousTransform(Slope(), FixedStep(1), volume=StepJacobian()).signed(
            torch.stack([s, -s], 1)[..., None] / 2**0.5
        )
    position, size = (x[:, 0, 0] - x[:, 1, 0]) / 2**0.5, (log_det - target.reduced_potential(x)).exp()
    z = 0.5 * (2 * math.pi) ** 0.5
    assert 0.1 < float((sign < 0).double().mean()) < 0.9
    assert float(torch.trapezoid(sign * size, s)) == pytest.approx(z, abs=1e-6)
    assert float(torch.trapezoid(sign * size * position, s)) == pytest.approx(z, abs=1e-6)
    assert float(torch.trapezoid(size, s)) > 1.1 * z
    assert float(torch.trapezoid(size * position, s)) > 1.1 * z


def test_estimates_of_samples_from_steps_that_fold_space_are_exact_with_signs() -> None:
    """ln Z, an average, a free energy difference and a profile of a normal distribution; without signs all but the last are wrong."""
    flow = Flow(ParticleNormal.isotropic(2, 1, scale=1.2), ContinuousTransform(Slope(1.5), FixedStep(1), volume=StepJacobian()))
    flow.transform.accept_error(0.0)  # type: ignore[operator]
    centre, width = 1.0, 0.4
    samples = importance_sample(flow, OnLine(centre, width), n=40_000, generator=seeded(), progress=False).require_exact()
    assert samples.sign is not None
    assert 0.2 < negative_share(samples) < 0.8
    s = (samples.x[:, 0, 0] - samples.x[:, 1, 0]) / 2**0.5
    exact = (0.5 * math.log(2 * math.pi) + math.log(width), centre, -math.log(math.erfc(0.5 / 2**0.5) / (2 - math.erfc(0.5 / 2**0.5))))

    def estimates(rows: WeightedSamples) -> tuple[Estimate, ...]:
        right = s > centre + 0.5 * width
        return log_z(rows, seed=1), mean(rows, s, seed=1), free_energy_difference(rows, ~right, right, seed=1)

    for value, estimate in zip(exact, estimates(samples), strict=True):
        assert abs(estimate.value - value) < 4 * estimate.stderr
        assert estimate.stderr < 0.1
    unsigned = [
        abs(estimate.value - value) / estimate.stderr for value, estimate in zip(exact, estimates(replace(samples, sign=None)), strict=True)
    ]
    assert max(unsigned) > 10
    profile = profile_1d(samples, s, edges=np.linspace(centre - width, centre + width, 9), seed=1)
    known = 0.5 * ((profile.centers[0] - centre) / width) ** 2
    off = profile.free_energy - (known - known[profile.reference[0]])
    known_well = profile.stderr > 0
    assert (np.abs(off[known_well]) < 4 * profile.stderr[known_well] + 0.02).all()
    chain = run_chain(samples, generator=seeded())
    assert chain.log_det_error == pytest.approx(-math.log(1 - negative_share(samples)), abs=1e-9)
    with pytest.raises(InexactDensityError):
        chain.require_exact()
    with pytest.raises(WeightsError, match="negative weight cannot be drawn"):
        resample(samples, 10, generator=seeded())
    with pytest.raises(WeightsError, match="negative weights outweigh"):
        mean(replace(samples, sign=-samples.sign), s, seed=1)


def test_samples_behind_a_fold_do_not_count_as_an_error() -> None:
    """They are led back to another base sample than they came from; without the check for it the difference is in nats."""
    flow = Flow(ParticleNormal.isotropic(2, 1, scale=0.5), ContinuousTransform(Slope(1.3), FixedStep(1), volume=StepJacobian()))
    assert measure_log_det_error(flow, n=200, generator=seeded()) < 1e-9
    with torch.no_grad():
        z, log_p = flow.base.sample(200, generator=seeded())
        x, log_det, sign = flow.transform.signed(z)  # type: ignore[operator]
        log_q, again = (log_p - log_det)[sign > 0], log_prob_where_known(flow, x[sign > 0])
    differences = (again - log_q).abs()
    assert int((differences > 0.1).sum()) > 3
    assert int((differences < 1e-9).sum()) > 50


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pulling_alone_has_the_gradients_of_the_whole_inverse(*, checkpointing: bool) -> None:
    transform, x = by_steps(3, checkpointing=checkpointing), noise(2, 4, 2).requires_grad_(True)
    way = torch.randn(2, 4, 2, generator=seeded(), dtype=torch.float64)
    learned = [x, *transform.field.parameters()]
    alone, whole = (torch.autograd.grad((z * way).sum(), learned, allow_unused=True) for z in (transform.pull(x), transform.inverse(x)[0]))
    assert any(gradient is not None and float(gradient.abs().max()) > 0.1 for gradient in whole[1:])
    for one, other in zip(alone, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_gradients_through_steps_and_their_undoing_are_those_of_finite_differences(backwards: bool, checkpointing: bool) -> None:
    transform, x = by_steps(4, checkpointing=checkpointing), noise(2, 4, 2)
    generator = seeded()
    parameter = transform.field.layers[0].pair_radial  # type: ignore[union-attr,index]
    ways = [torch.randn(of.shape, generator=generator, dtype=torch.float64) for of in (x, parameter)]

    def loss(x: Tensor) -> Tensor:
        y, log_det = transform.inverse(x) if backwards else transform(x)
        return (y**3).sum() + (log_det * torch.tensor([1.0, -2.0])).sum()

    x = x.requires_grad_(True)
    gradients = torch.autograd.grad(loss(x), [x, parameter])
    with torch.no_grad():
        moved_x = (loss(x + 1e-5 * ways[0]) - loss(x - 1e-5 * ways[0])) / 2e-5
        parameter += 1e-5 * ways[1]
        above = loss(x)
        parameter -= 2e-5 * ways[1]
        moved = (above - loss(x)) / 2e-5
    assert float((gradients[0] * ways[0]).sum()) == pytest.approx(float(moved_x), rel=1e-6)
    assert float((gradients[1] * ways[1]).sum()) == pytest.approx(float(moved), rel=1e-6)


def test_coarse_steps_by_their_own_log_det_are_exact_and_it_belongs_to_them() -> None:
    coarse = Flow(ParticleNormal.isotropic(4, 2), by_steps(4))
    assert coarse.log_det_error is None
    assert measure_log_det_error(coarse, n=64, data=3.0 * noise(5, 4, 2), generator=seeded()) < 1e-10
    other = Flow(coarse.base, by_steps(4).with_solver(FixedStep(4), volume=IntegratedDivergence()))
    other.load_state_dict(copy.deepcopy(coarse.state_dict()))
    assert other.log_det_error is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_discrete_solution(checkpointing: bool) -> None:
    transform, z = ContinuousTransform(embedded(), FixedStep(3), checkpointing=checkpointing), noise(4, 4, 2)

    def loss() -> Tensor:
        x, log_det = transform(z)
        return (x**2).sum() + log_det.sum()

    loss().backward()
    parameter = transform.field.layers[0].moments
    step = torch.zeros_like(parameter)
    step[2, 3, 1] = 1e-5
    with torch.no_grad():
        parameter += step
        up = loss()
        parameter -= 2 * step
        down = loss()
    assert float(parameter.grad[2, 3, 1]) == pytest.approx(float((up - down) / 2e-5), rel=1e-6)


def test_evaluations_are_counted() -> None:
    transform = ContinuousTransform(embedded(), FixedStep(7))
    with torch.no_grad():
        transform(noise(2, 4, 2))
    assert transform.n_evaluations == 28


def test_positions_alone_are_the_same() -> None:
    transform, z = ContinuousTransform(embedded(), FixedStep(5)), noise(2, 4, 2)
    assert torch.equal(transform.push(z), transform(z)[0])
    assert torch.equal(transform.pull(z), transform.inverse(z)[0])


def test_hutchinson_is_unbiased_fresh_in_every_solve_and_refused_by_reweighting() -> None:
    exact, z = ContinuousTransform(embedded(), FixedStep(6)), noise(1, 4, 2)
    estimated = exact.with_solver(FixedStep(6), volume=Hutchinson(seeded()))
    with torch.no_grad():
        truth = float(exact(z)[1])
        rows = estimated(z.expand(4000, 4, 2))[1]
        assert not torch.equal(estimated(z)[1], estimated(z)[1])
    assert abs(float(rows.mean()) - truth) < 4.5 * float(rows.std()) / 4000**0.5
    assert float(rows.std()) > 0.01
    guessed = Flow(ParticleNormal.isotropic(4, 2), estimated)
    samples = importance_sample(guessed, Gaussian(torch.zeros(4, 2), covariance=torch.eye(8)), n=10, generator=seeded(), progress=False)
    with pytest.raises(InexactDensityError, match="only estimated"):
        samples.require_exact()
    with pytest.raises(InputError, match="exact divergence"):
        measure_log_det_error(guessed, generator=seeded())


def test_the_error_of_the_density_is_measured_and_falls_with_the_order() -> None:
    errors = [measure_log_det_error(flow(n), n=64, generator=seeded()) for n in (24, 48)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.7)


def test_the_error_travels_with_the_weights_it_was_measured_for() -> None:
    measured = flow()
    assert measured.log_det_error is None
    error = measure_log_det_error(measured, n=16, generator=seeded())
    assert measured.log_det_error == error > 0
    again = flow()
    again.load_state_dict(copy.deepcopy(measured.state_dict()))
    assert again.log_det_error == error
    for solver in (FixedStep(20), FixedStep(10, "midpoint"), FixedStep(20, "heun2"), FixedStep(10, late=True)):
        other = Flow(again.base, again.transform.with_solver(solver))
        other.load_state_dict(copy.deepcopy(measured.state_dict()))
        assert other.log_det_error is None
    with torch.no_grad():
        again.transform.field.layers[0].force += 0.01
    assert again.log_det_error is None
    assert measured.transform.with_solver(FixedStep(3)).log_det_error is None


def test_the_error_is_that_of_data_too() -> None:
    far = 6.0 * noise(3, 4, 2)
    errors = [measure_log_det_error(flow(4), n=16, data=data, generator=seeded()) for data in (None, far)]
    assert errors[1] > errors[0]


class NoDivergence(Linear):
    """A velocity whose divergence is not a number."""

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, x), torch.full((len(x),), math.nan, dtype=x.dtype)


def test_densities_that_are_no_number_are_no_densities() -> None:
    with pytest.raises(SolverError, match="no longer finite"):
        ContinuousTransform(NoDivergence(), FixedStep(2))(noise(3, 1, 3))
    for error in (math.nan, None, 0.011):
        with pytest.raises(InexactDensityError):
            require_exact_density(error)
    require_exact_density(0.009)


def test_rough_solvers_are_refused_by_reweighting() -> None:
    rough = flow(1)
    assert measure_log_det_error(rough, n=64, generator=seeded()) > 0.01
    samples = importance_sample(rough, Gaussian(torch.zeros(4, 2), covariance=torch.eye(8)), n=10, generator=seeded(), progress=False)
    with pytest.raises(InexactDensityError, match="nats only"):
        samples.require_exact()


def test_adaptive_solvers_train_and_are_refused_by_reweighting() -> None:
    fixed, z = ContinuousTransform(embedded().requires_grad_(False), FixedStep(80)), noise(6, 4, 2)
    adaptive, expected = fixed.with_solver(Adaptive(1e-7, 1e-7)), fixed(z)
    for got, wanted in zip(adaptive(z), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    loose, tight = (
        float((fixed.with_solver(Adaptive(tolerance, tolerance))(z)[1] - expected[1]).abs().max()) for tolerance in (1e-3, 1e-6)
    )
    assert loose > 30 * tight
    assert adaptive.log_det_error is None
    rows = importance_sample(
        Flow(ParticleNormal.isotropic(4, 2), adaptive), Gaussian(torch.zeros(4, 2), covariance=torch.eye(8)), n=5, generator=seeded(),
        progress=False,
    )  # fmt: skip
    with pytest.raises(InexactDensityError, match="only estimated"):
        rows.require_exact()
    with pytest.raises(InputError, match="fixed steps"):
        measure_log_det_error(Flow(ParticleNormal.isotropic(4, 2), adaptive), generator=seeded())


@pytest.mark.parametrize("solver", [FixedStep(50), Adaptive(max_steps=60)])
def test_a_solver_that_does_not_converge_says_how_far_it_got(solver: FixedStep | Adaptive) -> None:
    with pytest.raises(SolverError, match=r"got as far as time 0\.\d+ of"):
        ContinuousTransform(BlowUp(), solver)(torch.ones(3, 1, 1, dtype=torch.float64))


def test_wrong_solvers_and_contexts_are_refused() -> None:
    with pytest.raises(InputError, match="one step or more"):
        FixedStep(0)
    with pytest.raises(InputError, match="rk4, heun2 or midpoint"):
        FixedStep(3, "euler")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not conditioned"):
        ContinuousTransform(embedded(), FixedStep(2))(noise(2, 4, 2), Context(temperature_kelvin=300.0))
