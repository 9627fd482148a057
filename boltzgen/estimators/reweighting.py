"""Averages, free energy differences and normalisations from weighted samples, each with its error."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Estimate, WeightedSamples
from boltzgen.errors import InputError, ShapeError, WeightsError
from boltzgen.estimators.bootstrap import bootstrap, covariance, effective_units, few_units_note, independent_units, standard_error
from boltzgen.estimators.weights import checked_log_weights, exact_weights


def mean(
    samples: WeightedSamples,
    values: Tensor | np.ndarray,
    *,
    name: str = "mean",
    unit: str = "",
    n_bootstrap: int = 200,
    seed: int,
) -> Estimate:
    """Self-normalised importance sampling, ⟨f⟩ = Σ w_i f_i / Σ w_i.

    Args:
        samples: ``n`` weighted samples.
        values: f at every row, ``[n]`` or ``[n, k]``. Ignored where the weight is zero.
        name: Name of the estimate.
        unit: Unit of the values.
        n_bootstrap: Bootstrap replicates, over rows or, for correlated rows, over blocks.
        seed: Seed of the bootstrap.

    Returns:
        The average with its error; for ``[n, k]`` values also the covariance ``[k, k]``.

    Raises:
        TrainingDataError, InexactDensityError: If no exact number may rest on the samples.
        WeightsError: If the weights cannot be normalised.
        InputError: If a value is not finite where there is weight.

    References:
        Owen, Monte Carlo theory (2013), chapter 9, self-normalised importance sampling.
    """
    w = exact_weights(samples)
    units = independent_units(samples)
    f = values_where_weighted(values, w)
    columns = f.reshape(len(w), -1)

    def average(counts: np.ndarray) -> np.ndarray:
        drawn = counts * w
        return (drawn @ columns) / drawn.sum()

    replicates = bootstrap(average, units, n_bootstrap=n_bootstrap, seed=seed)
    value, stderr = average(np.ones(len(w))), standard_error(replicates, units)
    scalar = f.ndim == 1
    return Estimate(
        name=name,
        value=float(value[0]) if scalar else value,
        stderr=float(stderr[0]) if scalar else stderr,
        unit=unit,
        n_effective=effective_units(w, units),
        covariance=None if scalar else np.atleast_2d(covariance(replicates, units)),
        note=few_units_note(units),
    )


def free_energy_difference(
    samples: WeightedSamples,
    in_a: Tensor,
    in_b: Tensor,
    *,
    name: str = "F_b - F_a",
    labels: tuple[str, str] = ("basin a", "basin b"),
    n_bootstrap: int = 200,
    seed: int,
) -> Estimate:
    """Free energy difference of two basins, F_b − F_a = −ln(Σ_{i∈b} w_i / Σ_{i∈a} w_i).

    Args:
        samples: ``n`` weighted samples.
        in_a: Which rows lie in basin a, bool ``[n]``.
        in_b: Which rows lie in basin b, bool ``[n]``.
        name: Name of the estimate.
        labels: What notes call the two basins.
        n_bootstrap: Bootstrap replicates, over rows or blocks.
        seed: Seed of the bootstrap.

    Returns:
        The difference in kT; ``n_effective`` is that of the rarer basin. A basin without weight gives value NaN, error +inf and a
        note: not visited is not a number.

    Raises:
        TrainingDataError, InexactDensityError, WeightsError: As :func:`mean`.
        ShapeError: If the basins are not one bool per row.
    """
    w = exact_weights(samples)
    units = independent_units(samples)
    basins = np.stack([_membership(in_a, len(w)), _membership(in_b, len(w))], axis=1).astype(np.float64)

    def difference(counts: np.ndarray) -> float:
        weight_a, weight_b = (counts * w) @ basins
        return float(np.log(weight_a) - np.log(weight_b))

    n_effective = min(effective_units(w * basins[:, 0], units), effective_units(w * basins[:, 1], units))
    empty = [label for label, weight in zip(labels, w @ basins, strict=True) if weight <= 0]
    if empty:
        note = f"{' and '.join(empty)} was never visited: its free energy is unknown, not infinite"
        return Estimate(name=name, value=math.nan, stderr=math.inf, unit="kT", n_effective=0.0, note=note)
    stderr = float(standard_error(bootstrap(difference, units, n_bootstrap=n_bootstrap, seed=seed), units))
    note = few_units_note(units) if math.isfinite(stderr) else "one basin rests on one or two independent samples: the error is unbounded"
    return Estimate(name=name, value=difference(np.ones(len(w))), stderr=stderr, unit="kT", n_effective=n_effective, note=note)


def log_z(samples: WeightedSamples, *, n_bootstrap: int = 200, seed: int) -> Estimate:
    """ln of the target's normalisation, ln Ẑ = ln (1/n) Σ exp(log_w_i).

    Args:
        samples: ``n`` samples of a flow.
        n_bootstrap: Bootstrap replicates.
        seed: Seed of the bootstrap.

    Returns:
        ln Z, dimensionless; consistent, and low by about half its variance.

    Raises:
        TrainingDataError, InexactDensityError, WeightsError: As :func:`mean`.
        InputError: If the rows carry no ``log_q``: only samples of a normalised density know ln Z.
    """
    w = exact_weights(_with_density(samples))
    units = independent_units(samples)
    log_w = checked_log_weights(samples.log_w)
    largest = int(log_w.argmax())
    value = float(log_w[largest] - np.log(abs(w[largest])) - math.log(len(w)))

    def change(counts: np.ndarray) -> float:
        return float(np.log(counts @ w))

    stderr = float(standard_error(bootstrap(change, units, n_bootstrap=n_bootstrap, seed=seed), units))
    return Estimate(name="ln Z", value=value, stderr=stderr, unit="", n_effective=effective_units(w, units))


def log_z_lower(samples: WeightedSamples) -> Estimate:
    """Lower bound of ln Z, E_q[ln p̃ − ln q] ≤ ln Z (ELBO).

    Args:
        samples: ``n`` samples of a flow.

    Returns:
        The mean log weight with its standard error; −inf with error +inf if a row has weight zero or a negative one.

    Raises:
        TrainingDataError, InexactDensityError, WeightsError, InputError: As :func:`log_z`.
    """
    log_w = checked_log_weights(_with_density(samples).positive_log_w)
    n_zero = int(np.isneginf(log_w).sum())
    if n_zero:
        note = f"{n_zero} of {len(log_w)} samples have weight zero, or a negative one, which makes the bound -inf"
        return Estimate(name="ln Z, lower bound", value=-math.inf, stderr=math.inf, unit="", n_effective=float(len(log_w)), note=note)
    return _bound(log_w, name="ln Z, lower bound", note="")


def log_z_upper(log_ratio: Tensor) -> Estimate:
    """Upper bound of ln Z, E_p[ln p̃ − ln q] ≥ ln Z (EUBO).

    Args:
        log_ratio: ln p̃(x) − ln q(x) of decorrelated rows x ~ p, held out from training, ``[n]``.

    Returns:
        The mean ratio with its standard error. It bounds ln Z only if the rows cover the target, and its note says so.

    Raises:
        WeightsError: If a ratio is NaN or −inf.
    """
    ratios = torch.as_tensor(log_ratio).detach().to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(np.isnan(ratios) | np.isneginf(ratios))
    if len(bad) or len(ratios) == 0:
        raise WeightsError(
            f"{len(bad)} of {len(ratios)} log ratios are NaN or -inf, in rows {bad[:10].tolist()}: expected finite values on rows that "
            "follow the target; check their energies"
        )
    note = "an upper bound only if the data cover the whole target"
    n_missed = int(np.isposinf(ratios).sum())
    if n_missed:
        note = f"{note}; the flow gives {n_missed} of {len(ratios)} data rows zero density"
        return Estimate(name="ln Z, upper bound", value=math.inf, stderr=math.inf, unit="", n_effective=float(len(ratios)), note=note)
    return _bound(ratios, name="ln Z, upper bound", note=note)


def values_where_weighted(values: Tensor | np.ndarray, w: np.ndarray) -> np.ndarray:
    """Values ``[n, ...]`` as float64, with zeros in rows of weight zero.

    Raises:
        ShapeError: If there is not one row per weight.
        InputError: If a value is not finite where there is weight.
    """
    array = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    if array.ndim not in (1, 2) or len(array) != len(w):
        raise ShapeError(f"expected values [{len(w)}] or [{len(w)}, k], one row per sample, got {list(array.shape)}")
    weighted = (w != 0).reshape(-1, *[1] * (array.ndim - 1))
    finite = np.isfinite(array)
    bad = np.flatnonzero((weighted & ~finite).reshape(len(w), -1).any(axis=1))
    if len(bad):
        raise InputError(
            f"{len(bad)} values are not finite where the weight is not zero, in rows {bad[:10].tolist()}; check the observable"
        )
    return np.where(weighted & finite, array, 0.0)


def _bound(log_ratios: np.ndarray, *, name: str, note: str) -> Estimate:
    """Mean of independent finite rows ``[n]`` with s/√n as its error."""
    n = len(log_ratios)
    stderr = float(log_ratios.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return Estimate(name=name, value=float(log_ratios.mean()), stderr=stderr, unit="", n_effective=float(n), note=note)


def _with_density(samples: WeightedSamples) -> WeightedSamples:
    if samples.require_exact().log_q is None:
        raise InputError("these rows carry no log_q (MD or MCMC samples), so they do not know ln Z; use samples drawn from the flow")
    return samples


def _membership(rows: Tensor, n: int) -> np.ndarray:
    array = torch.as_tensor(rows).detach().cpu().numpy()
    if array.dtype != np.bool_ or array.shape != (n,):
        raise ShapeError(f"expected a basin as bool [{n}], one per sample, got {array.dtype} {list(array.shape)}")
    return array
