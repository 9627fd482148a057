"""Gradients of the objectives against closed forms for Gaussian flows on Gaussian targets, with their wrong twins."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from boltzgen.core import Context, Flow, Objective, Target
from boltzgen.errors import EnergyError, InputError, ShapeError, SolverError
from boltzgen.targets.analytic import DoubleWell, Gaussian
from boltzgen.targets.views import Regularised, Restricted
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import (
    ForwardKL,
    LogVariance,
    ReverseGradient,
    ReverseKL,
    WeightedSum,
    limited,
    path_gradient,
    score_gradient,
)
from tests.assertions import assert_z
from tests.registry import noise, seeded
from tests.test_fit import Affine, affine_flow

MEAN = torch.tensor([0.4, -0.8], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)
TARGET = Gaussian(MEAN, covariance=COVARIANCE)


def gaussian_flow(shift: Tensor, log_scale: Tensor) -> Flow:
    flow = affine_flow()
    with torch.no_grad():
        flow.transform.shift.copy_(shift)  # type: ignore[operator, union-attr]
        flow.transform.log_scale.copy_(log_scale)  # type: ignore[operator, union-attr]
    return flow


def off_target() -> Flow:
    return gaussian_flow(torch.tensor([0.9, -0.5]), torch.tensor([0.2, -0.6]))


def gradient_of(loss: Tensor, flow: Flow) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(flow.parameters()))])


def exact_reverse_kl(flow: Flow) -> Tensor:
    """E_q[ln q + u] of a diagonal Gaussian: ½ tr Σ⁻¹ D² + ½ (m − μ)ᵀ Σ⁻¹ (m − μ) − Σ ln D − ½ d ln 2πe."""
    affine: Affine = flow.transform  # type: ignore[assignment]
    deviation = affine.shift - MEAN
    variance = (2 * affine.log_scale).exp()
    energy = 0.5 * (TARGET.precision.diagonal() * variance).sum() + 0.5 * deviation @ TARGET.precision @ deviation
    return energy - affine.log_scale.sum() - math.log(2 * math.pi * math.e)


def exact_forward_kl(flow: Flow) -> Tensor:
    """E_p[−ln q] of a diagonal Gaussian: ½ Σ (Σ_ii + (m_i − μ_i)²)/D_i² + Σ ln D + ½ d ln 2π."""
    affine: Affine = flow.transform  # type: ignore[assignment]
    squares = COVARIANCE.diagonal() + (affine.shift - MEAN).square()
    return 0.5 * (squares / (2 * affine.log_scale).exp()).sum() + affine.log_scale.sum() + math.log(2 * math.pi)


def check_unbiased(objective: Objective, exact: Callable[[Flow], Tensor], *, repeats: int = 600, flow: Flow | None = None) -> None:
    """The objective's value and gradient agree with the exact ones on average."""
    flow, generator = flow or off_target(), seeded()
    rows = []
    for _ in range(repeats):
        loss, _ = objective(flow, generator=generator)
        rows.append(torch.cat([loss.detach()[None], gradient_of(loss, flow)]))
    estimates = torch.stack(rows)
    expected = exact(flow)
    errors = estimates.std(0) / math.sqrt(repeats)
    for estimate, value, error in zip(estimates.mean(0), [expected.detach(), *gradient_of(expected, flow)], errors, strict=True):
        assert_z(float(estimate), float(value), float(error))


