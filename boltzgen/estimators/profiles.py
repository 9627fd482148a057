"""Free energy profiles along one or two collective variables, with error bands and a stated zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from boltzgen.core import WeightedSamples
from boltzgen.errors import InputError, ShapeError
from boltzgen.estimators.bootstrap import bootstrap, independent_units, standard_error
from boltzgen.estimators.reweighting import values_where_weighted
from boltzgen.estimators.weights import exact_weights


@dataclass(frozen=True)
class Profile:
    """A free energy F = −ln(P_bin / volume_bin) + constant, in kT.

    The zero is the bin ``reference``, so ``stderr`` is the error of F − F[reference] and vanishes there: an error band is always one
    of a difference. Profiles are compared in one gauge: give both the same ``reference``.

    Attributes:
        name: What it is along.
        edges: Bin edges of every dimension, ``k`` arrays ``[bins + 1]``, in the unit of the variable.
        centers: Bin centres of every dimension, ``k`` arrays ``[bins]``.
        free_energy: F in kT ``[bins, ...]``; +inf where never visited, or where negative weights outweigh the others.
        stderr: Error of F − F[reference] in kT, as ``free_energy``; +inf where a bin rests on one or two independent samples.
        n_effective: Effective number of independent rows or blocks in every bin.
        reference: Index of the bin where F = 0; the most probable one unless it was given.
        outside: Fraction of the weight beyond the edges, which the profile leaves out.
    """

    name: str
    edges: tuple[np.ndarray, ...]
    centers: tuple[np.ndarray, ...]
    free_energy: np.ndarray
    stderr: np.ndarray
    n_effective: np.ndarray
    reference: tuple[int, ...]
    outside: float

    @property
    def probability(self) -> np.ndarray:
        """Probability of every bin, of those inside the edges; sums to one."""
        p = np.exp(-(self.free_energy - self.free_energy.min())) * _volumes(self.edges)
        return p / p.sum()


def profile_1d(
    samples: WeightedSamples,
    values: Tensor | np.ndarray,
    *,
    edges: np.ndarray,
    name: str = "",
    reference: int | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> Profile:
    """Free energy along one variable, F(s) = −ln p(s), in kT.

    Args:
        samples: ``n`` weighted samples.
        values: The variable at every row ``[n]``.
        edges: Ascending bin edges ``[bins + 1]``; the last bin includes its upper edge.
        name: What it is along.
        reference: Bin of the zero; the most probable one by default.
        n_bootstrap: Bootstrap replicates, over rows or, for correlated rows, blocks.
        seed: Seed of the bootstrap.

    Returns:
        The profile.

    Raises:
        TrainingDataError, InexactDensityError, WeightsError: If no exact number can rest on the samples.
        InputError: If the edges do not ascend, no weight lies inside them, or the reference bin is empty.
        ShapeError: If there is not one value per row.
    """
    columns = values[:, None] if values.ndim == 1 else values
    zero = None if reference is None else (reference,)
    return _profile(samples, columns, (edges,), name=name, reference=zero, n_bootstrap=n_bootstrap, seed=seed)


def profile_2d(
    samples: WeightedSamples,
    values: Tensor | np.ndarray,
    *,
    edges: tuple[np.ndarray, np.ndarray],
    name: str = "",
    reference: tuple[int, int] | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> Profile:
    """Free energy over two variables, F(s, t) = −ln p(s, t), in kT.

    Args:
        samples: ``n`` weighted samples.
        values: Both variables at every row ``[n, 2]``.
        edges: Bin edges of the first and of the second.
        name: What it is over.
        reference: Bin of the zero; the most probable one by default.
        n_bootstrap: Bootstrap replicates, over rows or blocks.
        seed: Seed of the bootstrap.

    Returns:
        The profile; the first axis of its arrays is the first variable.

    Raises:
        TrainingDataError, InexactDensityError, WeightsError, InputError, ShapeError: As :func:`profile_1d`.
    """
    return _profile(samples, values, tuple(edges), name=name, reference=reference, n_bootstrap=n_bootstrap, seed=seed)


def total_variation(profile_p: Profile, profile_q: Profile) -> float:
    """Total variation distance of two binned densities, ½ Σ |P_i − Q_i|, between 0 and 1.

    Noise alone makes it positive, by about √(bins / n_effective) / 2: compare it with the same number between two halves of the data.

    Raises:
        InputError: If the bins differ.
    """
    pairs = zip(profile_p.edges, profile_q.edges, strict=False)
    if len(profile_p.edges) != len(profile_q.edges) or not all(a.shape == b.shape and np.allclose(a, b) for a, b in pairs):
        raise InputError("expected two profiles on the same bins; compute both with the same edges")
    return float(0.5 * np.abs(profile_p.probability - profile_q.probability).sum())


def _profile(
    samples: WeightedSamples,
    values: Tensor | np.ndarray,
    edges: Sequence[np.ndarray],
    *,
    name: str,
    reference: tuple[int, ...] | None,
    n_bootstrap: int,
    seed: int,
) -> Profile:
    w = exact_weights(samples)
    units = independent_units(samples)
    checked = tuple(_checked_edges(e) for e in edges)
    columns = values_where_weighted(values, w)
    if columns.ndim != 2 or columns.shape[1] != len(checked):
        raise ShapeError(f"expected {len(checked)} values per sample, one per set of edges, got {list(columns.shape)}")
    shape = tuple(len(e) - 1 for e in checked)
    n_bins = math.prod(shape)
    bins = _bin_index(columns, checked)
    log_volumes = np.log(_volumes(checked)).ravel()
    inside = bins < n_bins

    def histogram(counts: np.ndarray) -> np.ndarray:
        return np.bincount(bins, weights=counts * w, minlength=n_bins + 1)[:n_bins]

    p = histogram(np.ones(len(w))).clip(min=0.0)
    if p.sum() == 0:
        raise InputError(f"no sample of {name or 'this variable'} lies inside the bin edges; check the range and the unit of the edges")
    with np.errstate(divide="ignore"):
        free_energy = log_volumes - np.log(p)
    zero = int(free_energy.argmin()) if reference is None else int(np.ravel_multi_index(reference, shape))
    if p[zero] == 0:
        raise InputError(f"the reference bin {reference} was never visited and cannot be the zero; choose a visited one")

    def relative(counts: np.ndarray) -> np.ndarray:
        f = log_volumes - np.log(histogram(counts))
        return f - f[zero]

    stderr = standard_error(bootstrap(relative, units, n_bootstrap=n_bootstrap, seed=seed), units)
    return Profile(
        name=name,
        edges=checked,
        centers=tuple(0.5 * (e[1:] + e[:-1]) for e in checked),
        free_energy=(free_energy - free_energy[zero]).reshape(shape),
        stderr=stderr.reshape(shape),
        n_effective=_effective_units_by_bin(bins[inside], w[inside], units[inside], n_bins).reshape(shape),
        reference=tuple(int(i) for i in np.unravel_index(zero, shape)),
        outside=float(w[~inside].sum()),
    )


def _bin_index(columns: np.ndarray, edges: tuple[np.ndarray, ...]) -> np.ndarray:
    """Flat bin of every row ``[n]``; the number of bins for rows outside."""
    shape = tuple(len(e) - 1 for e in edges)
    index = np.stack([np.searchsorted(e, c, side="right") - 1 for e, c in zip(edges, columns.T, strict=True)])
    for axis, e in enumerate(edges):
        index[axis, columns[:, axis] == e[-1]] = shape[axis] - 1
    inside = ((index >= 0) & (index < np.array(shape)[:, None])).all(axis=0)
    flat = np.full(len(columns), math.prod(shape))
    flat[inside] = np.ravel_multi_index(tuple(index[:, inside]), shape)
    return flat


def _effective_units_by_bin(bins: np.ndarray, w: np.ndarray, units: np.ndarray, n_bins: int) -> np.ndarray:
    """(ΣW)² / ΣW² over the independent units in every bin; 0 where empty."""
    cells, cell = np.unique(units * n_bins + bins, return_inverse=True)
    per_cell = np.bincount(cell.ravel(), weights=w, minlength=len(cells))
    sums = np.bincount(cells % n_bins, weights=per_cell, minlength=n_bins)
    squares = np.bincount(cells % n_bins, weights=per_cell**2, minlength=n_bins)
    return np.divide(sums**2, squares, out=np.zeros(n_bins), where=squares > 0)


def _volumes(edges: tuple[np.ndarray, ...]) -> np.ndarray:
    """Volume of every bin ``[bins, ...]``."""
    volumes = np.ones(())
    for e in edges:
        volumes = np.multiply.outer(volumes, np.diff(e))
    return volumes


def _checked_edges(edges: np.ndarray) -> np.ndarray:
    array = np.asarray(edges, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all() or not (np.diff(array) > 0).all():
        raise InputError("expected finite ascending bin edges [bins + 1], at least two; got " + np.array2string(array, threshold=8))
    return array
