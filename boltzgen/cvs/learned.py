"""Linear variables learned from trajectories: principal components and time-lagged independent components."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from boltzgen.cvs.combination import Combination, Cosine, Sine
from boltzgen.cvs.variable import CollectiveVariable, CollectiveVariables
from boltzgen.errors import ConfigError, ShapeError


def linear_features(variables: Iterable[CollectiveVariable]) -> CollectiveVariables:
    """What linear variables are learned from: cosine and sine of every periodic variable, the others as they are.

    Raises:
        ConfigError: If a periodic variable is not an angle in rad.
    """
    features: list[CollectiveVariable] = []
    for variable in variables:
        features += [variable] if variable.period is None else [Cosine(variable), Sine(variable)]
    return CollectiveVariables(features)


def principal_components(
    features: CollectiveVariables, trajectories: Sequence[np.ndarray], *, n_components: int, name: str = "pc"
) -> CollectiveVariables:
    """The directions in which features vary most: eigenvectors of their covariance, the largest eigenvalue first.

    Args:
        features: What the columns are, such as :func:`linear_features` of dihedrals and distances. They should be of one scale:
            components of lengths in nm among sines and cosines hardly see the lengths.
        trajectories: Their values, ``[n_i, k]`` each.
        n_components: How many components.
        name: Components are called name1, name2, …

    Returns:
        Components with mean 0 over the trajectories and orthonormal weights; the largest weight of each is positive.

    Raises:
        ShapeError: If the trajectories do not fit the features.
        ConfigError: If there are fewer directions than components.
    """
    rows = np.concatenate(_checked(features, trajectories))
    mean = rows.mean(0)
    _, strengths, directions = np.linalg.svd(rows - mean, full_matrices=False)
    varying = int((strengths > 1e-12 * max(strengths.max(), np.abs(rows).max())).sum())
    if not 1 <= n_components <= varying:
        raise ConfigError(f"expected 1 to {varying} components, as many as there are directions in which the {len(features)} features of "
                          f"{len(rows)} frames vary, got {n_components}")  # fmt: skip
    weights = _signed(directions[:n_components])
    return _combinations(features, weights, -weights @ mean, name)


def time_lagged_components(
    features: CollectiveVariables, trajectories: Sequence[np.ndarray], *, lag: int, n_components: int, name: str = "tic"
) -> CollectiveVariables:
    """The slowest linear functions of features (TICA), by deeptime.

    Args:
        features: What the columns are, such as :func:`linear_features` of dihedrals and distances.
        trajectories: Their values, ``[n_i, k]`` each, frames at equal times.
        lag: Lag time in frames.
        n_components: How many components.
        name: Components are called name1, name2, …

    Returns:
        Components with mean 0 and variance 1 over the trajectories, the slowest first; the largest weight of each is positive.

    Raises:
        ConfigError: If deeptime is not installed, or finds fewer components.
        ShapeError: If the trajectories do not fit the features, or none is longer than the lag.

    References:
        Pérez-Hernández, Paul, Giorgino, De Fabritiis & Noé, J. Chem. Phys. 139, 015102 (2013).
    """
    try:
        from deeptime.decomposition import TICA
    except ImportError as error:
        raise ConfigError(f"time-lagged components need the package deeptime ({error}): pip install deeptime; or use "
                          f"principal_components") from None  # fmt: skip
    checked = [rows for rows in _checked(features, trajectories) if len(rows) > lag]
    if lag < 1 or not checked:
        raise ShapeError(f"expected a lag of 1 or more and a trajectory of more frames than that, got lag {lag} and trajectories of "
                         f"{[len(rows) for rows in trajectories]} frames")  # fmt: skip
    model = TICA(lagtime=lag, dim=n_components, scaling=None).fit_fetch(checked)
    probe = np.concatenate([np.zeros((1, len(features))), np.eye(len(features))])
    at_zero, *at_unit = np.asarray(model.transform(probe), dtype=np.float64)  # an affine map is known from its values there
    directions = (np.stack(at_unit) - at_zero).T
    if len(directions) < n_components:
        raise ConfigError(f"expected {n_components} components, but deeptime finds {len(directions)} in {len(features)} features")
    spread = np.concatenate(checked) @ directions.T
    weights = _signed(directions / spread.std(0)[:, None])
    return _combinations(features, weights, -weights @ np.concatenate(checked).mean(0), name)


def _checked(features: CollectiveVariables, trajectories: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(rows, dtype=np.float64) for rows in trajectories]
    if not arrays or any(rows.ndim != 2 or rows.shape[1] != len(features) or not np.isfinite(rows).all() for rows in arrays):
        raise ShapeError(f"expected trajectories of finite values [n, {len(features)}] of the features {', '.join(features.names)}, got "
                         f"shapes {[list(rows.shape) for rows in arrays]}")  # fmt: skip
    return arrays


def _signed(directions: np.ndarray) -> np.ndarray:
    """Directions ``[c, k]``, each with its largest entry positive."""
    largest = directions[np.arange(len(directions)), np.abs(directions).argmax(1)]
    return directions * np.sign(largest)[:, None]


def _combinations(features: CollectiveVariables, weights: np.ndarray, offsets: np.ndarray, name: str) -> CollectiveVariables:
    return CollectiveVariables(
        Combination(f"{name}{k + 1}", features, row, offset=offset, unit="1")
        for k, (row, offset) in enumerate(zip(weights, offsets, strict=True))
    )