def without_score(flow: Flow, target: Target, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mutant: the path gradient of the energy alone."""
    x, _ = flow.sample(n, generator=generator)
    log_w = -target.reduced_potential(x.detach()) - flow.log_prob(x.detach()).detach()
    surrogate = (target.value_and_grad(x)[1] * x).sum(1).mean()
    return surrogate - surrogate.detach() - log_w.mean(), log_w


def with_flipped_advantage(flow: Flow, target: Target, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mutant: the score gradient uphill."""
    loss, log_w = score_gradient(flow, target, n, generator)
    return 2 * loss.detach() - loss, log_w


def with_own_row_in_baseline(flow: Flow, target: Target, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mutant: the baseline is the mean over all rows, which shrinks the gradient by (n − 1)/n."""
    loss, log_w = score_gradient(flow, target, n, generator)
    return loss.detach() + (loss - loss.detach()) * (n - 1) / n, log_w


@pytest.mark.parametrize("gradient", [path_gradient, score_gradient])
def test_reverse_kl_is_unbiased(gradient: ReverseGradient) -> None:
    check_unbiased(ReverseKL(TARGET, batch_size=16, gradient=gradient), exact_reverse_kl)


def test_reverse_kl_uses_path_gradients_unless_told_otherwise() -> None:
    assert ReverseKL(TARGET, batch_size=4).gradient is path_gradient


@pytest.mark.parametrize(("mutant", "n"), [(without_score, 16), (with_flipped_advantage, 16), (with_own_row_in_baseline, 2)])
def test_biased_gradients_are_caught(mutant: ReverseGradient, n: int) -> None:
    with pytest.raises(AssertionError):
        check_unbiased(ReverseKL(TARGET, batch_size=n, gradient=mutant), exact_reverse_kl, repeats=600 if n > 2 else 1500)


def check_zero_variance(gradient: ReverseGradient) -> None:
    """At the optimum the gradient of every batch vanishes, not only its mean."""
    flow = gaussian_flow(MEAN, 0.5 * COVARIANCE.diagonal().log())
    target = Gaussian(MEAN, covariance=COVARIANCE.diagonal().diag())
    loss, log_w = gradient(flow, target, 8, seeded())
    torch.testing.assert_close(log_w, torch.full((8,), target.log_z, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(gradient_of(loss, flow).abs().max()) < 1e-12


def reparametrised_gradient(flow: Flow, target: Target, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The usual gradient through samples and densities: unbiased, but noisy at the optimum."""
    x, log_q = flow.sample(n, generator=generator)
    log_w = -target.reduced_potential(x) - log_q
    return -log_w.mean(), log_w.detach()


def test_path_gradients_have_no_variance_at_the_optimum() -> None:
    check_zero_variance(path_gradient)


def test_other_gradients_of_the_reverse_kl_do() -> None:
    """The score estimator's baseline removes the variance as well where ln w is constant; the reparametrised gradient stays noisy."""
    check_unbiased(ReverseKL(TARGET, batch_size=16, gradient=reparametrised_gradient), exact_reverse_kl)
    with pytest.raises(AssertionError):
        check_zero_variance(reparametrised_gradient)


def test_path_gradients_are_quieter_near_the_optimum() -> None:
    target = Gaussian(MEAN, covariance=COVARIANCE.diagonal().diag())
    flow = gaussian_flow(MEAN + 0.01, 0.5 * COVARIANCE.diagonal().log())
    generator = seeded()

    def spread(gradient: ReverseGradient) -> float:
        return float(torch.stack([gradient_of(gradient(flow, target, 16, generator)[0], flow) for _ in range(50)]).std(0).max())

    assert spread(path_gradient) < 0.2 * spread(reparametrised_gradient)


def test_parameters_still_learn_after_a_path_gradient() -> None:
    flow = off_target()
    path_gradient(flow, TARGET, 4, seeded())
    assert all(parameter.requires_grad for parameter in flow.parameters())


def test_outliers_of_a_batch_are_shortened_and_the_rest_is_kept() -> None:
    gradient = torch.tensor([[1.0, 0.0], [0.0, -2.0], [3.0, 4.0], [300.0, -400.0], [0.0, 0.0]], dtype=torch.float64)
    short = limited(gradient, 5.0)
    assert torch.equal(short[[0, 1, 2, 4]], gradient[[0, 1, 2, 4]])
    torch.testing.assert_close(short[3], torch.tensor([6.0, -8.0], dtype=torch.float64))
    assert limited(gradient, None) is gradient


DATA = TARGET.sample(40_000, generator=seeded())
DATA_GRADIENT = TARGET.value_and_grad(DATA)[1]


def test_forward_kl_is_unbiased() -> None:
    check_unbiased(ForwardKL(DATA, batch_size=16), exact_forward_kl)


def test_forward_kl_with_forces_is_unbiased_and_has_no_variance_at_the_optimum() -> None:
    check_unbiased(ForwardKL(DATA, batch_size=16, u_gradient=DATA_GRADIENT), exact_forward_kl)
    with pytest.raises(AssertionError):
        check_unbiased(ForwardKL(DATA, batch_size=16, u_gradient=-DATA_GRADIENT), exact_forward_kl)
    target = Gaussian(MEAN, covariance=COVARIANCE.diagonal().diag())
    flow = gaussian_flow(MEAN, 0.5 * COVARIANCE.diagonal().log())
    x = noise(20, 2, scale=2.0)
    with_forces, _ = ForwardKL(x, batch_size=8, u_gradient=target.value_and_grad(x)[1])(flow, generator=seeded())
    assert float(gradient_of(with_forces, flow).abs().max()) < 1e-12
    without, _ = ForwardKL(x, batch_size=8)(flow, generator=seeded())
    assert float(gradient_of(without, flow).abs().max()) > 1e-2


def check_weighted(x: Tensor, log_w: Tensor | None, *, expected_weights: Tensor) -> None:
    """Batches drawn by weight give the weighted mean of −ln q."""
    flow, generator = off_target(), seeded()
    objective = ForwardKL(x, batch_size=64, log_w=log_w)
    with torch.no_grad():
        losses = torch.stack([objective(flow, generator=generator)[0] for _ in range(200)])
        exact = float(-(expected_weights * flow.log_prob(x)).sum())
    assert_z(float(losses.mean()), exact, float(losses.std() / math.sqrt(len(losses))))


def test_weighted_forward_kl_is_the_expectation_over_the_weights() -> None:
    x = noise(6, 2)
    log_w = torch.tensor([0.0, -1.0, 2.0, -math.inf, 1.0, -math.inf], dtype=torch.float64)
    check_weighted(x, log_w, expected_weights=log_w.softmax(0))
    check_weighted(x, log_w + 700.0, expected_weights=log_w.softmax(0))
    with pytest.raises(AssertionError):
        check_weighted(x, None, expected_weights=log_w.softmax(0))
    with pytest.raises(AssertionError):
        check_weighted(x, -log_w.clamp(min=-5.0), expected_weights=log_w.softmax(0))


def test_rows_of_weight_zero_are_never_drawn() -> None:
    x = torch.tensor([[math.nan], [1.0], [math.nan], [2.0], [math.nan]], dtype=torch.float64)
    log_w = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf], dtype=torch.float64)
    loss, _ = ForwardKL(x, batch_size=10_000, log_w=log_w)(affine_flow(1), generator=seeded())
    assert torch.isfinite(loss)


