"""Free energies from all tried paths on the 2-D toy, where both differences are known by quadrature."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from boltzgen.core import Estimate
from boltzgen.errors import EnergyError, InputError, ShapeError
from boltzgen.estimators.path_free_energy import PathFreeEnergy, basin_free_energy, centre_free_energy, path_convergence
from boltzgen.estimators.path_works import PathWorks
from boltzgen.estimators.perturbation import acceptance_ratio
from boltzgen.estimators.timeseries import time_blocks
from boltzgen.estimators.works import Works
from boltzgen.paths import Paths
from tests.assertions import assert_z
from tests.path_tables import exact_centres, exact_cumulative, exact_difference, in_basins, left, right, table, toy


@functools.cache
def wrong_populations() -> Paths:
    """One path each of 24,000 walkers in the left basin and 8,000 in the right one, as if it were the stabler by ln 3."""
    return table(in_basins(24_000, 8_000, torch.Generator().manual_seed(1)), n_moves=1, seed=2)


@functools.cache
def long_walks() -> Paths:
    """100 walkers from global equilibrium, 60 moves each."""
    return table(toy().draw(100, torch.Generator().manual_seed(3)), n_moves=60, seed=4)


def close(estimate: Estimate, exact: float) -> None:
    assert_z(float(estimate.value), exact, float(estimate.stderr))


def test_what_is_exact_about_the_toy_agrees_with_its_samples() -> None:
    assert exact_difference() == pytest.approx(-math.log(1 / exact_cumulative(np.zeros(1))[0] - 1), abs=1e-8)
    x = toy().draw(200_000, torch.Generator().manual_seed(0))
    xi = toy().variables(x)[:, 0].numpy()
    for value in (-2.0, -0.7, 1.5):
        exact = float(exact_cumulative(np.array([value]))[0])
        assert_z(float((xi < value).mean()), exact, math.sqrt(exact * (1 - exact) / len(xi)))
    centre = xi + np.random.default_rng(1).normal(0, 0.5, len(xi))
    share = float((centre > 0).mean())
    assert_z(-math.log(share / (1 - share)), exact_centres()[0], 1 / math.sqrt(share * (1 - share) * len(xi)))


def test_basins_are_known_from_walkers_at_the_wrong_populations() -> None:
    found = basin_free_energy(wrong_populations(), left, right, seed=1)
    close(found.difference, exact_difference())
    close(found.flux, exact_difference())
    close(found.disagreement, 0.0)
    assert found.verdict.word == "reliable", found.verdict.reasons
    assert float(found.difference.stderr) < float(found.flux.stderr)
    assert found.bennett is not None
    close(found.bennett.mismatch, 0.0)
    assert abs(math.log(3) + exact_difference()) > 20 * float(found.difference.stderr)  # what counting walkers says is far off


def dropped_rejected(paths: Paths) -> Paths:
    return paths.rows(paths.accepted)


def other_sign_back(paths: Paths) -> Paths:
    return replace(
        paths, work=np.where(right(paths.xi_start) & np.isfinite(paths.work), -paths.work - 2 * paths.log_proposal_ratio, paths.work)
    )


def without_proposal(paths: Paths) -> Paths:
    return replace(paths, log_proposal_ratio=np.zeros(len(paths)))


@pytest.mark.parametrize("wrong", [dropped_rejected, other_sign_back, without_proposal])
def test_wrong_twins_of_basins_are_caught(wrong: Callable[[Paths], Paths]) -> None:
    found = basin_free_energy(wrong(wrong_populations()), left, right, n_bootstrap=60, seed=1)
    with pytest.raises(AssertionError):
        close(found.difference, exact_difference())
    if wrong is not without_proposal:
        assert found.verdict.word != "reliable"


def test_paths_that_connect_alone_give_the_crossing_and_not_the_difference() -> None:
    """Bennett's ratio of connecting paths is that of all paths plus ln(p_AB/p_BA), exactly; left out, it is a wrong twin."""
    found = basin_free_energy(wrong_populations(), left, right, seed=1)
    forward, reverse = (Works.of(w, role="evaluate", log_det_error=0.0) for w in (found.forward, found.reverse))
    alone = acceptance_ratio(forward, reverse, seed=1)
    shares = len(found.forward) / 24_000, len(found.reverse) / 8_000
    assert float(alone.difference.value) == pytest.approx(found.crossing, abs=1e-8)
    assert float(alone.difference.value) - math.log(shares[0] / shares[1]) == pytest.approx(float(found.difference.value), abs=1e-8)
    assert found.bennett is not None
    assert alone.overlap == pytest.approx(found.bennett.overlap, rel=1e-6)
    with pytest.raises(AssertionError):
        close(replace(found.difference, value=found.crossing), exact_difference())


