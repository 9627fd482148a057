"""Free energies from work values; normal works obey Crooks exactly: Φ_F ~ N(σ²/2 + ΔF, σ²), Φ_R ~ N(σ²/2 − ΔF, σ²)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from scipy.special import log_expit, logsumexp

from boltzgen.core import Bridge, Chain, WeightedSamples
from boltzgen.errors import EnergyError, InexactDensityError, InputError, ShapeError, TrainingDataError
from boltzgen.estimators.mbar import mbar_free_energies
from boltzgen.estimators.perturbation import (
    AcceptanceRatio,
    _log_sum,
    acceptance_ratio,
    bound,
    convergence,
    exponential_average,
    perturbation_verdict,
)
from boltzgen.estimators.quiet_pymbar import pymbar
from boltzgen.estimators.works import Works
from boltzgen.targets.analytic import Gaussian
from boltzgen.units import thermal_energy
from tests.assertions import assert_z
from tests.test_fit import affine_flow

DIFFERENCE = 1.3


def made(w: object, **more: object) -> Works:
    return Works.of(w, **{"role": "evaluate", "log_det_error": 0.0, **more})  # type: ignore[arg-type]


def normal_works(sigma: float, n: int, *, seed: int = 0, n_reverse: int | None = None) -> tuple[Works, Works]:
    generator = np.random.default_rng(seed)
    forward = generator.normal(DIFFERENCE + sigma**2 / 2, sigma, n)
    reverse = generator.normal(-DIFFERENCE + sigma**2 / 2, sigma, n_reverse or n)
    return made(forward), made(reverse)


def found(sigma: float, n: int, *, seed: int = 0, n_bootstrap: int = 100) -> AcceptanceRatio:
    return acceptance_ratio(*normal_works(sigma, n, seed=seed), n_bootstrap=n_bootstrap, seed=seed)


def test_the_acceptance_ratio_is_that_of_pymbar_and_of_mbar() -> None:
    forward, reverse = normal_works(1.5, 800, n_reverse=300)
    ours = acceptance_ratio(forward, reverse, seed=1)
    theirs = pymbar.bar(forward.w, reverse.w)
    assert float(ours.difference.value) == pytest.approx(theirs["Delta_f"], abs=1e-8)
    assert float(ours.difference.stderr) == pytest.approx(theirs["dDelta_f"], rel=0.3)
    u = np.array([[*np.zeros(800), *reverse.w], [*forward.w, *np.zeros(300)]])
    both = mbar_free_energies(u, np.array([800, 300]))
    assert float(ours.difference.value) == pytest.approx(both.f[1], abs=1e-6)
    assert ours.overlap == pytest.approx(both.overlap, abs=1e-6)


def test_every_estimate_finds_the_difference() -> None:
    forward, reverse = normal_works(1.0, 4000)
    for estimate in (
        acceptance_ratio(forward, reverse, seed=1).difference,
        exponential_average(forward, seed=1),
        exponential_average(reverse, reverse=True, seed=1),
    ):
        assert_z(float(estimate.value), DIFFERENCE, float(estimate.stderr))
    upper, lower = bound(forward), bound(reverse, reverse=True)
    assert_z(float(upper.value), DIFFERENCE + 0.5, float(upper.stderr))
    assert_z(float(lower.value), DIFFERENCE - 0.5, float(lower.stderr))


def test_a_map_turns_one_gaussian_into_another_with_constant_work() -> None:
    """With the exact map every work is ΔF, to rounding; with the Jacobian forgotten it is not."""
    a = Gaussian(torch.zeros(2, dtype=torch.float64), covariance=torch.eye(2, dtype=torch.float64))
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
    mean = torch.tensor([1.0, -3.0], dtype=torch.float64)
    b = Gaussian(mean, covariance=(scale**2).diag())
    exact = affine_flow().transform
    with torch.no_grad():
        exact.shift.copy_(mean)  # type: ignore[operator, union-attr]
        exact.log_scale.copy_(scale.log())  # type: ignore[operator, union-attr]
    x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    works = Bridge(a, b, Chain(exact)).works(x).detach()
    assert a.log_z is not None
    assert b.log_z is not None
    torch.testing.assert_close(works, torch.full_like(works, a.log_z - b.log_z), atol=1e-10, rtol=0)
    without_jacobian = (b.reduced_potential(exact(x)[0]) - a.reduced_potential(x)).detach()
    assert float((without_jacobian - (a.log_z - b.log_z)).abs().min()) > 0.1


def test_infinite_works_are_rows_that_the_other_state_forbids() -> None:
    """Half of A is forbidden in B and B is flat inside: ΔF = ln 2 exactly. pymbar's bar gives 0 ± 0 for the same works."""
    generator = np.random.default_rng(3)
    forward = made(np.where(generator.random(4000) < 0.5, 0.0, np.inf))
    reverse = made(np.zeros(1000))
    ratio = acceptance_ratio(forward, reverse, seed=1)
    assert_z(float(ratio.difference.value), math.log(2), float(ratio.difference.stderr))
    assert "works are infinite" in ratio.difference.note
    average = exponential_average(forward, seed=1)
    assert_z(float(average.value), math.log(2), float(average.stderr))
    assert bound(forward).value == math.inf
    assert bound(forward).stderr == math.inf