def test_wrong_data_are_refused() -> None:
    x = noise(6, 2)
    with pytest.raises(InputError, match="got none"):
        ForwardKL(x[:0], batch_size=4)
    with pytest.raises(ShapeError, match="one log weight for each of 6"):
        ForwardKL(x, batch_size=4, log_w=torch.zeros(5))


POINTS = noise(200, 2, scale=1.5)


class Uncentred(LogVariance):
    """Mutant: the constant between the log densities is not removed."""

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(self.x), (self.batch_size,), generator=generator)
        residual = flow.log_prob(self.x[rows]) - self.log_p[rows]
        return 0.5 * residual.square().mean(), {}


@pytest.mark.parametrize("kind", [LogVariance, Uncentred])
def test_log_variance_is_half_the_variance_over_the_given_points(kind: type[LogVariance]) -> None:
    log_p = -TARGET.reduced_potential(POINTS) + 100.0

    def exact(flow: Flow) -> Tensor:
        return 0.5 * (1 - 1 / 16) * (flow.log_prob(POINTS) - log_p).var(correction=0)  # a batch of 16 spends one mean

    objective = kind(POINTS, log_p, batch_size=16, limit=1e6)
    with contextlib.nullcontext() if kind is LogVariance else pytest.raises(AssertionError):
        check_unbiased(objective, exact)


class Differentiated(LogVariance):
    """Mutant: gradients go through the making of the flow's own samples."""

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        own, log_q = flow.sample(self.batch_size, generator=generator)
        residual = log_q + TARGET.reduced_potential(own)
        return 0.5 * (residual - residual.mean()).square().mean(), {}


