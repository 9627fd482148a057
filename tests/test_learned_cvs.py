"""Linear variables learned from trajectories."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from boltzgen.cvs import CollectiveVariables, Dihedral, Distance, linear_features, principal_components, time_lagged_components
from boltzgen.errors import ConfigError, ShapeError

FEATURES = linear_features([Dihedral("phi", (0, 1, 2, 3)), Distance("d", (0, 4))])


def two_scales(rng: np.random.Generator, *, n: int, decay: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """Independent autoregressive sequences of unit variance, mixed linearly into three features."""
    latent = np.zeros((n, len(decay)))
    for t in range(1, n):
        latent[t] = decay * latent[t - 1] + np.sqrt(1 - decay**2) * rng.normal(size=len(decay))
    return latent @ mixing.T + np.array([0.5, -0.2, 1.0])


def test_features_are_sines_and_cosines_of_what_is_periodic() -> None:
    assert FEATURES.names == ("cos(phi)", "sin(phi)", "d")


def test_principal_components_diagonalise_the_covariance() -> None:
    x = torch.randn(500, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = FEATURES(x).numpy()
    found = principal_components(FEATURES, [rows[:200], rows[200:]], n_components=3)
    values = found(x).numpy()
    np.testing.assert_allclose(values.mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.cov(values.T), np.diag(np.linalg.eigvalsh(np.cov(rows.T))[::-1]), atol=1e-12)
    assert found.names == ("pc1", "pc2", "pc3")
    assert found.units == ("1", "1", "1")
    assert found.periods == (None, None, None)


def test_trajectories_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[n, 3\] of the features cos\(phi\), sin\(phi\), d, got shapes \[\[5, 2\]\]"):
        principal_components(FEATURES, [np.zeros((5, 2))], n_components=1)
    with pytest.raises(ShapeError, match="finite"):
        principal_components(FEATURES, [np.full((5, 3), np.nan)], n_components=1)
    still = np.random.default_rng(0).normal(size=(9, 3)) * [1.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match="expected 1 to 2 components"):
        principal_components(FEATURES, [still], n_components=3)


def test_time_lagged_components_are_the_slow_ones_not_the_large_ones() -> None:
    pytest.importorskip("deeptime")
    mixing = np.array([[0.1, 3.0, 0.4], [0.2, -1.0, 0.1], [0.1, 0.5, 0.9]])  # the slow sequence is the smallest part of all features
    rng = np.random.default_rng(4)
    trajectories = [two_scales(rng, n=5000, decay=np.array([0.98, 0.3, 0.0]), mixing=mixing) for _ in range(3)]
    (slow,) = time_lagged_components(FEATURES, trajectories, lag=5, n_components=1)
    (large,) = principal_components(FEATURES, trajectories, n_components=1)
    expected = np.linalg.inv(mixing)[0]
    cosine = np.dot(slow.weights, expected) / np.linalg.norm(slow.weights) / np.linalg.norm(expected)
    assert abs(cosine) > 0.99
    assert abs(np.dot(large.weights, expected) / np.linalg.norm(expected)) < 0.9
    values = np.concatenate(trajectories) @ slow.weights + slow.offset
    assert (values.mean(), values.std()) == pytest.approx((0.0, 1.0), abs=1e-8)
    with pytest.raises(ShapeError, match="more frames than that"):
        time_lagged_components(FEATURES, trajectories, lag=9000, n_components=1)


def test_without_deeptime_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deeptime.decomposition", None)
    with pytest.raises(ConfigError, match="pip install deeptime; or use principal_components"):
        time_lagged_components(CollectiveVariables(FEATURES), [np.zeros((5, 3))], lag=1, n_components=1)
