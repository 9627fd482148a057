"""Averages and profiles from all tried paths, and profiles joined from basins, against quadrature on the 2-D toy."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from boltzgen.core import Estimate
from boltzgen.errors import InputError, ShapeError
from boltzgen.estimators.path_averages import path_profile, recycled_average
from boltzgen.estimators.path_free_energy import basin_free_energy
from boltzgen.estimators.profiles import Profile, stratified_profile
from boltzgen.paths import Paths
from tests.assertions import assert_z
from tests.path_tables import exact_cumulative, exact_difference, in_basins, left, right, table, toy

EDGES = np.array([-2.5, -1.6, -1.1, -0.8, -0.5, 0.0, 0.6, 1.0, 1.4, 2.0, 3.5])


@functools.cache
def walks() -> Paths:
    """2,000 walkers from global equilibrium, four moves each."""
    return table(toy().draw(2_000, torch.Generator().manual_seed(3)), n_moves=4, seed=4)


@functools.cache
def exact_profile() -> np.ndarray:
    return -np.log(np.diff(exact_cumulative(EDGES)) / np.diff(EDGES))


def check(profile: Profile, exact: np.ndarray) -> None:
    for index in range(len(exact)):
        if (index,) != profile.reference:
            assert_z(profile.free_energy[index], exact[index] - exact[profile.reference], profile.stderr[index])


def on_the_right(xi: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(xi[:, 0]), np.nan, xi[:, 0] > 0)


def test_recycled_averages_are_those_of_the_target() -> None:
    paths, exact = walks(), float(toy().expected[5])
    found = recycled_average(paths, on_the_right(paths.xi_start), on_the_right(paths.xi_end), name="right", seed=1)
    assert_z(float(found.value), exact, float(found.stderr))
    assert "global equilibrium" in found.note
    both = recycled_average(paths, np.tile(paths.xi_start, 2), np.tile(paths.xi_end, 2), seed=1)
    assert np.shape(both.value) == (2,)
    plain = recycled_average(paths, on_the_right(paths.xi_start), on_the_right(paths.xi_start), seed=1)
    assert_z(float(plain.value), exact, float(plain.stderr))
    assert float(found.stderr) < 1.02 * float(plain.stderr)


def test_wrong_twins_of_recycling_are_caught() -> None:
    """Ends of accepted paths alone, recycling with α = 1 for all, and walkers at the wrong populations."""
    paths, exact = walks(), float(toy().expected[5])
    accepted = paths.rows(paths.accepted)
    always = replace(paths, work=np.where(paths.failed, np.inf, -paths.log_proposal_ratio - 1.0))
    elsewhere = table(in_basins(6_000, 2_000, torch.Generator().manual_seed(1)), n_moves=1, seed=2)
    for wrong in (replace(accepted, work=accepted.work - 1e3), always, elsewhere):
        found = recycled_average(wrong, on_the_right(wrong.xi_start), on_the_right(wrong.xi_end), seed=1)
        with pytest.raises(AssertionError):
            assert_z(float(found.value), exact, float(found.stderr))


def test_profile_by_waste_recycling() -> None:
    profile = path_profile(walks(), EDGES, name="xi", reference=2, seed=1)
    check(profile, exact_profile())
    assert profile.outside == pytest.approx(1 - np.diff(exact_cumulative(EDGES[[0, -1]]))[0], abs=0.02)
    paths = walks()
    starts = path_profile(replace(paths, work=np.full(len(paths), np.inf)), EDGES, reference=2, seed=1)  # nothing recycled
    assert profile.stderr[5] < starts.stderr[5]
    ends = replace(paths, work=np.where(paths.failed, np.inf, -1e3 - paths.log_proposal_ratio))
    with pytest.raises(AssertionError):
        check(path_profile(ends, EDGES, reference=2, seed=1), exact_profile())


def test_periodic_profile_does_not_depend_on_where_a_turn_begins() -> None:
    """ξ on a circle of circumference 4, shifted by whole turns at random."""
    paths, generator = walks(), np.random.default_rng(1)
    turned = replace(paths, xi_start=paths.xi_start + 4 * generator.integers(-2, 3, (len(paths), 1)))
    edges = np.linspace(-2, 2, 9)
    wound = np.array([np.diff(exact_cumulative(edges + 4 * turn)) for turn in (-2, -1, 0, 1, 2)]).sum(axis=0)
    exact = -np.log(wound)
    for table_, cuts in ((turned, edges), (paths, edges)):
        check(path_profile(table_, cuts, periods=(4.0,), reference=2, seed=1), exact)
    later = path_profile(turned, edges + 1, periods=(4.0,), reference=0, seed=1)
    check(later, np.roll(exact, -2))
    assert later.outside == 0
    with pytest.raises(InputError, match="within one turn"):
        path_profile(paths, np.linspace(-3, 3, 9), periods=(4.0,), seed=1)


def test_basins_joined_by_paths_give_the_profile_at_any_populations() -> None:
    paths = table(in_basins(16_000, 6_000, torch.Generator().manual_seed(5)), n_moves=1, seed=6)
    found = basin_free_energy(paths, left, right, n_bootstrap=60, seed=1)
    xi, a = paths.xi_start[:, 0], left(paths.xi_start)
    basins, units = (xi[a], xi[~a]), (paths.walker[a], paths.walker[~a])
    profile = stratified_profile(basins, units, [found.difference], edges=EDGES, reference=2, seed=1)
    check(profile, exact_profile())
    known = stratified_profile(basins, units, [replace(found.difference, stderr=0.0)], edges=EDGES, reference=2, seed=1)
    error = float(found.difference.stderr)
    assert profile.stderr[7] == pytest.approx(math.hypot(known.stderr[7], error), rel=0.25)  # across: the difference counts
    assert profile.stderr[1] == pytest.approx(known.stderr[1], rel=1e-6)  # within: it does not
    counted = stratified_profile(basins, units, [Estimate("counts", math.log(16 / 6), error, "kT", 1.0)], edges=EDGES, reference=2, seed=1)
    with pytest.raises(AssertionError):
        check(counted, exact_profile())
    assert profile.outside == pytest.approx(1 - np.diff(exact_cumulative(EDGES[[0, -1]]))[0], abs=0.01)


def test_errors_of_a_joined_profile_cover() -> None:
    generator, z, repeats = torch.Generator().manual_seed(7), [], 100
    numbers, edges = np.random.default_rng(8), np.array([-3.0, -0.8, 0.0, 1.2, 4.0])
    exact = -np.log(np.diff(exact_cumulative(edges)) / np.diff(edges))
    for seed in range(repeats):
        xi = toy().variables(in_basins(300, 100, generator))[:, 0].numpy()
        units = np.arange(400)
        guess = Estimate("F", exact_difference() + 0.1 * numbers.normal(), 0.1, "kT", 1.0)
        profile = stratified_profile(
            (xi[:300], xi[300:]), (units[:300], units[300:]), [guess], edges=edges, reference=1, n_bootstrap=60, seed=seed
        )
        z.append((profile.free_energy[3] - exact[3] + exact[1]) / profile.stderr[3])
    assert abs(np.mean(z)) < 4.5 / math.sqrt(repeats)
    assert abs(np.std(z) - 1) < 4.5 / math.sqrt(2 * repeats)


def test_bad_input_is_named() -> None:
    paths = walks().rows(walks().walker < 50)
    xi = paths.xi_start[:, 0]
    with pytest.raises(ShapeError, match=r"expected values \[200\]"):
        recycled_average(paths, xi, xi[:-1], seed=1)
    with pytest.raises(InputError, match="the value of path 3 is not finite"):
        recycled_average(paths, np.where(np.arange(200) == 3, np.nan, xi), xi, seed=1)
    with pytest.raises(InputError, match="no numbers"):
        recycled_average(replace(paths, work=np.full(200, np.nan)), xi, xi, seed=1)
    one = paths.rows(paths.walker == 0)
    with pytest.raises(InputError, match="form one block"):
        recycled_average(one, one.xi_start, one.xi_start, seed=1)
    unknown = Estimate("F", math.nan, math.inf, "kT", 0.0, note="no path started in B")
    with pytest.raises(InputError, match="no path started in B"):
        stratified_profile((xi, xi), (paths.walker, paths.walker), [unknown], edges=EDGES, seed=1)
    with pytest.raises(ShapeError, match="2 basins"):
        stratified_profile((xi,), (paths.walker,), [replace(unknown, value=0.0, stderr=0.1)], edges=EDGES, seed=1)
    with pytest.raises(InputError, match="basin 1"):
        stratified_profile((xi, xi[:1]), (paths.walker, paths.walker[:1]), [replace(unknown, value=0.0, stderr=0.1)], edges=EDGES, seed=1)
