"""Diagnostics of paths, and convergence of chains, against chains that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from boltzgen.errors import EnergyError, InputError, ShapeError
from boltzgen.estimators.chain_convergence import chain_effective_sample_size, split_r_hat
from boltzgen.estimators.path_diagnostics import path_diagnostics
from boltzgen.paths import Paths
from tests.assertions import assert_z
from tests.path_tables import left, right, table, toy


def walk(states: list[list[int]], **more: np.ndarray) -> Paths:
    """Walkers that are at the given places in turn, and whose last path is not accepted."""
    places = np.array(states, dtype=np.float64)
    n = places.size
    xi = places.reshape(n, 1)
    columns = {
        "start": xi, "end": -xi, "xi_start": xi, "xi_end": -xi, "log_proposal_ratio": np.zeros(n), "work": np.ones(n),
        "accepted": np.zeros(n, dtype=bool), "walker": np.repeat(np.arange(len(places)), places.shape[1]),
        "time": np.tile(np.arange(places.shape[1]), len(places)), "n_force": np.full(n, 10),
    }  # fmt: skip
    return Paths(**{**columns, **more})


def middle_left(xi: np.ndarray) -> np.ndarray:
    return xi[:, 0] < -0.5


def middle_right(xi: np.ndarray) -> np.ndarray:
    return xi[:, 0] > 0.5


def test_crossings_and_round_trips_are_counted_from_set_to_set() -> None:
    paths = walk([[-1, 0, -1, 0, 1, 1], [1, -1, 1, -1, 0, 0], [0, 0, 0, 0, 0, 1]])
    found = path_diagnostics(paths, middle_left, middle_right, n_bootstrap=20, seed=1)
    assert found.crossings.tolist() == [1, 3, 0]
    assert found.round_trips.tolist() == [0, 1, 0]
    last = (paths.time == 5) & (paths.walker == 0)
    ended = path_diagnostics(replace(paths, accepted=last), middle_left, middle_right, n_bootstrap=20, seed=1)
    assert ended.crossings.tolist() == [2, 3, 0]
    assert (found.accepted_crossings, ended.accepted_crossings) == (0, 1)
    assert ended.force_evaluations == {"accepted": 10, "rejected": 170, "failed": 0}
    shuffled = np.random.default_rng(0).permutation(len(paths))
    again = path_diagnostics(paths.rows(shuffled), middle_left, middle_right, n_bootstrap=20, seed=1)
    assert again.crossings.tolist() == [1, 3, 0]
    assert again.ess == pytest.approx(found.ess)


def test_the_acceptance_identity_holds_at_stationarity_and_finds_where_it_does_not() -> None:
    paths = table(toy().draw(20_000, torch.Generator().manual_seed(1)), n_moves=1, seed=2)
    found = path_diagnostics(paths, left, right, n_bootstrap=60, seed=1)
    assert_z(float(found.identity.value), 0.0, float(found.identity.stderr))
    assert_z(float(paths.accepted.mean()), float(found.acceptance.value), math.sqrt(0.25 / len(paths)))
    assert np.isnan(found.r_hat).all()
    forgotten = replace(paths, log_proposal_ratio=0 * paths.log_proposal_ratio)
    squeezed = table(0.7 * toy().draw(20_000, torch.Generator().manual_seed(1)), n_moves=1, seed=2)
    for wrong in (forgotten, squeezed):
        doubted = path_diagnostics(wrong, left, right, seed=1)
        with pytest.raises(AssertionError):
            assert_z(float(doubted.identity.value), 0.0, float(doubted.identity.stderr))
        assert any("2 P(w < 0)" in warning for warning in doubted.warnings)


def test_walkers_that_never_cross_and_proposals_of_one_basin_are_warned_of() -> None:
    generator = np.random.default_rng(3)
    places = np.sign([[-1.0], [-1.0], [1.0], [1.0]]) * (2 + 0.1 * generator.normal(size=(4, 200)))
    stuck = walk(places.tolist(), end=np.full((800, 1), -2.0))
    found = path_diagnostics(stuck, middle_left, middle_right, n_bootstrap=20, seed=1)
    text = " ".join(found.warnings)
    assert "no walker went from one basin to the other" in text
    assert "0 % of paths to basin B: it covers one basin only" in text
    assert "basin A: it covers" not in text
    assert "R-hat" in text
    assert found.r_hat[0] > 1.05
    assert found.ess[0] < 20
    assert found.proposed == (1.0, 0.0)
    mixed = generator.choice([-2.0, 2.0], size=(4, 200)) + 0.1 * generator.normal(size=(4, 200))
    good = path_diagnostics(walk(mixed.tolist(), work=generator.choice([-5.0, math.log(2)], size=800)), middle_left, middle_right, seed=1)
    assert [one for one in good.warnings if "2 P" not in one] == []
    assert good.ess[0] > 500


def test_failed_paths_are_counted_and_one_walker_has_no_error() -> None:
    paths = walk([[-1, 1, -1, 1, -1, 1]])
    failed = paths.time < 2
    broken = replace(paths, work=np.where(failed, np.inf, 1.0), xi_end=np.where(failed[:, None], np.nan, paths.xi_end))
    found = path_diagnostics(broken, left, right, n_bootstrap=20, seed=1)
    assert found.n_failed == 2
    assert found.force_evaluations == {"accepted": 0, "rejected": 40, "failed": 20}
    assert any("2 of 6 paths failed" in warning for warning in found.warnings)
    assert found.acceptance.stderr == math.inf
    with pytest.raises(InputError, match="got none"):
        path_diagnostics(broken.rows(np.zeros(6, dtype=bool)), left, right, seed=1)


def test_periodic_variables_are_judged_on_the_circle() -> None:
    """Walkers about the angle π, written on both sides of the cut: as numbers they jump, as angles they stand still."""
    angles = math.pi + 0.1 * np.random.default_rng(1).normal(size=(4, 400))
    drift = angles + np.array([[0.0], [0.0], [0.3], [0.3]])
    for values, agree in ((angles, True), (drift, False)):
        cut = np.remainder(values + math.pi, 2 * math.pi) - math.pi
        found = path_diagnostics(walk(cut.tolist()), left, right, periods=(2 * math.pi,), n_bootstrap=20, seed=1)
        assert (found.r_hat[0] < 1.05) == agree


# ---------------------------------------------------------------- convergence of chains


def autoregressive(rho: float, shape: tuple[int, int], *, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(shape[0], shape[1] + 200))
    return lfilter([math.sqrt(1 - rho**2)], [1.0, -rho], noise, axis=1)[:, 200:]


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.4])
def test_effective_sample_size_of_autoregressive_chains(rho: float) -> None:
    """S (1 − ρ)/(1 + ρ), known to a few per cent."""
    shape = (8, 5000)
    found = np.mean([chain_effective_sample_size(autoregressive(rho, shape, seed=seed)) for seed in range(4)])
    assert found == pytest.approx(shape[0] * shape[1] * (1 - rho) / (1 + rho), rel=0.1)
    assert split_r_hat(autoregressive(rho, shape, seed=5)) < 1.02


def test_r_hat_sees_location_spread_and_drift() -> None:
    noise = np.random.default_rng(2).normal(size=(4, 1000))
    shifted, wider, drifting = noise.copy(), noise.copy(), noise + np.linspace(-1, 1, 1000)
    shifted[0] += 1
    wider[0] *= 4
    assert split_r_hat(noise) < 1.01
    for wrong in (shifted, wider, drifting):
        assert split_r_hat(wrong) > 1.05
    assert split_r_hat(np.exp(8 * shifted)) == pytest.approx(split_r_hat(shifted), abs=0.02)  # ranks know no tails
    assert chain_effective_sample_size(shifted) < 100 < chain_effective_sample_size(noise)


def test_r_hat_is_that_of_its_definition() -> None:
    """Normal scores of four half chains by hand: means ±m make B, the scatter W."""
    x = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    scores = [NormalDist().inv_cdf((rank - 0.375) / 8.25) for rank in range(1, 9)]
    first, second = np.array(scores[:4]), np.array(scores[4:])
    within = (first.var(ddof=1) + second.var(ddof=1)) / 2
    between = np.var([first.mean(), second.mean()], ddof=1)
    assert split_r_hat(x) == pytest.approx(math.sqrt(0.75 + between / within))


def test_chains_that_stand_still_say_so() -> None:
    assert math.isnan(split_r_hat(np.ones((3, 10))))
    assert math.isnan(chain_effective_sample_size(np.ones((3, 10))))
    apart = np.repeat([[0.0], [1.0], [2.0]], 10, axis=1)
    assert split_r_hat(apart) == math.inf
    assert chain_effective_sample_size(apart) < 6
    with pytest.raises(ShapeError, match="at least 4 draws"):
        split_r_hat(np.ones((3, 3)))
    with pytest.raises(EnergyError, match=r"draw \[0, 1\]"):
        chain_effective_sample_size(np.array([[0.0, np.nan, 1.0, 2.0]]))
