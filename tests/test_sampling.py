"""Importance sampling and independence chains against analytic answers; biased twins must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from boltzgen.config import EvaluationConfig
from boltzgen.core import Context, Distribution, Flow, Move, MoveInfo, Target, Transform, WalkerState, WeightedSamples
from boltzgen.errors import EnergyError, InexactDensityError, InputError, ShapeError, SolverError, TrainingDataError, WeightsError
from boltzgen.estimators.reweighting import free_energy_difference, log_z, mean
from boltzgen.estimators.weights import effective_sample_size, forward_effective_sample_size
from boltzgen.mixtures import Flat
from boltzgen.paths import Restraint, Schedule
from boltzgen.sampling.chains import IndependenceMetropolis, acceptance, run_chain
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo
from boltzgen.sampling.importance import importance_sample, log_ratios, resample
from boltzgen.sampling.solute import SoluteMove
from boltzgen.sampling.steered import FreePaths, SteeredMove
from boltzgen.sampling.steering import TargetSteering
from boltzgen.targets.analytic import DoubleWell, Gaussian
from boltzgen.targets.views import Regularised, Restricted
from boltzgen.workflows.analysis import judge
from tests.assertions import assert_z

DIMENSIONS = 2


class StandardNormal(Distribution):
    """The base of the flows tested here."""

    event_shape = (DIMENSIONS,)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, DIMENSIONS, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return -0.5 * (x**2).sum(1) - 0.5 * DIMENSIONS * math.log(2 * math.pi)


class Scaling(Transform):
    """x = s z; the mutant forgets the Jacobian."""

    def __init__(self, scale: float, *, drop_log_det: bool = False) -> None:
        super().__init__()
        self.scale, self.drop_log_det = scale, drop_log_det

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        log_det = 0.0 if self.drop_log_det else DIMENSIONS * math.log(self.scale)
        return z * self.scale, torch.full((len(z),), log_det, dtype=torch.float64)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return x / self.scale, -self.forward(x, context)[1]


def scaled_flow(scale: float, *, drop_log_det: bool = False) -> Flow:
    return Flow(StandardNormal(), Scaling(scale, drop_log_det=drop_log_det))


def correlated_target() -> Gaussian:
    return Gaussian(torch.tensor([0.3, -0.2]), covariance=torch.tensor([[1.0, 0.5], [0.5, 0.8]]))


class Constant(Target):
    """A target with one given energy where x₁ > 0, as a broken engine may return."""

    event_shape = (DIMENSIONS,)

    def __init__(self, value: float) -> None:
        self.value = value

    def reduced_potential(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, self.value, 1.0).to(torch.float64)


# ---------------------------------------------------------------- importance sampling


def check_importance(flow: Flow) -> None:
    target = correlated_target()
    samples = importance_sample(flow, target, n=20_000, batch_size=3000, generator=torch.Generator().manual_seed(1), progress=False)
    normalisation = log_z(samples, seed=0)
    assert_z(normalisation.value, target.log_z, normalisation.stderr)
    first = mean(samples, samples.x[:, 0], seed=0)
    assert_z(first.value, 0.3, first.stderr)


def test_importance_sampling_finds_the_known_normalisation() -> None:
    check_importance(scaled_flow(1.4))
    with pytest.raises(AssertionError):
        check_importance(scaled_flow(1.4, drop_log_det=True))


def test_importance_samples_are_labelled(generator: torch.Generator) -> None:
    flow, target = scaled_flow(1.4), correlated_target()
    samples = importance_sample(flow, target, n=25, batch_size=10, generator=generator, progress=False, role="train")
    assert samples.block.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert samples.role == "train"
    assert torch.equal(samples.u, target.reduced_potential(samples.x))
    torch.testing.assert_close(samples.log_q, flow.log_prob(samples.x))
    assert torch.equal(samples.log_w, -samples.u - samples.log_q)
    flow.transform.log_det_error = 0.3
    altered = Regularised(target, u_cut=5.0, u_max=9.0)
    samples = importance_sample(flow, altered, n=5, generator=generator, progress=False)
    assert samples.log_det_error == 0.3
    assert not samples.is_exact


def test_forbidden_regions_have_weight_zero_and_only_they(generator: torch.Generator) -> None:
    whole = correlated_target()
    half = Restricted(whole, lambda x: x[:, 0] > 0.3)
    samples = importance_sample(scaled_flow(1.4), half, n=20_000, generator=generator, progress=False)
    assert torch.equal(torch.isneginf(samples.log_w), samples.x[:, 0] <= 0.3)
    normalisation = log_z(samples, seed=0)
    assert_z(normalisation.value, whole.log_z - math.log(2), normalisation.stderr)


def test_energies_that_are_no_numbers_are_named(generator: torch.Generator) -> None:
    with pytest.raises(EnergyError, match="in rows"):
        importance_sample(scaled_flow(1.0), Constant(math.nan), n=100, generator=generator, progress=False)
    with pytest.raises(EnergyError, match="-inf"):
        importance_sample(scaled_flow(1.0), Constant(-math.inf), n=100, generator=generator, progress=False)
    with pytest.raises(ShapeError, match="must agree"):
        importance_sample(scaled_flow(1.0), DoubleWell(1), n=100, generator=generator, progress=False)
    with pytest.raises(InputError, match="positive"):
        importance_sample(scaled_flow(1.0), Constant(1.0), n=0, generator=generator, progress=False)


def test_log_ratios_give_the_forward_ess(generator: torch.Generator) -> None:
    flow, target = scaled_flow(1.4), correlated_target()
    x = target.sample(20_000, generator=generator)
    forward = forward_effective_sample_size(log_ratios(flow, x, target.reduced_potential(x), batch_size=999))
    reverse = effective_sample_size(importance_sample(flow, target, n=20_000, generator=generator, progress=False))
    assert forward == pytest.approx(reverse, abs=0.02)
    with pytest.raises(EnergyError, match=r"rows \[2\]"):
        log_ratios(flow, x[:3], torch.tensor([0.0, 0.0, math.nan]), batch_size=10)
    with pytest.raises(ShapeError, match="one energy per"):
        log_ratios(flow, x[:3], torch.zeros(2), batch_size=10)
    flow.transform.log_det_error = None
    with pytest.raises(InexactDensityError, match="only estimated"):
        log_ratios(flow, x[:3], torch.zeros(3), batch_size=10)


def test_a_ratio_of_nothing_to_nothing_is_refused() -> None:
    """No density and infinite energy: p/q is no number, which is not the same as one that a solver cannot tell."""

    class Nowhere(StandardNormal):
        def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
            return super().log_prob(x).masked_fill(x[:, 0] > 0, -math.inf)

    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert log_ratios(Nowhere(), x, torch.zeros(2))[1] == math.inf
    with pytest.raises(EnergyError, match=r"not a number in rows \[1\]"):
        log_ratios(Nowhere(), x, torch.tensor([0.0, math.inf]))


class FailsFarOut(StandardNormal):
    """Its solver fails where rows are far out, and names three of them; ``broken``, it gives a NaN there instead."""

    broken = False

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        far = (x.abs() > 2).any(dim=1)
        if bool(far.any()) and not self.broken:
            raise SolverError("too far", rows=torch.nonzero(far).flatten()[:3].tolist())
        return super().log_prob(x).masked_fill(far, math.nan)


def test_rows_whose_density_a_solver_cannot_tell_judge_nothing(generator: torch.Generator) -> None:
    flow, x = FailsFarOut(), 1.2 * torch.randn(60, DIMENSIONS, generator=generator, dtype=torch.float64)
    far = (x.abs() > 2).any(dim=1)
    ratios = log_ratios(flow, x, torch.zeros(60), batch_size=25)
    assert 0 < int(far.sum()) < 30
    assert torch.equal(torch.isnan(ratios), far)
    torch.testing.assert_close(ratios[~far], -StandardNormal().log_prob(x[~far]))
    samples = importance_sample(
        StandardNormal(), Gaussian(torch.zeros(2), covariance=torch.eye(2)), n=500, generator=generator, progress=False
    )
    judged = judge(samples, ratios, settings=EvaluationConfig(), seed=1)
    assert judged.diagnostics["held_out_rows"] == int((~far).sum())
    assert any(f"not known at {int(far.sum())} of 60" in reason for reason in judged.verdict.reasons)
    flow.broken = True
    with pytest.raises(EnergyError, match="the flow is broken there"):
        log_ratios(flow, x, torch.zeros(60))


def weighted(log_w: Tensor) -> WeightedSamples:
    rows = torch.arange(len(log_w))
    return WeightedSamples(x=rows[:, None].double(), u=-log_w, log_w=log_w, log_q=0 * rows.double(), block=rows, chain=rows, role="train")


def test_systematic_resampling_draws_in_proportion(generator: torch.Generator) -> None:
    probabilities = torch.tensor([0.0, 0.305, 0.0, 0.6, 0.095, 0.0], dtype=torch.float64)
    rows = resample(weighted(probabilities.log()), 100, generator=generator)
    counts = torch.bincount(rows, minlength=6)
    assert ((counts - 100 * probabilities).abs() < 1).all()
    assert counts[probabilities == 0].sum() == 0
    average = torch.stack(
        [torch.bincount(resample(weighted(probabilities.log()), 10, generator=generator), minlength=6) for _ in range(2000)]
    )
    frequency = average.double().mean(0) / 10
    for row in (1, 3, 4):
        spread = float(average[:, row].double().std()) / 10 / math.sqrt(2000)
        assert_z(float(frequency[row]), float(probabilities[row]), max(spread, 1e-9))
    with pytest.raises(WeightsError, match="all 3 weights are zero"):
        resample(weighted(torch.full((3,), -math.inf)), 10, generator=generator)


# ---------------------------------------------------------------- moves: stationarity from exact samples


class AcceptsAlways(IndependenceMetropolis):
    """Biased twin: samples the flow."""

    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[WalkerState, MoveInfo]:
        info = super().step(state, generator=generator)[1]
        x, log_q = self.flow.sample(len(state.x), generator=generator)
        return WalkerState(x=x, u=self.target.reduced_potential(x), log_q=log_q), replace(info, accepted=torch.ones(len(x), dtype=bool))


class InvertedRatio(IndependenceMetropolis):
    """Biased twin: accepts with w(x)/w(x')."""

    def _evaluate(self, x: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
        u, log_q = super()._evaluate(x, log_prob)
        return -u, -log_q


class ForgetsProposalDensity(IndependenceMetropolis):
    """Biased twin: accepts with p(x')/p(x)."""

    def _evaluate(self, x: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
        u, log_q = super()._evaluate(x, log_prob)
        return u, torch.zeros_like(log_q)


MOVES: dict[str, Callable[[], tuple[Move, Gaussian]]] = {
    "IndependenceMetropolis": lambda: (IndependenceMetropolis(scaled_flow(1.4), correlated_target()), correlated_target()),
    "HamiltonianMonteCarlo": lambda: (HamiltonianMonteCarlo(correlated_target(), step_size=0.8, n_leapfrog=3), correlated_target()),
    "FreePaths": lambda: (FreePaths(steering(), n_steps=3), correlated_target()),
    "SteeredMove": lambda: (SteeredMove(steering(), Flat([-4.0], [6.0]), schedule=Schedule(5)), correlated_target()),
}
#: A solute's move needs atoms: it is checked in test_solute.py.
CHECKED_ELSEWHERE = {SoluteMove.__name__}


def steering() -> TargetSteering:
    """Steering along the first coordinate, with friction and a long step."""
    return TargetSteering(correlated_target(), lambda x: x[:, :1], Restraint([4.0], (None,)), step_size=0.4, friction=1.0)


def check_stationarity(move: Move, target: Gaussian, *, n: int = 20_000, steps: int = 5) -> None:
    """Walkers that start as exact samples keep their moments, and they move."""
    generator = torch.Generator().manual_seed(11)
    state = move.init(target.sample(n, generator=generator))
    start = state.x.clone()
    for _ in range(steps):
        state, info = move.step(state, generator=generator)
        assert info.accepted.shape == info.log_ratio.shape == (n,)
    assert (state.x != start).any(1).double().mean() > 0.5
    torch.testing.assert_close(state.u, target.reduced_potential(state.x))
    covariance = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)
    deviation = state.x - target.mean
    for i in range(2):
        assert_z(float(deviation[:, i].mean()), 0.0, float(deviation[:, i].std()) / math.sqrt(n))
        for j in range(i, 2):
            product = deviation[:, i] * deviation[:, j]
            assert_z(float(product.mean()), float(covariance[i, j]), float(product.std()) / math.sqrt(n))


@pytest.mark.parametrize("name", MOVES)
def test_moves_leave_their_target_invariant(name: str) -> None:
    check_stationarity(*MOVES[name]())


@pytest.mark.parametrize("twin", [AcceptsAlways, InvertedRatio, ForgetsProposalDensity])
def test_biased_twins_are_caught(twin: type[IndependenceMetropolis]) -> None:
    with pytest.raises(AssertionError):
        check_stationarity(twin(scaled_flow(1.4), correlated_target()), correlated_target())


def test_every_move_of_the_package_is_checked() -> None:
    defined = {cls.__name__ for cls in Move.__subclasses__() if cls.__module__.startswith("boltzgen.")}
    assert defined <= set(MOVES) | CHECKED_ELSEWHERE


def test_walkers_never_enter_a_forbidden_region(generator: torch.Generator) -> None:
    target = Restricted(correlated_target(), lambda x: x[:, 0] > 0)
    move = IndependenceMetropolis(scaled_flow(1.4), target)
    state = move.init(torch.ones(500, 2, dtype=torch.float64))
    for _ in range(10):
        state, _ = move.step(state, generator=generator)
    assert (state.x[:, 0] > 0).all()
    with pytest.raises(InputError, match=r"walkers \[1\]"):
        move.init(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))


def test_chains_refuse_what_is_not_exact() -> None:
    flow = scaled_flow(1.4)
    with pytest.raises(InexactDensityError, match="regularised"):
        IndependenceMetropolis(flow, Regularised(correlated_target(), u_cut=1.0, u_max=2.0))
    flow.transform.log_det_error = None
    with pytest.raises(InexactDensityError, match="only estimated"):
        IndependenceMetropolis(flow, correlated_target())


# ---------------------------------------------------------------- chains over samples already drawn


def check_chain(samples: WeightedSamples, target: DoubleWell) -> None:
    chain = run_chain(samples, generator=torch.Generator().manual_seed(2))
    x = chain.x[:, 0]
    difference = free_energy_difference(chain, x < 0, x > 0, name="wells", seed=0)
    assert_z(difference.value, target.free_energy_difference, difference.stderr)
    second = mean(chain, chain.x[:, 1] ** 2, seed=0)
    assert_z(second.value, 1.0, second.stderr)


def test_a_chain_over_flow_samples_is_exact(generator: torch.Generator) -> None:
    target = DoubleWell(2)
    samples = importance_sample(scaled_flow(1.2), target, n=30_000, generator=generator, progress=False)
    check_chain(samples, target)
    chain = run_chain(samples, generator=generator)
    assert len(chain) == 27_000
    assert chain.log_q is None
    assert chain.block.unique().tolist() == list(range(20))
    assert 0.2 < acceptance(chain) < 0.9
    with pytest.raises(AssertionError):
        check_chain(replace(samples, log_w=0 * samples.log_w), target)
    with pytest.raises(AssertionError):
        check_chain(replace(samples, log_w=-samples.log_w), target)
    with pytest.raises(AssertionError):
        check_chain(replace(samples, log_w=-samples.u), target)


def test_a_chain_accepts_all_of_a_perfect_flow_and_none_of_zero_weight(generator: torch.Generator) -> None:
    target = Gaussian(torch.zeros(2), covariance=1.44 * torch.eye(2))
    samples = importance_sample(scaled_flow(1.2), target, n=100, generator=generator, progress=False)
    assert acceptance(run_chain(samples, generator=generator, discard=0.0)) == 1.0
    log_w = samples.log_w.clone()
    log_w[:50] = -math.inf
    chain = run_chain(replace(samples, log_w=log_w), generator=generator, discard=0.0)
    assert not torch.isin(chain.x[:, 0], samples.x[:50, 0]).any()


def test_chains_refuse_what_they_cannot_use(generator: torch.Generator) -> None:
    samples = importance_sample(scaled_flow(1.2), correlated_target(), n=100, generator=generator, progress=False)
    with pytest.raises(TrainingDataError):
        run_chain(replace(samples, role="train"), generator=generator)
    with pytest.raises(InexactDensityError):
        run_chain(replace(samples, is_exact=False), generator=generator)
    with pytest.raises(InputError, match="importance_sample"):
        run_chain(replace(samples, log_q=None), generator=generator)
    with pytest.raises(InputError, match="at least 40 rows"):
        run_chain(samples[:10], generator=generator)