def test_sets_of_centres_with_known_and_with_counted_shares_of_the_proposal() -> None:
    exact, masses = exact_centres()
    walks = table(toy().draw(30_000, torch.Generator().manual_seed(6)), n_moves=1, seed=7)
    thinned = walks.rows(left(walks.start) | (np.arange(len(walks)) % 3 == 0))  # two of three starts in B are left out
    for given in (masses, None):
        found = centre_free_energy(thinned, left, right, masses=given, n_bootstrap=60, seed=1)
        for estimate in (found.difference, found.flux):
            close(estimate, exact)
        assert found.verdict.word == "reliable", found.verdict.reasons
    assert abs(exact - exact_difference()) > 0.03  # sets of λ are not basins of x
    forgotten = centre_free_energy(thinned, left, right, masses=(0.5, 0.5), n_bootstrap=40, seed=1)
    with pytest.raises(AssertionError):
        close(forgotten.difference, exact)
    with pytest.raises(InputError, match="shares of the proposal"):
        centre_free_energy(thinned, left, right, masses=(0.0, 0.5), seed=1)


def coverage(experiment: Callable[[int], PathFreeEnergy], repeats: int) -> tuple[float, float]:
    """Mean and spread of z over repeats, those without a number left out."""
    z = []
    for seed in range(repeats):
        found = experiment(seed).difference
        if math.isfinite(float(found.stderr)):
            z.append((float(found.value) - exact_difference()) / float(found.stderr))
    assert len(z) > 0.95 * repeats
    return float(np.mean(z)), float(np.std(z))


def check_spread(mean: float, spread: float, repeats: int) -> None:
    assert abs(mean) < 4.5 / math.sqrt(repeats)
    assert abs(spread - 1) < max(0.1, 4.5 / math.sqrt(2 * repeats)), f"errors are {spread:.2f} of those stated"


