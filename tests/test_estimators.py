"""Estimators against analytic answers, coverage of their error bars, and what they refuse."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from boltzgen.core import Estimate, WeightedSamples
from boltzgen.errors import InexactDensityError, InputError, ShapeError, TrainingDataError, WeightsError
from boltzgen.estimators.bootstrap import independent_units
from boltzgen.estimators.profiles import Profile, profile_1d, profile_2d, total_variation
from boltzgen.estimators.reweighting import free_energy_difference, log_z, log_z_lower, log_z_upper, mean
from boltzgen.estimators.verdict import generator_verdict
from boltzgen.estimators.weights import (
    clipped_effective_sample_size,
    effective_sample_size,
    ess_by_batch,
    forward_effective_sample_size,
    pareto_k,
)
from tests.assertions import assert_z

SPREAD = 1.3  # standard deviation of the proposal; the target is a standard normal with ln Z = LOG_Z
LOG_Z = 0.5 * math.log(2 * math.pi)


def from_weights(log_w: np.ndarray | torch.Tensor, x: np.ndarray | torch.Tensor | None = None) -> WeightedSamples:
    """Independent rows with given log weights."""
    log_w = torch.as_tensor(log_w, dtype=torch.float64)
    x = torch.zeros(len(log_w), 1) if x is None else torch.as_tensor(x)
    rows = torch.arange(len(log_w))
    zeros = torch.zeros_like(log_w)
    return WeightedSamples(x=x, u=-log_w, log_w=log_w, log_q=zeros, block=0 * rows, chain=0 * rows, role="evaluate")


def gaussian_samples(n: int, *, seed: int, keep_log_q: bool = True) -> WeightedSamples:
    """x ~ N(0, SPREAD²) weighted to exp(−x²/2); the mutant forgets the density of the proposal."""
    x = SPREAD * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_q = -0.5 * (x / SPREAD) ** 2 - math.log(SPREAD) - LOG_Z
    u = 0.5 * x**2
    return replace(from_weights(-u - log_q if keep_log_q else -u, x[:, None]), u=u, log_q=log_q)


def autoregressive(n: int, *, seed: int, rho: float = 0.6, n_blocks: int = 40) -> WeightedSamples:
    """A stationary AR(1) chain of standard normals in time blocks: a stand-in for MD."""
    noise = np.random.default_rng(seed).standard_normal(n)
    noise[1:] *= math.sqrt(1 - rho**2)
    x = lfilter([1.0], [1.0, -rho], noise)
    rows = torch.from_numpy(x)
    return WeightedSamples.unweighted(rows[:, None], 0.5 * rows**2, role="evaluate", block=torch.arange(n) * n_blocks // n)


# ---------------------------------------------------------------- effective sample sizes and the tail


def check_gaussian_ess(estimator: Callable[[WeightedSamples], float]) -> None:
    samples = gaussian_samples(200_000, seed=1)
    exact = math.sqrt(2 * SPREAD**2 - 1) / SPREAD**2
    batches = np.array([estimator(samples[i * 10_000 : (i + 1) * 10_000]) for i in range(20)])
    assert_z(float(batches.mean()), exact, float(batches.std(ddof=1) / math.sqrt(20)))


def test_raw_ess_of_two_gaussians() -> None:
    check_gaussian_ess(effective_sample_size)
    with pytest.raises(AssertionError):
        check_gaussian_ess(lambda s: effective_sample_size(replace(s, log_w=2 * s.log_w)))  # weights squared
    with pytest.raises(AssertionError):
        check_gaussian_ess(lambda s: effective_sample_size(replace(s, log_w=-s.log_w)))  # sign flipped
    with pytest.raises(AssertionError):
        check_gaussian_ess(lambda s: effective_sample_size(replace(s, log_w=-s.u)))  # log q dropped


def test_ess_bounds() -> None:
    assert effective_sample_size(from_weights(np.full(10, 800.0))) == pytest.approx(1.0)
    one = np.full(10, -math.inf)
    one[3] = -5000.0
    assert effective_sample_size(from_weights(one)) == pytest.approx(0.1)


def test_clipping_lifts_the_ess_and_states_its_threshold() -> None:
    log_w = np.zeros(1000)
    log_w[:2] = 7.0
    samples = from_weights(log_w)
    assert effective_sample_size(samples) < 0.01
    assert clipped_effective_sample_size(samples, fraction=0.0) == pytest.approx(effective_sample_size(samples))
    assert clipped_effective_sample_size(samples, fraction=0.001) == pytest.approx(effective_sample_size(samples), rel=1e-9)
    assert clipped_effective_sample_size(samples, fraction=0.002) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        clipped_effective_sample_size(samples, fraction=1.5)


def test_ess_by_batch_leaves_out_the_remainder_and_survives_an_empty_batch() -> None:
    log_w = np.concatenate([np.zeros(100), np.full(100, -math.inf), np.full(100, -900.0), [50.0] * 30])
    assert ess_by_batch(from_weights(log_w), batch_size=100) == pytest.approx([1.0, 0.0, 1.0])
    with pytest.raises(InputError, match="one batch of 1000 rows"):
        ess_by_batch(from_weights(log_w), batch_size=1000)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_of_known_tails(shape: float) -> None:
    uniform = np.random.default_rng(3).random(100_000)
    w = ((1 - uniform) ** (-shape) - 1) / shape
    assert_z(pareto_k(from_weights(np.log(w))), shape, (1 + shape) / math.sqrt(950))
    with pytest.raises(AssertionError):
        assert_z(pareto_k(from_weights(2 * np.log(w))), shape, (1 + shape) / math.sqrt(950))  # weights squared


def test_pareto_k_at_its_limits() -> None:
    assert pareto_k(from_weights(np.zeros(1000))) == 0.0
    assert pareto_k(from_weights(np.zeros(10))) == math.inf
    underflowing = np.full(1000, -5000.0)
    underflowing[0] = 0.0
    assert pareto_k(from_weights(underflowing)) == math.inf
    bounded = np.log(np.random.default_rng(0).random(10_000))
    assert pareto_k(from_weights(bounded)) < 0


def test_forward_ess_agrees_with_the_reverse_one_and_sees_a_missing_mode() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    log_ratio = -0.5 * x**2 + 0.5 * (x / SPREAD) ** 2 + math.log(SPREAD) + LOG_Z
    assert forward_effective_sample_size(log_ratio) == pytest.approx(math.sqrt(2 * SPREAD**2 - 1) / SPREAD**2, abs=0.005)
    missed = log_ratio.clone()
    missed[:2000] += 40.0
    assert forward_effective_sample_size(missed) < 1e-10
    missed[0] = math.inf
    assert forward_effective_sample_size(missed) == 0.0
    missed[7] = math.nan
    with pytest.raises(WeightsError, match=r"rows \[7\]"):
        forward_effective_sample_size(missed)


# ---------------------------------------------------------------- averages, free energies, ln Z


def check_against_analytic(samples: WeightedSamples) -> None:
    x = samples.x[:, 0]
    second = mean(samples, x**2, name="<x²>", unit="nm²", seed=1)
    assert_z(second.value, 1.0, second.stderr)
    tail = free_energy_difference(samples, x.abs() <= 1, x.abs() > 1, name="tail", seed=1)
    inner = math.erf(1 / math.sqrt(2))
    assert_z(tail.value, -math.log((1 - inner) / inner), tail.stderr)
    normalisation = log_z(samples, seed=1)
    assert_z(normalisation.value, LOG_Z, normalisation.stderr)


def test_estimates_agree_with_the_analytic_answers() -> None:
    samples = gaussian_samples(20_000, seed=2)
    check_against_analytic(samples)
    with pytest.raises(AssertionError):
        check_against_analytic(gaussian_samples(20_000, seed=2, keep_log_q=False))
    with pytest.raises(AssertionError):
        check_against_analytic(replace(samples, log_w=-samples.log_w))
    with pytest.raises(AssertionError):
        check_against_analytic(replace(samples, log_w=2 * samples.log_w))


def test_bounds_enclose_ln_z() -> None:
    samples = gaussian_samples(50_000, seed=3)
    lower = log_z_lower(samples)
    assert_z(lower.value, LOG_Z - 0.5 * (SPREAD**2 - 1) + math.log(SPREAD), lower.stderr)
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    upper = log_z_upper(-0.5 * x**2 + 0.5 * (x / SPREAD) ** 2 + math.log(SPREAD) + LOG_Z)
    assert_z(upper.value, LOG_Z + 0.5 * (1 / SPREAD**2 - 1) + math.log(SPREAD), upper.stderr)
    assert lower.value < LOG_Z < upper.value
    assert "only if the data cover" in upper.note


def test_bounds_with_rows_of_no_weight() -> None:
    samples = from_weights(np.array([0.0, -math.inf, 0.0]))
    assert log_z_lower(samples).value == -math.inf
    assert log_z_upper(torch.tensor([0.0, math.inf])).value == math.inf
    with pytest.raises(WeightsError, match=r"rows \[1\]"):
        log_z_upper(torch.tensor([0.0, math.nan]))


def test_vector_averages_carry_their_covariance() -> None:
    samples = gaussian_samples(20_000, seed=6)
    x = samples.x[:, 0]
    both = mean(samples, torch.stack([x, 2 * x + x**2], dim=1), seed=1, n_bootstrap=400)
    assert both.value.shape == (2,)
    assert np.sqrt(np.diag(both.covariance)) == pytest.approx(both.stderr, rel=0.25)
    assert both.covariance[0, 1] / both.covariance[0, 0] == pytest.approx(2.0, rel=0.15)


def test_rows_of_weight_zero_count_for_nothing() -> None:
    samples = from_weights(np.array([0.0, 0.0, -math.inf]))
    assert mean(samples, torch.tensor([1.0, 3.0, math.nan]), seed=0).value == pytest.approx(2.0)
    with pytest.raises(InputError, match=r"rows \[1\]"):
        mean(samples, torch.tensor([1.0, math.nan, 0.0]), seed=0)
    with pytest.raises(ShapeError, match=r"\[3\]"):
        mean(samples, torch.zeros(4), seed=0)


def test_a_basin_that_was_never_visited_is_not_a_number() -> None:
    samples = gaussian_samples(1000, seed=7)
    x = samples.x[:, 0]
    estimate = free_energy_difference(samples, x < 50, x > 50, name="far", seed=0)
    assert math.isnan(estimate.value)
    assert estimate.stderr == math.inf
    assert "basin b was never visited" in estimate.note
    rare = x == x.max()
    assert free_energy_difference(samples, ~rare, rare, name="one row", seed=0).stderr == math.inf
    with pytest.raises(ShapeError, match="bool"):
        free_energy_difference(samples, x, x > 0, name="not bool", seed=0)


# ---------------------------------------------------------------- coverage of the error bars


def check_coverage(experiment: Callable[[int], tuple[Estimate, float]], *, repeats: int = 400) -> None:
    """The 95 % interval must hold the truth in 92 to 98 % of the repeats."""
    hits = 0
    for seed in range(repeats):
        estimate, exact = experiment(seed)
        hits += abs(estimate.value - exact) < 1.96 * estimate.stderr
    assert 0.92 <= hits / repeats <= 0.98, f"the 95 % interval covers {100 * hits / repeats:.1f} %"


def test_coverage_of_reweighted_averages() -> None:
    def experiment(seed: int) -> tuple[Estimate, float]:
        samples = gaussian_samples(400, seed=seed)
        return mean(samples, samples.x[:, 0] ** 2, n_bootstrap=100, seed=seed), 1.0

    check_coverage(experiment)

    def squared(seed: int) -> tuple[Estimate, float]:
        samples = gaussian_samples(400, seed=seed)
        return mean(replace(samples, log_w=2 * samples.log_w), samples.x[:, 0] ** 2, n_bootstrap=100, seed=seed), 1.0

    with pytest.raises(AssertionError):
        check_coverage(squared, repeats=60)


def test_coverage_of_free_energy_differences_and_ln_z() -> None:
    inner = math.erf(1 / math.sqrt(2))

    def difference(seed: int) -> tuple[Estimate, float]:
        samples = gaussian_samples(400, seed=seed)
        outside = samples.x[:, 0].abs() > 1
        return free_energy_difference(samples, ~outside, outside, name="tail", n_bootstrap=100, seed=seed), -math.log((1 - inner) / inner)

    check_coverage(difference)
    check_coverage(lambda seed: (log_z(gaussian_samples(400, seed=seed), n_bootstrap=100, seed=seed), LOG_Z))


def test_coverage_on_correlated_data_needs_blocks() -> None:
    def by_blocks(seed: int) -> tuple[Estimate, float]:
        samples = autoregressive(2000, seed=seed)
        return mean(samples, samples.x[:, 0], n_bootstrap=100, seed=seed), 0.0

    def by_rows(seed: int) -> tuple[Estimate, float]:
        samples = autoregressive(2000, seed=seed)
        return mean(replace(samples, block=torch.arange(len(samples))), samples.x[:, 0], n_bootstrap=100, seed=seed), 0.0

    check_coverage(by_blocks)
    with pytest.raises(AssertionError):
        check_coverage(by_rows, repeats=60)


def test_units_are_rows_with_a_density_and_blocks_of_chains_without() -> None:
    x, u = torch.zeros(6, 1), torch.zeros(6)
    chain, block = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 0, 1])
    samples = WeightedSamples.unweighted(x, u, role="evaluate", block=block, chain=chain)
    assert independent_units(samples).tolist() == [0, 0, 1, 2, 2, 3]
    assert independent_units(replace(samples, log_q=u)).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match=r"block=torch.arange\(n\)"):
        independent_units(WeightedSamples.unweighted(x, u, role="evaluate"))
    assert "4 independent blocks" in mean(samples, torch.arange(6.0), seed=0).note


# ---------------------------------------------------------------- profiles


def exact_profile(edges: np.ndarray) -> np.ndarray:
    """Free energy of a standard normal in bins, relative to the bin that holds zero's left neighbour."""
    cumulative = np.array([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
    return -np.log(np.diff(cumulative) / np.diff(edges))


def check_profile(profile: Profile, exact: np.ndarray) -> None:
    for index in range(len(exact)):
        if (index,) != profile.reference:
            assert_z(profile.free_energy[index], exact[index] - exact[profile.reference], profile.stderr[index])


def test_profile_of_a_gaussian_on_uneven_bins() -> None:
    edges = np.array([-2.5, -1.5, -1.0, -0.4, 0.1, 0.3, 1.0, 2.5])
    samples = gaussian_samples(20_000, seed=8)
    profile = profile_1d(samples, samples.x[:, 0], edges=edges, name="x", seed=1)
    check_profile(profile, exact_profile(edges))
    assert profile.free_energy.min() == 0
    assert profile.stderr[profile.reference] == 0
    assert profile.outside == pytest.approx(0.0124, abs=0.004)
    assert profile.probability.sum() == pytest.approx(1.0)
    unweighted = profile_1d(replace(samples, log_w=0 * samples.log_w), samples.x[:, 0], edges=edges, name="x", seed=1)
    with pytest.raises(AssertionError):
        check_profile(unweighted, exact_profile(edges))
    with pytest.raises(AssertionError):  # bin widths forgotten
        check_profile(profile, exact_profile(edges) - np.log(np.diff(edges)))


def test_profile_errors_cover_and_hold_in_a_given_gauge() -> None:
    edges = np.linspace(-2, 2, 9)
    exact = exact_profile(edges)

    def experiment(seed: int) -> tuple[Estimate, float]:
        samples = gaussian_samples(600, seed=seed)
        profile = profile_1d(samples, samples.x[:, 0], edges=edges, reference=4, n_bootstrap=100, seed=seed)
        estimate = Estimate("F", float(profile.free_energy[7]), float(profile.stderr[7]), "kT", float(profile.n_effective[7]))
        return estimate, float(exact[7] - exact[4])

    check_coverage(experiment)


def test_errors_of_a_normalised_profile_cover() -> None:
    edges = np.linspace(-2, 2, 9)
    exact = exact_profile(edges)

    def experiment(seed: int) -> tuple[Estimate, float]:
        samples = gaussian_samples(600, seed=seed)
        profile = profile_1d(samples, samples.x[:, 0], edges=edges, n_bootstrap=100, seed=seed)
        f, error = -math.log(profile.probability[7]), float(profile.stderr_normalised[7])
        return Estimate("F", f, error, "kT", float(profile.n_effective[7])), float(exact[7] + np.log(np.exp(-exact).sum()))

    check_coverage(experiment)


def test_profile_of_correlated_rows_uses_blocks() -> None:
    samples = autoregressive(20_000, seed=1, rho=0.9)
    edges = np.linspace(-2, 2, 9)
    blocks = profile_1d(samples, samples.x[:, 0], edges=edges, reference=4, seed=0)
    rows = profile_1d(replace(samples, block=torch.arange(len(samples))), samples.x[:, 0], edges=edges, reference=4, seed=0)
    check_profile(blocks, exact_profile(edges))
    assert blocks.stderr[0] > 1.5 * rows.stderr[0]
    assert blocks.n_effective[0] <= 40


def test_profile_bins_that_were_hardly_visited() -> None:
    samples = from_weights(np.zeros(1000), np.concatenate([np.full(999, 0.5), [1.5]])[:, None])
    profile = profile_1d(samples, samples.x[:, 0], edges=np.array([0.0, 1.0, 2.0, 3.0]), seed=0)
    assert profile.free_energy.tolist() == pytest.approx([0.0, math.log(999), math.inf])
    assert profile.stderr.tolist() == [0.0, math.inf, math.inf]
    assert profile.n_effective.tolist() == pytest.approx([999, 1, 0])


def test_profile_2d_total_variation_and_edges() -> None:
    edges = np.linspace(-3, 3, 21)
    samples = gaussian_samples(20_000, seed=9)
    x = samples.x[:, 0]
    pair = torch.stack([x, x.roll(1)], dim=1)
    profile = profile_2d(samples, pair, edges=(edges, edges), seed=1, n_bootstrap=20)
    assert profile.free_energy.shape == (20, 20)
    assert profile.probability.sum(axis=1) == pytest.approx(np.diff([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges]), abs=0.01)
    swapped = profile_2d(samples, pair.flip(1), edges=(edges, edges), seed=1, n_bootstrap=20)
    assert total_variation(profile, profile) == 0
    assert total_variation(profile, replace(profile, free_energy=swapped.free_energy.T)) < 0.3
    with pytest.raises(InputError, match="same bins"):
        total_variation(profile, profile_1d(samples, x, edges=edges, seed=1, n_bootstrap=20))


def test_total_variation_of_known_histograms() -> None:
    rows = np.array([0.5, 0.5, 0.5, 1.5])[:, None]
    edges = np.array([0.0, 1.0, 2.0])
    p = from_weights(np.zeros(4), rows)
    q = from_weights(np.log([1.0, 1.0, 1.0, 3.0]), rows)
    profiles = [profile_1d(s, s.x[:, 0], edges=edges, seed=0) for s in (p, q)]
    assert total_variation(*profiles) == pytest.approx(0.25)


def test_profile_refuses_bad_edges() -> None:
    samples = gaussian_samples(100, seed=1)
    with pytest.raises(InputError, match="ascending"):
        profile_1d(samples, samples.x[:, 0], edges=np.array([1.0, 0.0]), seed=0)
    with pytest.raises(InputError, match="range and the unit"):
        profile_1d(samples, samples.x[:, 0], edges=np.array([100.0, 200.0]), seed=0)
    with pytest.raises(InputError, match="reference bin"):
        profile_1d(samples, samples.x[:, 0], edges=np.array([-1.0, 1.0, 100.0, 200.0]), reference=2, seed=0)


# ---------------------------------------------------------------- what is refused everywhere

ESTIMATORS: dict[str, Callable[[WeightedSamples], object]] = {
    "effective_sample_size": effective_sample_size,
    "clipped_effective_sample_size": lambda s: clipped_effective_sample_size(s, fraction=0.01),
    "ess_by_batch": lambda s: ess_by_batch(s, batch_size=10),
    "pareto_k": pareto_k,
    "mean": lambda s: mean(s, s.u, seed=0),
    "free_energy_difference": lambda s: free_energy_difference(s, s.x[:, 0] < 0, s.x[:, 0] >= 0, name="", seed=0),
    "log_z": lambda s: log_z(s, seed=0),
    "log_z_lower": log_z_lower,
    "profile_1d": lambda s: profile_1d(s, s.x[:, 0], edges=np.array([-9.0, 0.0, 9.0]), seed=0),
    "profile_2d": lambda s: profile_2d(s, s.x[:, [0, 0]], edges=(np.array([-9.0, 9.0]), np.array([-9.0, 9.0])), seed=0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_inexact_and_training_rows_are_refused(name: str) -> None:
    estimator, samples = ESTIMATORS[name], gaussian_samples(100, seed=1)
    estimator(samples)
    with pytest.raises(TrainingDataError):
        estimator(replace(samples, role="train"))
    with pytest.raises(InexactDensityError, match="regularised"):
        estimator(replace(samples, is_exact=False))
    with pytest.raises(InexactDensityError, match="only estimated"):
        estimator(replace(samples, log_det_error=None))
    with pytest.raises(InexactDensityError, match=r"0\.02 nats"):
        estimator(replace(samples, log_det_error=0.02))
    with pytest.raises(WeightsError, match="all 100 weights are zero"):
        estimator(replace(samples, log_w=torch.full((100,), -math.inf)))
    broken = samples.log_w.clone()
    broken[[4, 17]] = math.nan
    with pytest.raises(WeightsError, match=r"rows \[4, 17\]"):
        estimator(replace(samples, log_w=broken))


def test_md_rows_do_not_know_ln_z() -> None:
    with pytest.raises(InputError, match="log_q"):
        log_z(autoregressive(100, seed=0), seed=0)


def test_estimates_are_reproducible_and_fast() -> None:
    samples = gaussian_samples(100_000, seed=1)
    pair = samples.x[:, [0, 0]]
    edges = np.linspace(-4, 4, 51)
    start = time.process_time()
    first = profile_2d(samples, pair, edges=(edges, edges), seed=3)
    assert time.process_time() - start < 5
    again = profile_2d(samples, pair, edges=(edges, edges), seed=3)
    assert np.array_equal(first.stderr, again.stderr)


# ---------------------------------------------------------------- verdict

GOOD = {"ess_raw": 0.5, "pareto_k": 0.3, "n_samples": 10_000, "forward_ess": 0.45, "n_forward_effective": 400.0, "elbo": 9.6, "eubo": 10.4,
        "log_z": 10.0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word", "reason"),
    [
        ({}, "reliable", "5000 independent ones"),
        ({"forward_ess": 0.1}, "missing modes", "leaves out conformations"),
        ({"eubo": 14.0}, "missing modes", "almost no probability"),
        ({"eubo": math.inf}, "missing modes", "almost no probability"),
        ({"eubo": 9.5}, "missing modes", "never visited"),
        ({"warnings": ("the data visited only one phi basin",)}, "missing modes", "only one phi basin"),
        ({"warnings": ("the data visited only one phi basin",), "pareto_k": 0.9}, "missing modes", "only one phi basin"),
        ({"pareto_k": 0.8}, "low overlap", "Pareto k = 0.80"),
        ({"pareto_k": math.inf}, "low overlap", "Pareto k = inf"),
        ({"ess_raw": 0.001, "n_samples": 1_000_000}, "low overlap", "hardly overlap"),
        ({"ess_raw": 1e-5, "pareto_k": 1.4, "forward_ess": 0.0}, "low overlap", "hardly overlap"),
        ({"n_samples": 150}, "not converged", "draw more samples"),
        ({"forward_ess": None, "n_forward_effective": None, "eubo": None}, "not converged", "no held-out simulation data"),
        ({"n_forward_effective": 12.0}, "not converged", "12 independent held-out frames"),
        ({"log_z": None, "elbo": -math.inf}, "reliable", "independent ones"),
    ],
)
def test_verdict(change: dict, word: str, reason: str) -> None:
    verdict = generator_verdict(**{**GOOD, **change})
    assert verdict.word == word
    assert reason in verdict.reasons[0]


def test_verdict_lists_every_reason() -> None:
    verdict = generator_verdict(**{**GOOD, "pareto_k": 0.9, "n_samples": 100, "n_forward_effective": 3.0})
    assert verdict.word == "low overlap"
    assert len(verdict.reasons) == 3