def test_works_that_are_no_numbers_are_counted_and_refused_above_one_in_a_thousand() -> None:
    w = np.zeros(2000)
    w[7] = np.nan
    some = made(w)
    assert (len(some), some.n_nan) == (1999, 1)
    assert "1 works that were not a number" in exponential_average(some, seed=1).note
    w[:5] = np.nan
    with pytest.raises(EnergyError, match=r"6 of 2000 works are NaN, in rows \[0, 1, 2, 3, 4, 7\]"):
        made(w)
    with pytest.raises(EnergyError, match="row 1 has a work of -inf"):
        made(np.array([0.0, -np.inf]))
    with pytest.raises(EnergyError, match=r"all 2 works are \+inf"):
        made(np.array([np.inf, np.inf]))
    with pytest.raises(InputError, match="form 1 independent units"):
        made(np.zeros(50), units=np.zeros(50))
    with pytest.raises(InputError, match="the 0 works form 0"):
        made([])
    for wrong in (np.zeros((3, 2)), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=r"expected works \[n\]"):
            made(wrong)
    with pytest.raises(ShapeError, match=r"units and chains \[3\]"):
        made(np.zeros(3), chain=np.zeros(2))
    assert made([1e6 + 0.3, 0.0]).w[0] == 1e6 + 0.3


def test_works_of_training_rows_or_of_inexact_maps_are_refused() -> None:
    good = made(np.zeros(10))
    for bad_works, error in (
        (made(np.zeros(10), role="train"), TrainingDataError),
        (made(np.zeros(10), is_exact=False), InexactDensityError),
        (made(np.zeros(10), log_det_error=None), InexactDensityError),
    ):
        for estimate in (
            lambda bad: exponential_average(bad, seed=1),
            bound,
            lambda bad: acceptance_ratio(bad, good, seed=1),
            lambda bad: acceptance_ratio(good, bad, seed=1),
        ):
            with pytest.raises(error):
                estimate(bad_works)


def test_correlated_works_count_by_their_blocks() -> None:
    """Every value ten times over in one block: the error is that of the values; rows as units would make it 3.2 times too small."""
    forward, reverse = normal_works(1.0, 300)
    blocks = np.repeat(np.arange(300), 10)
    repeated = [made(np.repeat(one.w, 10), units=blocks) for one in (forward, reverse)]
    once, tenfold = acceptance_ratio(forward, reverse, seed=1), acceptance_ratio(*repeated, seed=1)
    assert float(tenfold.difference.value) == pytest.approx(float(once.difference.value), abs=1e-8)
    assert float(tenfold.difference.stderr) == pytest.approx(float(once.difference.stderr), rel=1e-6)
    assert tenfold.n_forward == pytest.approx(once.n_forward)
    naive = acceptance_ratio(*(made(one.w) for one in repeated), seed=1)
    assert float(naive.difference.stderr) < 0.5 * float(once.difference.stderr)
    assert float(bound(repeated[0]).stderr) == pytest.approx(float(bound(forward).stderr), rel=1e-9)


@pytest.mark.parametrize(("sigma", "n", "n_reverse"), [(1.0, 400, 400), (2.0, 1000, 300), (3.5, 1000, 1000)])
def test_error_bars_cover_the_truth_where_the_verdict_is_reliable(sigma: float, n: int, n_reverse: int) -> None:
    repeats, z = 120, []
    for seed in range(repeats):
        ratio = acceptance_ratio(*normal_works(sigma, n, seed=seed, n_reverse=n_reverse), n_bootstrap=100, seed=seed)
        if perturbation_verdict(ratio).word == "reliable":
            z.append((float(ratio.difference.value) - DIFFERENCE) / float(ratio.difference.stderr))
    assert len(z) > 0.9 * repeats
    assert abs(np.mean(np.abs(z) < 1.96) - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / len(z))
    assert 0.8 < np.std(z) < 1.2  # known to 6.5 %
    assert abs(np.mean(z)) < 4.5 / math.sqrt(len(z))