def test_error_bars_cover_the_truth_at_the_wrong_populations() -> None:
    """100 repeats of 500 walkers on the left and 200 on the right, one path each."""
    repeats, n_left, n_right = 100, 500, 200
    generator = torch.Generator().manual_seed(8)
    paths = table(in_basins(repeats * n_left, repeats * n_right, generator), n_moves=1, seed=9)
    repeat = np.concatenate([np.arange(repeats * n_left) // n_left, np.arange(repeats * n_right) // n_right])
    parts = [paths.rows(repeat == k) for k in range(repeats)]
    check_spread(*coverage(lambda k: basin_free_energy(parts[k], left, right, n_bootstrap=60, seed=k), repeats), repeats)


@pytest.mark.slow
def test_error_bars_cover_the_truth_of_correlated_walks() -> None:
    """200 repeats of 16 walkers and 150 moves, which start where the last one ended, in A and in B by turns."""
    repeats, walkers, generator = 200, 16, torch.Generator().manual_seed(10)
    paths = table(toy().draw(repeats * walkers, generator), n_moves=150, seed=11)
    parts = [paths.rows(paths.walker // walkers == k) for k in range(repeats)]
    mean, spread = coverage(lambda k: basin_free_energy(parts[k], left, right, n_bootstrap=100, seed=k), repeats)
    assert abs(mean) < 4.5 / math.sqrt(repeats) + 0.15  # biased by 1/n
    assert 0.8 < spread < 1.25  # with 16 walkers and few blocks


def normal_paths(seed: int, *, sigma: float, memory: float, reach: float) -> Paths:
    """12 walkers that stay in A or in B, 100 moves each, some of which reach the other basin, with normal works that obey Crooks."""
    generator, walkers, moves = np.random.default_rng(seed), 12, 100
    white = generator.normal(size=(walkers, moves + 100))
    noise = math.sqrt(1 - memory**2) * lfilter([1.0], [1.0, -memory], white, axis=1)[:, 100:]
    side = np.repeat([-1.0, 1.0], walkers * moves // 2)
    work = sigma**2 / 2 - side * exact_difference() + sigma * noise.ravel()
    paths = made(work, starts=side, ends=np.where(generator.random(len(side)) < reach, -side, side))
    return replace(paths, walker=np.repeat(np.arange(walkers), moves), time=np.tile(np.arange(moves), walkers))


def test_error_bars_know_the_memory_of_walkers() -> None:
    repeats = 100
    parts = [normal_paths(seed, sigma=1.5, memory=0.9, reach=0.75) for seed in range(repeats)]
    mean, spread = coverage(lambda k: basin_free_energy(parts[k], left, right, n_bootstrap=60, seed=k), repeats)
    assert abs(mean) < 4.5 / math.sqrt(repeats)
    assert 0.7 < spread < 1.35  # a few dozen blocks know an error to a sixth
    alone = [replace(part, walker=np.arange(len(part)), time=np.zeros(len(part))) for part in parts]
    _, narrow = coverage(lambda k: basin_free_energy(alone[k], left, right, n_bootstrap=60, seed=k), 50)
    assert narrow > 2


def test_error_bars_hold_the_noise_of_how_many_paths_connect() -> None:
    """Works that hardly vary, one path in five connects: all of the error is that of p_AB and p_BA, without which it is far too small."""
    repeats, z = 100, []
    parts = [normal_paths(seed, sigma=0.3, memory=0.0, reach=0.2) for seed in range(repeats)]
    check_spread(*coverage(lambda k: basin_free_energy(parts[k], left, right, n_bootstrap=60, seed=k), repeats), repeats)
    for seed in range(30):
        found = basin_free_energy(parts[seed], left, right, n_bootstrap=20, seed=seed)
        forward, reverse = (Works.of(w, role="evaluate", log_det_error=0.0) for w in (found.forward, found.reverse))
        alone = acceptance_ratio(forward, reverse, n_bootstrap=60, seed=seed).difference
        z.append((float(found.difference.value) - exact_difference()) / float(alone.stderr))
    assert np.std(z) > 2


def test_walks_that_cross_share_units_and_agree() -> None:
    paths = long_walks()
    found = basin_free_energy(paths, left, right, seed=1)
    close(found.difference, exact_difference())
    works = PathWorks.of_basins(paths, left, right)
    both = np.intersect1d(works.units[works.from_a], works.units[~works.from_a])
    assert len(both) > 10
    assert len(np.unique(works.units)) <= len(paths) / 10
    curves = path_convergence(paths, left, right, n_shares=4, n_bootstrap=20, seed=1)
    assert curves.from_start[-1] == pytest.approx(float(found.difference.value))
    assert curves.from_end[-1] == curves.from_start[-1]
    assert_z(curves.from_end[1], exact_difference(), curves.from_end_error[1])
    with pytest.raises(InputError, match="even number of shares"):
        path_convergence(paths, left, right, n_shares=3, seed=1)


def made(w: Sequence[float], *, starts: Sequence[float], ends: Sequence[float], walker: list[int] | None = None) -> Paths:
    n, zeros = len(w), np.zeros(len(w))
    xi_start, xi_end = (np.array(values, dtype=np.float64)[:, None] for values in (starts, ends))
    chain, time = (np.arange(n), np.zeros(n, dtype=np.int64)) if walker is None else (np.array(walker), np.arange(n))
    return Paths(
        start=xi_start, end=xi_end, xi_start=xi_start, xi_end=xi_end, log_proposal_ratio=zeros, work=np.array(w),
        accepted=np.zeros(n, dtype=bool), walker=chain, time=time, n_force=np.ones(n, dtype=np.int64),
    )  # fmt: skip


def test_failed_paths_count_as_rejections() -> None:
    paths = wrong_populations()
    failed = np.random.default_rng(1).random(len(paths)) < 0.2
    broken = replace(paths, work=np.where(failed, np.inf, paths.work), xi_end=np.where(failed[:, None], np.nan, paths.xi_end))
    found = basin_free_energy(broken, left, right, n_bootstrap=60, seed=1)
    close(found.difference, exact_difference())  # paths that fail at random fail as often there as back
    assert len(found.forward) < 0.9 * len(basin_free_energy(paths, left, right, n_bootstrap=20, seed=1).forward)


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (made([0.0] * 4, starts=[-1, -1, 1, 1], ends=[1, 1, 1, 1]), "none of 2 paths from B ended in A"),
        (made([0.0, 0.0, np.inf, np.inf], starts=[-1, -1, 1, 1], ends=[1, 1, np.nan, np.nan]), "none of 2 paths from B ended in A"),
        (made([0.0] * 3, starts=[-1, -1, -1], ends=[1, 1, -1]), "no path started in B"),
        (made([0.0] * 4, starts=[-1, -1, 1, 1], ends=[1, 1, -1, -1], walker=[0, 0, 0, 0]), "form one independent unit"),
        (made([0.0] * 3, starts=[-1, -1, 1], ends=[1, 1, -1]), "from B form one independent unit"),
        (made([], starts=[], ends=[]), "no path started in A"),
    ],
)
def test_what_cannot_be_known_is_no_number(paths: Paths, reason: str) -> None:
    for found in (basin_free_energy(paths, left, right, seed=1), centre_free_energy(paths, left, right, masses=(0.5, 0.5), seed=1)):
        for estimate in (found.difference, found.flux, found.disagreement):
            assert math.isnan(float(estimate.value))
            assert estimate.stderr == math.inf
        assert found.verdict.word != "reliable"
        assert found.bennett is None
    assert reason in basin_free_energy(paths, left, right, seed=1).difference.note


def test_one_walker_that_crosses_often_is_enough() -> None:
    paths = long_walks()
    order = np.lexsort((paths.time, paths.walker))
    one = replace(paths.rows(order), walker=np.zeros(len(paths), dtype=np.int64), time=np.arange(len(paths)))
    close(basin_free_energy(one, left, right, n_bootstrap=60, seed=1).difference, exact_difference())


def test_bad_input_is_named() -> None:
    good = made([0.0] * 4, starts=[-1, -1, 1, 1], ends=[1, 1, -1, -1])
    assert float(basin_free_energy(good, left, right, seed=1).difference.value) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(InputError, match="apart from each other"):
        basin_free_energy(good, left, lambda xi: xi[:, 0] > -2, seed=1)
    with pytest.raises(ShapeError, match=r"expected bool \[4\]"):
        basin_free_energy(good, left, lambda xi: xi > 0, seed=1)
    with pytest.raises(ShapeError, match="expected 1 periods"):
        basin_free_energy(good, left, right, periods=(None, 1.0), seed=1)
    with pytest.raises(EnergyError, match=r"1 of 4 paths have works that are no numbers, in rows \[1\]"):
        basin_free_energy(replace(good, work=np.array([0.0, np.nan, 0.0, 0.0])), left, right, seed=1)


def test_units_of_both_directions_are_drawn_together() -> None:
    """Reverse works that are forward ones once more: their noise cancels or adds, which separate units cannot know."""
    generator = np.random.default_rng(1)
    forward = Works.of(generator.normal(0.5, 1, 2000), role="evaluate", log_det_error=0.0)
    twice = np.tile(np.arange(2000), 2)
    together = acceptance_ratio(forward, forward, shared_units=twice, seed=1)
    apart = acceptance_ratio(forward, forward, seed=1)
    assert float(together.difference.value) == pytest.approx(0.0, abs=1e-9)
    assert float(together.difference.stderr) < 1e-6 < 0.01 < float(apart.difference.stderr)
    separate = acceptance_ratio(forward, forward, shared_units=np.arange(4000), seed=1)
    assert float(separate.difference.stderr) == pytest.approx(float(apart.difference.stderr), rel=0.2)
    assert len(apart.replicates) == 200


def test_blocks_of_time_are_five_memories_long_and_never_mix_chains() -> None:
    generator, n = np.random.default_rng(2), 4000
    noise = generator.normal(size=(4, n))
    slow = lfilter([1.0], [1.0, -0.9], noise, axis=1)  # statistical inefficiency 19
    chain, time = np.repeat(np.arange(4), n), np.tile(np.arange(n), 4)
    shuffled = generator.permutation(4 * n)
    units = time_blocks(chain[shuffled], time[shuffled], np.column_stack([slow.ravel(), noise.ravel()])[shuffled])
    sizes = np.bincount(units)
    assert 60 < sizes.mean() < 140
    assert len(np.unique(np.stack([units, chain[shuffled]]), axis=1).T) == len(sizes)
    first = units[(chain[shuffled] == 0) & (time[shuffled] < 50)]
    assert len(np.unique(first)) == 1
    assert time_blocks(chain, time, noise.reshape(-1, 1)).max() > 1500
    assert time_blocks(chain, time, np.ones((4 * n, 1)), at_least=1000.0).tolist() == chain.tolist()
    assert time_blocks(chain, time, (chain + 0.01 * noise.ravel())[:, None]).tolist() == chain.tolist()
    uneven = np.arange(10_000)
    assert time_blocks(chain[uneven], time[uneven], slow.ravel()[uneven, None]).max() > 60
    with pytest.raises(EnergyError, match="row 3"):
        time_blocks(chain[:5], time[:5], np.array([0.0, 1.0, 2.0, np.nan, 1.0])[:, None])
