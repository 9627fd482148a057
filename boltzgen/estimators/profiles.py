"""Free energy profiles along one or two collective variables, with error bands and a stated zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax
from torch import Tensor

from boltzgen.core import Estimate, WeightedSamples
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
        stderr_normalised: Error of −ln of the probability of every bin among those inside the edges, in kT, as ``free_energy``: for
            comparing whole densities, where no bin is special.
        n_effective: Effective number of independent rows or blocks in every bin.
        reference: Index of the bin where F = 0; the most probable one unless it was given.
        outside: Fraction of the weight beyond the edges, which the profile leaves out.
    """

    name: str
    edges: tuple[np.ndarray, ...]
    centers: tuple[np.ndarray, ...]
    free_energy: np.ndarray
    stderr: np.ndarray
    stderr_normalised: np.ndarray
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


def stratified_profile(
    values: Sequence[np.ndarray],
    units: Sequence[np.ndarray],
    differences: Sequence[Estimate],
    *,
    edges: np.ndarray,
    period: float | None = None,
    name: str = "",
    reference: int | None = None,
    n_bootstrap: int = 200,
    seed: int,
) -> Profile:
    """Free energy along one variable from samples of each basin by itself, joined by the free energies of the basins (stratified sampling).

    p(s) = Σ_k P_k p(s | k), P_k = e^{−F_k} / Σ_l e^{−F_l}. Samples need equilibrium within their basin only, and how many there are of
    each says nothing. The profile is that of the union of the basins: what lies between them is left out, which matters where they do
    not fill space.

    Args:
        values: The variable at samples of every basin, ``[n_k]`` each.
        units: Independent unit of every sample, any integers ``[n_k]``: stretches of walkers (``timeseries.time_blocks``).
        differences: F_k − F_0 of all basins but the first in kT. Their errors are taken as independent of each other and of the samples.
        edges: Ascending bin edges ``[bins + 1]``.
        period: Period of the variable: values are brought into one turn from the first edge on.
        name: What it is along.
        reference: Bin of the zero; the most probable one by default.
        n_bootstrap: Bootstrap replicates over units.
        seed: Seed of the bootstrap.

    Returns:
        The profile; its errors contain those of the differences.

    Raises:
        InputError: If a difference is not known, a basin has no two units, a value is not finite, or as :func:`profile_1d`.
        ShapeError: If the numbers of basins or of rows differ.

    References:
        Neyman, J. R. Stat. Soc. 97, 558 (1934), stratified means; Thiede, Van Koten, Weare and Dinner, J. Chem. Phys. 145, 084115 (2016).
    """
    if not len(values) == len(units) == len(differences) + 1:
        raise ShapeError(f"expected values and units of {len(differences) + 1} basins, got {len(values)} and {len(units)}")
    f = np.array([0.0, *(float(one.value) for one in differences)])
    errors = np.array([0.0, *(float(one.stderr) for one in differences)])
    if not (np.isfinite(f).all() and np.isfinite(errors).all()):
        raise InputError(f"expected known differences of the basins, got {[str(one) for one in differences]}")
    checked = (checked_edges(edges),)
    columns = [wrapped(_of_basin(k, one, group), checked[0], period) for k, (one, group) in enumerate(zip(values, units, strict=True))]
    groups = [np.unique(group, return_inverse=True)[1].reshape(-1) for group in units]
    n_bins = len(checked[0]) - 1
    bins = [bin_index(column[:, None], checked) for column in columns]

    def histograms(*counts: np.ndarray) -> np.ndarray:
        of_each = [np.bincount(b, weights=c, minlength=n_bins + 1)[:n_bins] / c.sum() for b, c in zip(bins, counts, strict=True)]
        return np.stack(of_each)

    drawn = bootstrap(histograms, *groups, n_bootstrap=n_bootstrap, seed=seed)
    noise = np.random.default_rng([seed, 1]).standard_normal((n_bootstrap, len(f)))
    share, flat = softmax(-f), np.concatenate(bins)
    w = np.concatenate([np.full(len(column), p / len(column)) for p, column in zip(share, columns, strict=True)])
    first = np.cumsum([0, *(group.max() + 1 for group in groups)])
    labels, inside = np.concatenate([group + k for group, k in zip(groups, first, strict=False)]), flat < n_bins
    return assembled(
        name,
        checked,
        share @ histograms(*(np.ones(len(column)) for column in columns)),
        np.einsum("rk,rkb->rb", softmax(-(f + errors * noise), axis=1), drawn),
        fewest=min(groups, key=lambda group: group.max()),
        n_effective=effective_units_by_bin(flat[inside], w[inside], labels[inside], n_bins),
        reference=None if reference is None else (reference,),
        outside=float(w[~inside].sum()),
    )


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


