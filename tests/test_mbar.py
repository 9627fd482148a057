"""MBAR against harmonic oscillators, f_k = ½ ln k."""

from __future__ import annotations

import numpy as np
import pytest

from boltzgen.errors import EnergyError, ShapeError
from boltzgen.estimators.mbar import MbarFreeEnergies, mbar_free_energies
from tests.assertions import assert_z

STIFFNESS = np.array([1.0, 4.0, 9.0])
COUNTS = np.array([1500, 1000, 2000])


def oscillators(*, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=n) / np.sqrt(k) for n, k in zip(COUNTS, STIFFNESS, strict=True)])
    return x, 0.5 * STIFFNESS[:, None] * x**2


def check(result: MbarFreeEnergies) -> None:
    for k in (1, 2):
        assert_z(result.f[k], 0.5 * np.log(STIFFNESS[k]), float(np.sqrt(result.covariance[k, k])), n_sigma=4)


def test_free_energies_of_oscillators() -> None:
    _, u = oscillators(seed=1)
    result = mbar_free_energies(u, COUNTS)
    check(result)
    assert result.covariance[0].tolist() == [0, 0, 0]
    assert 0.1 < result.overlap < 1
    assert result.free_energy(u[2]) == pytest.approx(result.f[2], abs=1e-6)
    with pytest.raises(AssertionError):
        check(mbar_free_energies(u, COUNTS[::-1]))


def test_error_bars_cover() -> None:
    z = []
    for seed in range(60):
        result = mbar_free_energies(oscillators(seed=seed)[1], COUNTS)
        z.append((result.f[2] - np.log(3.0)) / np.sqrt(result.covariance[2, 2]))
    assert 0.7 < np.std(z) < 1.35
    assert abs(np.mean(z)) < 0.6


def test_expectations_in_a_state_that_was_not_sampled() -> None:
    x, u = oscillators(seed=2)
    w = np.exp(mbar_free_energies(u, COUNTS).log_weights(0.5 * 2.0 * x**2))
    assert w.sum() == pytest.approx(1.0)
    stderr = np.sqrt(np.sum(w**2 * (x**2 - w @ x**2) ** 2))
    assert_z(float(w @ x**2), 0.5, float(stderr))


def test_infinite_energies_weigh_nothing() -> None:
    """State 1 is state 0 with a wall at x < 0: f = ln 2."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(size=4000), np.abs(rng.normal(size=4000))])
    u = np.stack([0.5 * x**2, np.where(x < 0, np.inf, 0.5 * x**2)])
    result = mbar_free_energies(u, [4000, 4000])
    assert_z(result.f[1], np.log(2.0), float(np.sqrt(result.covariance[1, 1])))
    assert (np.exp(result.log_weights(u[1]))[x < 0] == 0).all()


def test_bad_energies_are_named() -> None:
    _, u = oscillators(seed=4)
    for bad in (np.nan, -np.inf):
        spoilt = u.copy()
        spoilt[1, 7] = bad
        with pytest.raises(EnergyError, match=r"\[1, 7\]"):
            mbar_free_energies(spoilt, COUNTS)
    spoilt = u.copy()
    spoilt[:, 7] = np.inf
    with pytest.raises(EnergyError, match="sample 7"):
        mbar_free_energies(spoilt, COUNTS)
    with pytest.raises(ShapeError, match="counts"):
        mbar_free_energies(u, [1, 2, 3])
    with pytest.raises(ShapeError, match="all 4500 samples"):
        mbar_free_energies(u, COUNTS).log_weights(u[0, :5])