@pytest.mark.parametrize(("sigma", "difference"), [(50.0, 0.0), (50.0, 300.0), (100.0, 0.0), (30.0, 300.0), (0.01, 1e6), (0.0, -7.0)])
def test_far_states_still_give_the_root_of_the_equation(sigma: float, difference: float) -> None:
    """Sums of accepted rows under- and overflow here; the equation for their logarithms has its one root all the same."""
    generator = np.random.default_rng(1)
    forward = made(generator.normal(difference + sigma**2 / 2, sigma, 500))
    reverse = made(generator.normal(-difference + sigma**2 / 2, sigma, 50))
    ratio = acceptance_ratio(forward, reverse, n_bootstrap=20, seed=1)
    x, m = float(ratio.difference.value), math.log(10)
    left, right = (logsumexp(log_expit(row)) for row in (x - m - forward.w, m - x - reverse.w))
    assert left == pytest.approx(right, abs=1e-8 * max(1.0, abs(x)))
    if sigma > 1:
        assert perturbation_verdict(ratio).word == "low overlap"
        assert "error bar is too small" in ratio.difference.note
        assert float(ratio.difference.stderr) > 0
    else:
        assert x == pytest.approx(difference, abs=0.01)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_reverse_works_of_the_wrong_sign_contradict_the_forward_ones(sigma: float) -> None:
    forward, reverse = normal_works(sigma, 1000)
    assert perturbation_verdict(acceptance_ratio(forward, reverse, seed=1)).word == "reliable"
    verdict = perturbation_verdict(acceptance_ratio(forward, made(-reverse.w), seed=1))
    assert verdict.word == "not converged"
    assert "check the sign" in " ".join(verdict.reasons)
    constant = acceptance_ratio(made(np.full(100, 0.7)), made(np.full(100, 0.7)), seed=1)
    assert perturbation_verdict(constant).word == "not converged"
    exact = acceptance_ratio(made(np.full(100, 0.7)), made(np.full(100, -0.7)), seed=1)
    assert float(exact.difference.value) == pytest.approx(0.7, abs=1e-12)
    assert perturbation_verdict(exact).word == "reliable"


def test_states_that_hardly_overlap_are_not_reliable() -> None:
    far = found(10.0, 2000)
    verdict = perturbation_verdict(far)
    assert verdict.word == "low overlap"
    assert "overlap by" in verdict.reasons[0]
    few = perturbation_verdict(found(1.0, 30))
    assert few.word == "not converged"
    assert "carry the estimate" in few.reasons[0]
    assert perturbation_verdict(found(1.0, 400), warnings=["a fault"]).word == "not converged"


def test_one_work_thousands_of_kt_below_the_others_leaves_every_replicate_defined() -> None:
    """A replicate without that row sums works that are e^-3000 of it: it is another number, not a failure."""
    forward, reverse = normal_works(1.0, 50)
    w = forward.w + 3000.0
    w[7] = 2.0
    ratio = acceptance_ratio(made(w), made(reverse.w), seed=1)
    assert perturbation_verdict(ratio).word != "reliable"
    assert math.isfinite(float(ratio.difference.value))
    replicate = np.ones(50)
    replicate[7] = 0.0
    assert _log_sum(-w, replicate) == pytest.approx(float(logsumexp(-w[replicate > 0])))
    assert float(exponential_average(made(w), seed=1).value) == pytest.approx(2.0 + math.log(50), abs=1e-9)