def wrapped(values: np.ndarray, edges: np.ndarray, period: float | None) -> np.ndarray:
    """Values of a periodic variable within one turn from the first edge on; the same values where the period is None.

    Raises:
        InputError: If the edges span more than one turn.
    """
    if period is None:
        return values
    if not (period > 0 and edges[-1] - edges[0] <= period * (1 + 1e-9)):
        raise InputError(f"expected edges within one turn of {period:g}, got edges from {edges[0]:g} to {edges[-1]:g}")
    return edges[0] + np.remainder(values - edges[0], period)


def _of_basin(k: int, values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Checked values of one basin ``[n]``."""
    if np.ndim(values) != 1 or np.shape(units) != np.shape(values):
        raise ShapeError(f"expected values and units [n] of basin {k}, got {np.shape(values)} and {np.shape(units)}")
    if not np.isfinite(values).all() or len(np.unique(units)) < 2:
        raise InputError(f"expected finite values of basin {k} in at least 2 independent units; sample longer, or look for rows with NaN")
    return np.asarray(values, dtype=np.float64)


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
    checked = tuple(checked_edges(e) for e in edges)
    columns = values_where_weighted(values, w)
    if columns.ndim != 2 or columns.shape[1] != len(checked):
        raise ShapeError(f"expected {len(checked)} values per sample, one per set of edges, got {list(columns.shape)}")
    shape = tuple(len(e) - 1 for e in checked)
    n_bins = math.prod(shape)
    bins = bin_index(columns, checked)
    inside = bins < n_bins

    def histogram(counts: np.ndarray) -> np.ndarray:
        return np.bincount(bins, weights=counts * w, minlength=n_bins + 1)[:n_bins]

    return assembled(
        name,
        checked,
        histogram(np.ones(len(w))),
        bootstrap(histogram, units, n_bootstrap=n_bootstrap, seed=seed),
        fewest=units,
        n_effective=effective_units_by_bin(bins[inside], w[inside], units[inside], n_bins),
        reference=reference,
        outside=float(w[~inside].sum()),
    )


def assembled(
    name: str,
    edges: tuple[np.ndarray, ...],
    probability: np.ndarray,
    replicates: np.ndarray,
    *,
    fewest: np.ndarray,
    n_effective: np.ndarray,
    reference: tuple[int, ...] | None,
    outside: float,
) -> Profile:
    """A profile from probabilities of flat bins ``[bins]``, their replicates ``[n_bootstrap, bins]`` and the units behind its errors."""
    shape, log_volumes = tuple(len(e) - 1 for e in edges), np.log(_volumes(edges)).ravel()
    p = probability.clip(min=0.0)
    if p.sum() == 0:
        raise InputError(f"no sample of {name or 'this variable'} lies inside the bin edges; check the range and the unit of the edges")
    with np.errstate(divide="ignore"):
        free_energy = log_volumes - np.log(p)
    zero = int(free_energy.argmin()) if reference is None else int(np.ravel_multi_index(reference, shape))
    if p[zero] == 0:
        raise InputError(f"the reference bin {reference} was never visited and cannot be the zero; choose a visited one")
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = log_volumes - np.log(replicates)
        stderr = standard_error(relative - relative[:, zero : zero + 1], fewest)
        normalised = standard_error(np.log(replicates.clip(min=0.0).sum(axis=1, keepdims=True)) - np.log(replicates), fewest)
    return Profile(
        name=name,
        edges=edges,
        centers=tuple(0.5 * (e[1:] + e[:-1]) for e in edges),
        free_energy=(free_energy - free_energy[zero]).reshape(shape),
        stderr=stderr.reshape(shape),
        stderr_normalised=normalised.reshape(shape),
        n_effective=n_effective.reshape(shape),
        reference=tuple(int(i) for i in np.unravel_index(zero, shape)),
        outside=outside,
    )


def bin_index(columns: np.ndarray, edges: tuple[np.ndarray, ...]) -> np.ndarray:
    """Flat bin of every row ``[n]``; the number of bins for rows outside."""
    shape = tuple(len(e) - 1 for e in edges)
    index = np.stack([np.searchsorted(e, c, side="right") - 1 for e, c in zip(edges, columns.T, strict=True)])
    for axis, e in enumerate(edges):
        index[axis, columns[:, axis] == e[-1]] = shape[axis] - 1
    inside = ((index >= 0) & (index < np.array(shape)[:, None])).all(axis=0)
    flat = np.full(len(columns), math.prod(shape))
    flat[inside] = np.ravel_multi_index(tuple(index[:, inside]), shape)
    return flat


def effective_units_by_bin(bins: np.ndarray, w: np.ndarray, units: np.ndarray, n_bins: int) -> np.ndarray:
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


def checked_edges(edges: np.ndarray) -> np.ndarray:
    """Edges ``[bins + 1]`` as float64.

    Raises:
        InputError: If they are not finite and ascending, or fewer than two.
    """
    array = np.asarray(edges, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all() or not (np.diff(array) > 0).all():
        raise InputError("expected finite ascending bin edges [bins + 1], at least two; got " + np.array2string(array, threshold=8))
    return array