@pytest.mark.parametrize("kind", [LogVariance, Differentiated])
def test_log_variance_of_own_samples_has_the_gradient_of_the_reverse_kl(kind: type[LogVariance]) -> None:
    """Richter et al., NeurIPS 2020, proposition 1. Its value is ½ Var_z(½ zᵀAz + bᵀz) with A = DPD − 1 and b = DP(m − μ)."""
    objective = kind(POINTS[:0], POINTS.new_zeros(0), batch_size=16, limit=1e6, target=TARGET)

    def exact(flow: Flow) -> Tensor:
        kl = exact_reverse_kl(flow)
        affine: Affine = flow.transform  # type: ignore[assignment]
        d = affine.log_scale.detach().exp().diag()
        a, b = d @ TARGET.precision @ d - torch.eye(2), d @ TARGET.precision @ (affine.shift.detach() - MEAN)
        return (1 - 1 / 16) * (0.25 * a.square().sum() + 0.5 * b.square().sum() + kl - kl.detach())

    with contextlib.nullcontext() if kind is LogVariance else pytest.raises(AssertionError):
        check_unbiased(objective, exact)


class Forgiving(LogVariance):
    """Mutant: own samples that the target forbids are left out, so that losing probability to them costs nothing."""

    def _points(self, flow: Flow, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, log_p = super()._points(flow, generator)
        return x[torch.isfinite(log_p)], log_p[torch.isfinite(log_p)]


@pytest.mark.parametrize("kind", [LogVariance, Forgiving])
def test_half_of_the_points_of_the_log_variance_are_own_samples(kind: type[LogVariance]) -> None:
    """Own samples follow the data's rows; where the target forbids them their residual is the limit."""
    log_p, target, limit = -TARGET.reduced_potential(POINTS), Restricted(TARGET, lambda x: x[:, 0] < 1.5), 50.0
    objective, flow, same = kind(POINTS, log_p, batch_size=40, limit=limit, target=target), off_target(), seeded()
    with torch.no_grad():
        value = float(objective(flow, generator=seeded())[0])
        rows = torch.randint(len(POINTS), (20,), generator=same)
        x = torch.cat([POINTS[rows], flow.sample(20, generator=same)[0]])
        residual = flow.log_prob(x) + TARGET.reduced_potential(x)
    forbidden = torch.cat([torch.zeros(20, dtype=torch.bool), x[20:, 0] >= 1.5])
    residual = residual - residual[~forbidden].median()
    residual[forbidden] = limit
    assert 0 < int(forbidden.sum()) < 20
    agrees = value == pytest.approx(0.5 * float(residual.var(correction=0)), abs=1e-12)
    assert agrees == (kind is LogVariance)


def test_log_variance_of_forbidden_samples_alone_is_an_error() -> None:
    target = Restricted(TARGET, lambda x: x[:, 0] > 1e3)
    with pytest.raises(EnergyError, match="all 8 samples of the flow have infinite energy"):
        LogVariance(POINTS[:0], POINTS.new_zeros(0), batch_size=8, target=target)(off_target(), generator=seeded())


def test_log_variance_finds_the_density_from_points_elsewhere() -> None:
    """Points of another distribution, one without finite log density among them; at the optimum every batch has a zero gradient."""
    target = Gaussian(MEAN, covariance=COVARIANCE.diagonal().diag())
    log_p = -target.reduced_potential(POINTS)
    log_p[3] = -math.inf
    objective = LogVariance(POINTS, log_p, batch_size=32)
    flow = off_target()
    settings = FitSettings(steps=800, learning_rate=0.05, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=1000, evaluate_every=800)
    fit(flow, objective, settings=settings, generator=seeded(), progress=False)
    torch.testing.assert_close(flow.transform.shift.detach(), MEAN, atol=1e-4, rtol=0)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(
        (2 * flow.transform.log_scale).exp().detach(),  # type: ignore[operator, union-attr]
        COVARIANCE.diagonal(),
        atol=1e-4,
        rtol=0,
    )


def test_log_variance_refuses_points_without_densities() -> None:
    with pytest.raises(ShapeError, match="one log density for each of 200"):
        LogVariance(POINTS, torch.zeros(5), batch_size=4)
    with pytest.raises(InputError, match="finite log density, got none"):
        LogVariance(POINTS, torch.full((200,), -math.inf), batch_size=4)


def test_a_weighted_sum_adds_values_and_gradients() -> None:
    flow = off_target()
    forward, reverse = ForwardKL(DATA, batch_size=8), ReverseKL(TARGET, batch_size=8)
    loss, numbers = WeightedSum((0.3, forward), (2.0, reverse))(flow, generator=seeded())
    generator = seeded()
    parts = [(weight, *objective(flow, generator=generator)) for weight, objective in ((0.3, forward), (2.0, reverse))]
    torch.testing.assert_close(loss, sum(weight * part for weight, part, _ in parts))
    expected = sum(weight * gradient_of(part, flow) for weight, part, _ in parts)
    torch.testing.assert_close(gradient_of(loss, flow), expected)
    assert numbers == {**parts[0][2], **parts[1][2]}
    assert set(numbers) == {"forward_kl", "reverse_kl", "ess"}


def test_the_reported_effective_sample_size_is_one_for_a_perfect_flow() -> None:
    flow = gaussian_flow(MEAN, 0.5 * COVARIANCE.diagonal().log())
    _, numbers = ReverseKL(Gaussian(MEAN, covariance=COVARIANCE.diagonal().diag()), batch_size=32)(flow, generator=seeded())
    assert numbers["ess"] == pytest.approx(1.0)
    _, poor = ReverseKL(TARGET, batch_size=32)(off_target(), generator=seeded())
    assert 1 / 32 <= poor["ess"] < 0.95


@pytest.mark.parametrize("gradient", [path_gradient, score_gradient])
def test_a_regularised_target_trains_where_the_raw_one_has_infinite_energies(gradient: ReverseGradient) -> None:
    """A narrow well behind a wall of infinite energy, from a flow that starts outside: only the flattened energies are finite."""
    raw = Restricted(DoubleWell(1, barrier=40.0, tilt=60.0, width=0.5), lambda x: x[:, 0] > -2.0)
    flow = affine_flow(1)
    with torch.no_grad():
        flow.transform.log_scale.fill_(0.3)  # type: ignore[operator, union-attr]
    loss, _ = ReverseKL(raw, batch_size=64, gradient=gradient)(flow, generator=seeded())
    assert not math.isfinite(float(loss.detach()))
    objective = ReverseKL(Regularised(raw, u_cut=1000.0, u_max=2000.0), batch_size=64, gradient=gradient)
    settings = FitSettings(steps=300, learning_rate=0.05, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=1000, evaluate_every=100)
    result = fit(flow, objective, settings=settings, generator=seeded(), progress=False)
    assert result.skipped == 0
    with torch.no_grad():
        x, log_q = flow.sample(2000, generator=seeded())
    log_w = -raw.reduced_potential(x) - log_q
    assert float(log_w.logsumexp(0) * 2 - (2 * log_w).logsumexp(0)) > math.log(0.8 * 2000)


class FailsFarOut(Affine):
    """It cannot be undone where a coordinate is above two, and says so of the first such row only."""

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        far = torch.nonzero((x > 2).any(dim=1)).flatten().tolist()
        if far:
            raise SolverError("too far", rows=far[:1])
        return super().inverse(x, context)


@pytest.mark.parametrize("gradient", [path_gradient, score_gradient])
def test_rows_that_the_solver_cannot_lead_back_are_left_out_of_a_step(gradient: ReverseGradient) -> None:
    flow = off_target()
    wrong = Flow(flow.base, FailsFarOut(2))
    wrong.load_state_dict(flow.state_dict())
    near, far = torch.tensor([[0.3, -0.4]], dtype=torch.float64), torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    x = torch.cat([near, far]).repeat(10, 1)
    u, forces = TARGET.value_and_grad(x)
    for settings in ({"u_gradient": forces}, {}):
        loss, _ = ForwardKL(x, batch_size=8, **settings)(wrong, generator=seeded())
        right, _ = ForwardKL(near, batch_size=8, **{key: forces[:1] for key in settings})(flow, generator=seeded())
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(gradient_of(loss, wrong), gradient_of(right, flow))
    assert LogVariance(x, -u, batch_size=16)(flow, generator=seeded())[1]["log_variance"] > 0.1
    assert LogVariance(x, -u, batch_size=16)(wrong, generator=seeded())[1]["log_variance"] == pytest.approx(0.0, abs=1e-12)
    loss, log_w = gradient(wrong, TARGET, 200, seeded())
    with torch.no_grad():
        own = flow.sample(200, generator=seeded())[0]
        kept = ~(own > 2).any(dim=1)
        assert 10 < int(kept.sum()) < 190
        torch.testing.assert_close(log_w, -TARGET.reduced_potential(own[kept]) - flow.log_prob(own[kept]))
    assert torch.isfinite(gradient_of(loss, wrong)).all()
    with pytest.raises(SolverError, match="too far"):
        ForwardKL(far, batch_size=8)(wrong, generator=seeded())
