"""The profile from everything that paths pass, against quadrature on the 2-D toy, at any populations of the basins."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from boltzgen.errors import InputError, ShapeError
from boltzgen.estimators.path_averages import path_profile
from boltzgen.estimators.path_free_energy import basin_free_energy
from boltzgen.estimators.profiles import Profile
from boltzgen.estimators.profiles_along import profile_along_paths
from boltzgen.paths import Looks, Paths, Restraint, Schedule
from tests.assertions import assert_z
from tests.path_tables import STIFFNESS, exact_cumulative, in_basins, left, right, steered, watched

EDGES = np.array([-2.5, -1.6, -1.1, -0.8, -0.5, -0.2, 0.2, 0.6, 1.0, 1.4, 2.0, 3.5])
BASINS, RESTRAINT = (left, right), Restraint([STIFFNESS], (None,))


@functools.cache
def seen() -> tuple[Paths, Looks]:
    """Starts from equilibrium within each basin, of which the left one holds far too many."""
    return watched(in_basins(3_000, 1_000, torch.Generator().manual_seed(5)), n_moves=1, seed=6, apart=0.5)


@functools.cache
def exact() -> np.ndarray:
    return -np.log(np.diff(exact_cumulative(EDGES)) / np.diff(EDGES))


def along(paths: Paths, looks: Looks, seed: int = 1) -> Profile:
    return profile_along_paths(paths, looks, RESTRAINT, BASINS, edges=EDGES, reference=2, n_bootstrap=60, seed=seed)


def check(profile: Profile) -> None:
    for index in range(len(exact())):
        if (index,) != profile.reference:
            assert_z(profile.free_energy[index], exact()[index] - exact()[profile.reference], profile.stderr[index])


def test_the_profile_is_that_of_the_target_at_any_populations() -> None:
    paths, looks = seen()
    profile = along(paths, looks)
    check(profile)
    assert profile.outside == pytest.approx(1 - np.diff(exact_cumulative(EDGES[[0, -1]]))[0], abs=0.01)
    between = path_profile(paths, EDGES, reference=2, n_bootstrap=60, seed=1)
    assert profile.stderr[4] < 0.6 * between.stderr[4], "where few paths end, looks must know more than ends"


def visits(n_left: int, n_right: int) -> np.ndarray:
    """Two more draws from equilibrium within each basin for every path, and its own start."""
    values = [steered().init(in_basins(n_left, n_right, torch.Generator().manual_seed(seed))).xi.numpy() for seed in (8, 9)]
    return np.column_stack([*values, seen()[0].xi_start])


def test_what_walkers_visit_sharpens_the_profile_and_its_populations_do_not_count() -> None:
    paths, looks = seen()
    profile = profile_along_paths(
        paths, looks, RESTRAINT, BASINS, edges=EDGES, visited=visits(3_000, 1_000), reference=2, n_bootstrap=60, seed=1
    )
    check(profile)
    assert profile.stderr[5] < 0.8 * along(paths, looks).stderr[5]
    shuffled = np.random.default_rng(0).permutation(visits(3_000, 1_000) + 0.3)
    with pytest.raises(AssertionError):
        check(profile_along_paths(paths, looks, RESTRAINT, BASINS, edges=EDGES, visited=shuffled, reference=2, n_bootstrap=60, seed=1))
    with pytest.raises(ShapeError, match="visits"):
        profile_along_paths(paths, looks, RESTRAINT, BASINS, edges=EDGES, visited=shuffled[1:], seed=1)


def test_wrong_twins_are_caught() -> None:
    """Looks without their work or with half of it, and populations as counted."""
    paths, looks = seen()
    one_set = profile_along_paths(paths, looks, RESTRAINT, [lambda xi: xi[:, 0] < 9], edges=EDGES, reference=2, n_bootstrap=60, seed=1)
    for wrong in (along(paths, replace(looks, work=0 * looks.work)), along(paths, replace(looks, work=0.5 * looks.work)), one_set):
        with pytest.raises(AssertionError):
            check(wrong)


def test_sets_are_as_far_apart_as_the_acceptance_ratio_says() -> None:
    """Bins that are the basins: the same equation, solved twice."""
    paths, looks = seen()
    none = Looks(*(values[:0] for values in looks.arrays().values()))
    found = basin_free_energy(paths, left, right, n_bootstrap=60, seed=1).difference
    wide = np.array([-30.0, 0.0, 30.0])
    profile = profile_along_paths(paths, looks, RESTRAINT, BASINS, edges=wide, reference=0, n_bootstrap=60, seed=1)
    ends = profile_along_paths(paths, none, RESTRAINT, BASINS, edges=wide, reference=0, n_bootstrap=60, seed=1)
    for one in (profile, ends):
        assert abs(one.free_energy[1] - float(found.value)) < 2 * float(found.stderr)
        assert one.stderr[1] == pytest.approx(float(found.stderr), rel=0.5)


@pytest.mark.slow
def test_errors_cover() -> None:
    z = []
    for seed in range(60):
        paths, looks = watched(in_basins(300, 100, torch.Generator().manual_seed(seed)), n_moves=1, seed=seed, apart=0.5)
        profile = along(paths, looks, seed)
        z.append((profile.free_energy - exact() + exact()[2])[[4, 5, 8]] / profile.stderr[[4, 5, 8]])
    scores = np.array(z)
    assert (np.abs(scores.mean(axis=0)) < 4 / math.sqrt(len(z))).all(), scores.mean(axis=0)
    assert (np.abs(scores.std(axis=0) - 1) < 0.35).all(), scores.std(axis=0)


def test_looks_are_the_same_from_both_ends() -> None:
    schedule = Schedule(70, span=(1.0,), looks=(0.1,))
    way = torch.tensor([[0.01], [0.33], [-0.72], [1.0], [0.0]], dtype=torch.float64)
    for steps, n in zip(schedule.looked_at(way), schedule.steps(way).tolist(), strict=True):
        assert steps == tuple(sorted(n - k for k in steps))
        assert all(0 < k < n for k in steps)
    assert schedule.looked_at(way) == schedule.looked_at(-way)
    assert len(schedule.looked_at(way)[3]) == 10
    assert Schedule(70).looked_at(way) == [()] * 5


def test_bad_input_is_named() -> None:
    paths, looks = seen()
    with pytest.raises(InputError, match="other moves or walkers"):
        along(paths, replace(looks, time=looks.time + 1))
    with pytest.raises(ShapeError, match="one variable"):
        profile_along_paths(paths, looks, Restraint([1.0, 1.0], (None, None)), BASINS, edges=EDGES, seed=1)
    with pytest.raises(InputError, match="two of them"):
        profile_along_paths(paths, looks, RESTRAINT, [left, left], edges=EDGES, seed=1)
