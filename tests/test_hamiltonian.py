"""Hamiltonian Monte Carlo: stationarity from exact samples with mutant twins, the integrator, walls, tuning, and recorded walkers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.core import MoveInfo, Target, WalkerState
from boltzgen.errors import EnergyError, InexactDensityError, InputError, ShapeError
from boltzgen.estimators.reweighting import mean
from boltzgen.estimators.timeseries import statistical_inefficiency
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo, MovingWalkers, relaxed, sample_walkers, tuned_step_size
from boltzgen.targets.analytic import DoubleWell, Gaussian
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster, LennardJonesCluster
from boltzgen.targets.views import Regularised, Restricted
from tests.assertions import assert_z
from tests.registry import noise
from tests.test_sampling import check_stationarity, correlated_target


class AcceptsAlways(HamiltonianMonteCarlo):
    """Biased twin: takes every proposal."""

    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[MovingWalkers, MoveInfo]:
        start = state if isinstance(state, MovingWalkers) else self.init(state.x)
        v = torch.randn(start.x.shape, generator=generator, dtype=start.x.dtype)
        end, _ = self.trajectory(start, v, step_sizes=torch.full_like(start.u, self.step_size))
        ones = torch.ones(len(start.u), dtype=torch.bool)
        return end, MoveInfo(accepted=ones, log_ratio=torch.zeros_like(start.u))


class WrongKineticSign(HamiltonianMonteCarlo):
    """Biased twin: the sign of the kinetic energy is wrong, H = u − ½ |v|²."""

    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[MovingWalkers, MoveInfo]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("boltzgen.sampling.hamiltonian._kinetic_energy", lambda v: -0.5 * v.square().flatten(1).sum(1))
            return super().step(state, generator=generator)


class ForgetsKineticEnergy(HamiltonianMonteCarlo):
    """Biased twin: accepts with the ratio of densities alone."""

    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[MovingWalkers, MoveInfo]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("boltzgen.sampling.hamiltonian._kinetic_energy", lambda v: torch.zeros(len(v), dtype=v.dtype))
            return super().step(state, generator=generator)


class EndsWithAFullStep(HamiltonianMonteCarlo):
    """Biased twin: no half step at the end, so the trajectory is not reversible."""

    def trajectory(self, start: MovingWalkers, v: Tensor, *, step_sizes: Tensor) -> tuple[MovingWalkers, Tensor]:
        end, v = super().trajectory(start, v, step_sizes=step_sizes)
        return end, v - 0.5 * step_sizes.reshape(-1, *[1] * (v.ndim - 1)) * end.gradient


MUTANTS = [AcceptsAlways, WrongKineticSign, ForgetsKineticEnergy, EndsWithAFullStep]

# ---------------------------------------------------------------- stationarity


def test_a_gaussian_stays_what_it_is() -> None:
    check_stationarity(HamiltonianMonteCarlo(correlated_target(), step_size=0.8, n_leapfrog=3), correlated_target())


@pytest.mark.parametrize("twin", MUTANTS)
def test_biased_twins_are_caught_on_a_gaussian(twin: type[HamiltonianMonteCarlo]) -> None:
    with pytest.raises(AssertionError):
        check_stationarity(twin(correlated_target(), step_size=0.8, n_leapfrog=3), correlated_target())


def check_wells(kind: type[HamiltonianMonteCarlo]) -> None:
    """Walkers that start as exact samples keep energy, occupation and shape of both wells."""
    target, n = DoubleWell(2, barrier=3.0), 20_000
    generator = torch.Generator().manual_seed(5)
    move = kind(target, step_size=0.35, n_leapfrog=5)
    start = target.sample(n, generator=generator)
    state: WalkerState = move.init(start)
    fresh = target.sample(200_000, generator=generator)
    for _ in range(10):
        state, info = move.step(state, generator=generator)
    assert 0.3 < float(info.log_ratio.clamp(max=0).exp().mean()) < 0.97
    assert ((state.x[:, 0] > 0) != (start[:, 0] > 0)).double().mean() > 0.05
    torch.testing.assert_close(state.u, target.reduced_potential(state.x))
    right = 1 / (1 + math.exp(target.free_energy_difference))
    inside = (state.x[:, 0] > 0).double()
    assert_z(float(inside.mean()), right, math.sqrt(right * (1 - right) / n))
    for now, exact in ((state.u, target.reduced_potential(fresh)), (state.x[:, 0] ** 2, fresh[:, 0] ** 2), (state.x[:, 1] ** 2, None)):
        expected, spread = (1.0, 0.0) if exact is None else (float(exact.mean()), float(exact.std()) / math.sqrt(len(exact)))
        assert_z(float(now.mean()), expected, math.hypot(float(now.std()) / math.sqrt(n), spread))


def test_double_wells_stay_what_they_are() -> None:
    check_wells(HamiltonianMonteCarlo)


@pytest.mark.parametrize("twin", MUTANTS)
def test_biased_twins_are_caught_on_double_wells(twin: type[HamiltonianMonteCarlo]) -> None:
    with pytest.raises(AssertionError):
        check_wells(twin)


def test_walls_keep_half_a_gaussian(generator: torch.Generator) -> None:
    """A trajectory that leaves the region is rejected: E[x₁ | x₁ > 0] = √(2/π)."""
    target = Restricted(Gaussian(torch.zeros(2), covariance=torch.eye(2)), lambda x: x[:, 0] > 0)
    move, n = HamiltonianMonteCarlo(target, step_size=0.5, n_leapfrog=3), 20_000
    start = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    start[:, 0].abs_()
    state: WalkerState = move.init(start)
    for _ in range(10):
        state, info = move.step(state, generator=generator)
        assert not info.accepted[torch.isneginf(info.log_ratio)].any()
    assert torch.isneginf(info.log_ratio).any()
    assert (state.x[:, 0] > 0).all()
    assert_z(float(state.x[:, 0].mean()), math.sqrt(2 / math.pi), math.sqrt((1 - 2 / math.pi) / n))
    assert_z(float(state.x[:, 0].square().mean()), 1.0, math.sqrt(2 / n))


class Harmonic(Target):
    """u = ½ κ Σ|x_i − x̄|² + ½ κ' |x̄|² n: Gaussian on the mean-free subspace, whatever κ' is."""

    event_shape = (4, 2)

    def __init__(self, centre: float) -> None:
        self.centre = centre

    def reduced_potential(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return 0.5 * 3.0 * (x - mean).square().sum((1, 2)) + 0.5 * self.centre * 4 * mean.square().sum((1, 2))


class DriftingCentre(HamiltonianMonteCarlo):
    """Biased twin: the centre moves on the way and is put back, with the energy it had there."""

    def trajectory(self, start: MovingWalkers, v: Tensor, *, step_sizes: Tensor) -> tuple[MovingWalkers, Tensor]:
        return super().trajectory(start, v + 0.1, step_sizes=step_sizes)


def check_mean_free(kind: type[HamiltonianMonteCarlo], centre: float) -> None:
    """Σ|x|² of κ = 3 in 6 dimensions has mean 2 and variance 4/3; the centre stays at zero."""
    generator, n = torch.Generator().manual_seed(2), 20_000
    x = torch.randn(n, 4, 2, generator=generator, dtype=torch.float64) / math.sqrt(3.0)
    move = kind(Harmonic(centre), step_size=0.5, n_leapfrog=4, mean_free=True)
    state: WalkerState = move.init(x - x.mean(1, keepdim=True))
    for _ in range(10):
        state, _ = move.step(state, generator=generator)
    assert state.x.mean(1).abs().max() < 1e-14
    torch.testing.assert_close(state.u, move.target.reduced_potential(state.x))
    assert_z(float(state.x.square().sum((1, 2)).mean()), 2.0, math.sqrt(4 / 3 / n))


@pytest.mark.parametrize("centre", [0.0, 5.0])
def test_mean_free_walkers_stay_mean_free(centre: float) -> None:
    check_mean_free(HamiltonianMonteCarlo, centre)


@pytest.mark.parametrize("twin", [DriftingCentre, AcceptsAlways, WrongKineticSign])
def test_biased_mean_free_twins_are_caught(twin: type[HamiltonianMonteCarlo]) -> None:
    with pytest.raises(AssertionError):
        check_mean_free(twin, 5.0)


def test_walkers_are_moved_to_mean_zero_at_the_start() -> None:
    move = HamiltonianMonteCarlo(DoubleWellCluster(), step_size=0.1, n_leapfrog=2, mean_free=True)
    x = noise(3, 4, 2) + 5.0
    torch.testing.assert_close(move.init(x).x, x - x.mean(1, keepdim=True))


# ---------------------------------------------------------------- the integrator


def check_reversible(kind: type[HamiltonianMonteCarlo]) -> None:
    move = kind(LennardJonesCluster(4), step_size=0.01, n_leapfrog=20)
    start = move.init(relaxed(move.target, noise(6, 4, 3)))
    v, h = noise(6, 4, 3, scale=0.5), torch.full((6,), 0.01, dtype=torch.float64)
    end, v_end = move.trajectory(start, v, step_sizes=h)
    assert (end.x - start.x).abs().amax((1, 2)).min() > 1e-3
    back, v_back = move.trajectory(end, -v_end, step_sizes=h)
    torch.testing.assert_close(back.x, start.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(v_back, -v, rtol=0, atol=1e-9)


def test_trajectories_are_reversible() -> None:
    check_reversible(HamiltonianMonteCarlo)
    with pytest.raises(AssertionError):
        check_reversible(EndsWithAFullStep)


def test_trajectories_keep_phase_space_volume() -> None:
    move = HamiltonianMonteCarlo(DoubleWell(2), step_size=0.2, n_leapfrog=7)
    point = torch.tensor([0.7, 0.3, -0.4, 1.1], dtype=torch.float64)
    shifts = torch.cat([torch.eye(4), -torch.eye(4)]).to(torch.float64) * 1e-5
    rows = point + shifts
    end, v = move.trajectory(move.init(rows[:, :2]), rows[:, 2:], step_sizes=torch.full((8,), 0.2, dtype=torch.float64))
    mapped = torch.cat([end.x, v], dim=1)
    jacobian = (mapped[:4] - mapped[4:]) / 2e-5
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-7)


def test_the_energy_error_is_of_second_order() -> None:
    errors = []
    for n_leapfrog in (10, 20, 40):
        move = HamiltonianMonteCarlo(DoubleWell(2), step_size=1.0 / n_leapfrog, n_leapfrog=n_leapfrog)
        start, v = move.init(noise(50, 2, scale=0.7)), noise(50, 2, scale=1.1)
        end, v_end = move.trajectory(start, v, step_sizes=torch.full((50,), move.step_size, dtype=torch.float64))
        errors.append((end.u - start.u + 0.5 * (v_end.square() - v.square()).sum(1)).abs().mean())
    orders = [math.log2(float(a / b)) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2.0, 2.0], abs=0.15)


def test_a_seed_gives_the_same_walkers() -> None:
    def run(seed: int) -> Tensor:
        move = HamiltonianMonteCarlo(DoubleWellCluster(), step_size=0.1, n_leapfrog=3, mean_free=True)
        generator = torch.Generator().manual_seed(seed)
        return sample_walkers(move, move.init(noise(4, 4, 2, scale=2.0)), n_times=5, generator=generator, progress=False).samples.x

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_walkers_without_their_gradient_move_the_same() -> None:
    move = HamiltonianMonteCarlo(DoubleWell(2), step_size=0.2, n_leapfrog=2)
    state = move.init(noise(5, 2))
    first, second = (
        move.step(walkers, generator=torch.Generator().manual_seed(1))[0] for walkers in (state, WalkerState(x=state.x, u=state.u))
    )
    assert torch.equal(first.x, second.x)
    torch.testing.assert_close(first.gradient, move.target.value_and_grad(first.x)[1])


# ---------------------------------------------------------------- what is refused


class Broken(Gaussian):
    """A target that is not a number, or minus infinity, or without gradient, beyond x₁ = 1."""

    def __init__(self, u: float, gradient: float) -> None:
        super().__init__(torch.zeros(2), covariance=torch.eye(2))
        self.given = u, gradient

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = super().value_and_grad(x)
        beyond = x[:, 0] > 1
        return torch.where(beyond, self.given[0], u), torch.where(beyond[:, None], self.given[1], gradient)


@pytest.mark.parametrize(("u", "gradient"), [(math.nan, 0.0), (-math.inf, 0.0), (1.0, math.nan), (1.0, math.inf)])
def test_energies_that_are_no_numbers_stop_the_walk(u: float, gradient: float, generator: torch.Generator) -> None:
    move = HamiltonianMonteCarlo(Broken(u, gradient), step_size=1.0, n_leapfrog=3)
    with pytest.raises(EnergyError, match=r"walkers \[1\]"):
        move.init(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    state = move.init(torch.zeros(50, 2))
    with pytest.raises(EnergyError, match="take shorter steps"):
        move.step(state, generator=generator)


def test_trajectories_that_blow_up_are_rejected(generator: torch.Generator) -> None:
    """Steps far too long throw particles out to where u = +inf, or into each other."""
    for target in (DoubleWellCluster(), LennardJonesCluster(13), CoulombGas(6, 2)):
        move = HamiltonianMonteCarlo(target, step_size=1.0, n_leapfrog=30)
        state = move.init(relaxed(target, noise(100, *target.event_shape)))
        for _ in range(3):
            state, info = move.step(state, generator=generator)
            assert torch.isfinite(state.x).all()
            assert torch.isfinite(state.u).all()
        assert float(info.accepted.double().mean()) < 0.2


def test_what_cannot_be_sampled_is_refused() -> None:
    well = DoubleWell(2)
    with pytest.raises(InexactDensityError, match="regularised"):
        HamiltonianMonteCarlo(Regularised(well, u_cut=1.0, u_max=2.0), step_size=0.1, n_leapfrog=1)
    for wrong in ({"step_size": 0.0, "n_leapfrog": 1}, {"step_size": math.nan, "n_leapfrog": 1}, {"step_size": 0.1, "n_leapfrog": 0}):
        with pytest.raises(InputError, match="expected a positive step"):
            HamiltonianMonteCarlo(well, **wrong)
    with pytest.raises(ShapeError, match="mean over particles"):
        HamiltonianMonteCarlo(well, step_size=0.1, n_leapfrog=1, mean_free=True)
    move = HamiltonianMonteCarlo(LennardJonesCluster(3), step_size=0.1, n_leapfrog=1)
    with pytest.raises(InputError, match=r"walkers \[0, 1\] start where the target has no density"):
        move.init(torch.zeros(2, 3, 3))
    move = HamiltonianMonteCarlo(well, step_size=0.1, n_leapfrog=1)
    generator, state = torch.Generator(), move.init(torch.zeros(2, 2))
    for acceptance, n_moves in ((0.0, 10), (1.0, 10), (0.7, 1)):
        with pytest.raises(InputError, match="0 < acceptance < 1"):
            tuned_step_size(move, state, generator=generator, n_moves=n_moves, acceptance=acceptance)
    for n_times, thin in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="positive n_times and thin"):
            sample_walkers(move, state, n_times=n_times, thin=thin, generator=generator)


# ---------------------------------------------------------------- tuning and recording


@pytest.mark.parametrize("first", [1e-3, 3.0])
def test_tuned_steps_are_accepted_as_often_as_asked(first: float, generator: torch.Generator) -> None:
    target = CoulombGas(4, 2)
    move = HamiltonianMonteCarlo(target, step_size=first, n_leapfrog=5)
    move, state = tuned_step_size(move, move.init(relaxed(target, noise(300, 4, 2))), generator=generator)
    move, state = tuned_step_size(move, state, generator=generator)
    run = sample_walkers(move, state, n_times=50, generator=generator, progress=False)
    assert float(run.acceptance.mean()) == pytest.approx(0.75, abs=0.04)
    assert move.target is target
    assert move.n_leapfrog == 5


def test_relaxed_configurations_are_downhill_and_finite() -> None:
    target = LennardJonesCluster(13)
    x = noise(20, 13, 3, scale=0.3)
    before = target.reduced_potential(x)
    after = target.reduced_potential(relaxed(target, x))
    assert before.min() > 1e6
    assert after.max() < 50.0


def test_rows_are_labelled_by_walker_and_time(generator: torch.Generator) -> None:
    target = DoubleWell(1)
    move = HamiltonianMonteCarlo(target, step_size=0.3, n_leapfrog=2)
    run = sample_walkers(move, move.init(noise(4, 1)), n_times=10, thin=3, generator=generator, dtype=torch.float32, progress=False)
    samples = run.samples
    assert samples.x.shape == (40, 1)
    assert samples.x.dtype == torch.float32
    assert samples.u.dtype == torch.float64
    assert samples.chain.tolist() == [0, 1, 2, 3] * 10
    assert samples.block.tolist() == [block for block in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4) for _ in range(4)]
    assert samples.log_q is None
    assert samples.role == "evaluate"
    torch.testing.assert_close(samples.u, target.reduced_potential(samples.x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(samples.x[-4:].double(), run.state.x, atol=1e-6, rtol=1e-6)
    by_walker = run.by_walker(samples.u)
    assert by_walker.shape == (4, 10)
    assert np.array_equal(by_walker[2], samples.u[samples.chain == 2].numpy())
    many = sample_walkers(move, move.init(noise(25, 1)), n_times=3, generator=generator, progress=False).samples
    assert (many.block == 0).all()


def test_thinning_leaves_moves_out() -> None:
    move = HamiltonianMonteCarlo(DoubleWell(1), step_size=0.3, n_leapfrog=2)
    every, third = (
        sample_walkers(
            move, move.init(noise(4, 1)), n_times=12 // thin, thin=thin, generator=torch.Generator().manual_seed(1), progress=False
        )
        for thin in (1, 3)
    )
    assert torch.equal(every.samples.x.reshape(12, 4, 1)[2::3], third.samples.x.reshape(4, 4, 1))
    assert torch.equal(every.acceptance, third.acceptance)


@pytest.mark.parametrize("kind", [HamiltonianMonteCarlo, AcceptsAlways])
def test_two_charges_have_their_known_energy(kind: type[HamiltonianMonteCarlo], generator: torch.Generator) -> None:
    """From quenched configurations to ⟨E⟩ = 1.652604, the virial identity and the exact variance of the centre."""
    target = CoulombGas(2, 2)
    move = kind(target, step_size=0.2, n_leapfrog=4)
    state = sample_walkers(
        move, move.init(relaxed(target, noise(300, 2, 2))), n_times=1, thin=200, generator=generator, progress=False
    ).state
    run = sample_walkers(move, state, n_times=150, thin=3, generator=generator, progress=False)
    x, u = run.samples.x, run.samples.u / target.beta
    squares = x.square().sum((1, 2))
    values = torch.stack([u, 3 * squares - u, x.mean(1).square().sum(1)], dim=1)
    found = mean(run.samples, values, seed=0)

    def check() -> None:
        for value, exact, stderr in zip(found.value, (1.652604, 0.4, 0.05), found.stderr, strict=True):
            assert_z(float(value), exact, float(stderr))

    if kind is HamiltonianMonteCarlo:
        check()
        assert statistical_inefficiency(run.by_walker(u)) < 5
        assert float(found.stderr[0]) < 0.002
    else:
        with pytest.raises(AssertionError):
            check()


def test_errors_rest_on_walkers_and_not_on_rows(generator: torch.Generator) -> None:
    """Slow walkers: blocks as long as the run give an honest error where single rows claim too much."""
    target = Gaussian(torch.zeros(1), covariance=torch.eye(1))
    move = HamiltonianMonteCarlo(target, step_size=0.1, n_leapfrog=1)
    state = move.init(target.sample(400, generator=generator))
    samples = sample_walkers(move, state, n_times=100, generator=generator, progress=False).samples
    honest = mean(samples, samples.x[:, 0], seed=0)
    naive = mean(replace(samples, block=torch.arange(len(samples))), samples.x[:, 0], seed=0)
    assert_z(float(honest.value), 0.0, float(honest.stderr))
    assert float(honest.stderr) > 4 * float(naive.stderr)