def test_data_that_drift_are_not_converged() -> None:
    forward, reverse = normal_works(1.0, 2000)
    still = convergence(forward, reverse, n_bootstrap=20, seed=1)
    assert still.from_start[-1] == pytest.approx(still.from_end[-1], abs=1e-9)
    assert perturbation_verdict(acceptance_ratio(forward, reverse, seed=1), drift=still).word == "reliable"
    moved = made(forward.w + np.linspace(0, 1, 2000))
    drift = convergence(moved, reverse, n_bootstrap=20, seed=1)
    verdict = perturbation_verdict(acceptance_ratio(moved, reverse, seed=1), drift=drift)
    assert verdict.word == "not converged"
    assert "the halves of the data give" in " ".join(verdict.reasons)
    shuffled = np.arange(2000).reshape(500, 4).T.ravel()  # four chains, each drifting, stored one after the other
    chains = made(moved.w[shuffled], chain=np.repeat(np.arange(4), 500))
    assert (
        perturbation_verdict(acceptance_ratio(chains, reverse, seed=1), drift=convergence(chains, reverse, n_bootstrap=20, seed=1)).word
        == "not converged"
    )
    half = made(np.where(np.arange(2000) < 990, np.inf, forward.w))
    gone = convergence(half, reverse, n_shares=2, n_bootstrap=20, seed=1)
    assert perturbation_verdict(acceptance_ratio(half, reverse, seed=1), drift=gone).word == "not converged"
    with pytest.raises(InputError, match="form one independent unit"):
        convergence(*normal_works(1.0, 10), seed=1)
    with pytest.raises(InputError, match="even number of shares"):
        convergence(forward, reverse, n_shares=3, seed=1)


def test_works_come_from_samples_with_their_chains_and_blocks() -> None:
    x = torch.zeros(6, 2, dtype=torch.float64)
    samples = WeightedSamples.unweighted(
        x, x[:, 0], role="evaluate", block=torch.tensor([0, 0, 1, 0, 0, 1]), chain=torch.tensor([0, 0, 0, 1, 1, 1])
    )
    works = Works.of_samples(samples, torch.arange(6.0), log_det_error=0.0)
    assert works.units.tolist() == [0, 0, 1, 2, 2, 3]
    assert works.chain.tolist() == [0, 0, 0, 1, 1, 1]
    assert works.rows(np.arange(2, 6)).units.tolist() == [0, 1, 1, 2]
    assert works.share(1 / 3, from_end=True).w.tolist() == [2.0, 5.0]
    inexact = Works.of_samples(replace(samples, log_det_error=None), torch.arange(6.0), log_det_error=0.0)
    with pytest.raises(InexactDensityError):
        inexact.require_exact()
    weighted = WeightedSamples(x, x[:, 0], torch.arange(6.0).double(), None, samples.block, samples.chain, "evaluate")
    with pytest.raises(InputError, match="samples that follow their state"):
        Works.of_samples(weighted, torch.arange(6.0), log_det_error=0.0)


def test_decorrelated_works_are_fewer_and_independent() -> None:
    generator = np.random.default_rng(5)
    noise, series = generator.normal(size=5000), np.zeros(5000)
    for k in range(1, 5000):
        series[k] = 0.9 * series[k - 1] + noise[k]  # (1 + 0.9)/(1 - 0.9) = 19 frames are worth one
    thin = made(series).decorrelated()
    assert 5000 / 19 / 2 < len(thin) < 5000 / 19 * 2
    assert thin.units.tolist() == list(range(len(thin)))
    clashing = made(np.where(generator.random(5000) < 0.01, 1e4, series), chain=np.repeat([0, 1], 2500)).decorrelated()
    assert 5000 / 19 / 2 < len(clashing) < 5000 / 19 * 2


def test_files_of_works_are_read(tmp_path: Path) -> None:
    path = tmp_path / "works.txt"
    path.write_text("# kJ/mol\n1.0\n2.5 # a comment\n\ninf\n")
    works = Works.read(path, unit="kJ/mol", temperature_kelvin=300.0)
    np.testing.assert_allclose(works.w, np.array([1.0, 2.5, np.inf]) / thermal_energy(300.0))
    assert Works.read(path, unit="kT").w[1] == 2.5
    for temperature in (None, -300.0, 0.0):
        with pytest.raises(InputError, match="need a temperature above 0 K"):
            Works.read(path, unit="kJ/mol", temperature_kelvin=temperature)
    with pytest.raises(InputError, match="kT or kJ/mol, got 'kcal/mol'"):
        Works.read(path, unit="kcal/mol")  # type: ignore[arg-type]
    path.write_text("1.0\none\n")
    with pytest.raises(InputError, match=r"works.txt, line 2: expected one work value, got 'one'"):
        Works.read(path, unit="kT")
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match=r"works.txt.*the 0 works form 0"):
        Works.read(path, unit="kT")
    with pytest.raises(InputError, match="cannot read"):
        Works.read(tmp_path / "none.txt", unit="kT")


@pytest.mark.parametrize("blocked", [True, False])
def test_blocks_know_the_memory_of_works(blocked: bool) -> None:
    """Errors of means over correlated normal works (memory 0.9): right in blocks, three to four times too small row by row."""
    generator, z = np.random.default_rng(5), []
    for _ in range(200):
        noise = generator.standard_normal(3000)
        w = lfilter([math.sqrt(1 - 0.9**2)], [1.0, -0.9], noise)[1000:]
        works = Works.of(w, role="evaluate", log_det_error=0.0, chain=np.repeat([0, 1], 1000))
        found = bound(works.blocked(at_least=1.0) if blocked else works)
        z.append(float(found.value) / float(found.stderr))
    spread = float(np.std(z))
    assert 0.85 < spread < 1.25 if blocked else spread > 2.5


def test_a_union_of_maps_is_one_estimate_of_the_same_rows() -> None:
    """Two wrong maps between normal states; rows that are repeated are no new data."""
    a, b = Gaussian(torch.zeros(1), covariance=torch.eye(1)), Gaussian(torch.ones(1), covariance=4 * torch.eye(1))
    truth = float(a.log_z) - float(b.log_z)  # type: ignore[arg-type]
    rows = {
        "a": a.sample(2000, generator=torch.Generator().manual_seed(1)),
        "b": b.sample(2000, generator=torch.Generator().manual_seed(2)),
    }
    pairs = []
    for shift, log_scale in ((0.7, 0.4), (1.4, 0.9)):
        flow = affine_flow(1)
        with torch.no_grad():
            flow.transform.shift.fill_(shift)  # type: ignore[operator, union-attr]
            flow.transform.log_scale.fill_(log_scale)  # type: ignore[operator, union-attr]
            bridge = Bridge(a, b, flow.transform)
            pairs.append(
                [Works.of(w, role="evaluate", log_det_error=0.0) for w in (bridge.works(rows["a"]), bridge.reverse_works(rows["b"]))]
            )
    forward, reverse = (Works.union(works) for works in zip(*pairs, strict=True))
    found = acceptance_ratio(forward, reverse, seed=1).difference
    assert_z(float(found.value), truth, float(found.stderr))
    for works, back in ((forward, False), (reverse, True)):
        one_sided = exponential_average(works, reverse=back, seed=1)
        assert_z(float(one_sided.value), truth, float(one_sided.stderr))
    assert forward.n_units == 2000
    once, twice = (exponential_average(w, seed=1) for w in (pairs[0][0], Works.union([pairs[0][0]] * 2)))
    assert float(twice.value) == pytest.approx(float(once.value))
    assert float(twice.stderr) == pytest.approx(float(once.stderr), rel=1e-6)
    with pytest.raises(InputError, match="same rows"):
        Works.union([forward, reverse.share(0.5)])


def test_blocks_are_as_long_as_asked() -> None:
    works = Works.of(np.random.default_rng(1).standard_normal(400), role="evaluate", log_det_error=0.0, chain=np.repeat([0, 1], 200))
    assert works.blocked(at_least=10.0).n_units == 8  # 200 rows of a chain in units of five times ten
    assert np.bincount(works.blocked(at_least=12.0).units).min() >= 60
    constant = Works.of(np.full(100, 2.0), role="evaluate", log_det_error=0.0)
    assert constant.statistical_inefficiency() == 1.0
    with pytest.raises(InputError, match="one independent unit"):
        constant.blocked(at_least=16.0)


def test_a_union_of_maps_keeps_the_memory_of_its_rows() -> None:
    """Blocks, halves and independent rows of a union are those of its rows: four equal maps say no more than one."""
    noise = np.random.default_rng(2).standard_normal(3000)
    w = lfilter([math.sqrt(1 - 0.9**2)], [1.0, -0.9], noise)[1000:]
    one = Works.of(w, role="evaluate", log_det_error=0.0)
    four = Works.union([one] * 4)
    assert four.statistical_inefficiency() == pytest.approx(one.statistical_inefficiency())
    blocked = four.blocked(at_least=1.0)
    assert blocked.n_units == one.blocked(at_least=1.0).n_units
    assert four.decorrelated().n_units == one.decorrelated().n_units
    assert float(bound(blocked).stderr) == pytest.approx(float(bound(one.blocked(at_least=1.0)).stderr))
    np.testing.assert_array_equal(four.share(0.5).w.reshape(-1, 4)[:, 0], one.share(0.5).w)
    with pytest.raises(InputError, match="same rows"):
        Works.union([four, four])
