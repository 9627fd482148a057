"""Annealing in temperature: a flow trained on hot data is cooled to the target with its own resampled, reweighted samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from boltzgen.core import Flow, Target
from boltzgen.errors import InexactDensityError, InputError, WeightsError
from boltzgen.estimators.weights import normalised_weights
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import ForwardKL

#: Smallest cooling step, as a fraction of the temperature, that must keep the effective sample size.
SMALLEST_STEP = 0.01

#: Temperatures are found to this fraction of themselves.
RESOLUTION = 1e-3


@dataclass(frozen=True)
class AnnealingStep:
    """One round of annealing.

    Attributes:
        temperature_kelvin: Temperature the flow was cooled to.
        ess: Raw effective sample size (0–1) of the samples it was trained on.
        steps: Optimiser steps.
        n_energies: Energies evaluated.
    """

    temperature_kelvin: float
    ess: float
    steps: int
    n_energies: int


def next_temperature(
    u_reference: Tensor,
    log_q: Tensor,
    *,
    reference_kelvin: float,
    current_kelvin: float,
    target_kelvin: float,
    minimum_ess: float,
) -> float:
    """The coldest temperature that samples of a flow reach with a given effective sample size.

    log_w(T) = −u_ref T_ref / T − log_q, and the raw ESS is (Σw)² / (n Σw²). The temperature is found by bisection between the
    target and a step of ``SMALLEST_STEP`` from the current temperature.

    Args:
        u_reference: Reduced potentials ``[n]`` at ``reference_kelvin`` in kT, +inf included; only what scales as 1/T belongs here.
        log_q: Log densities ``[n]`` of the samples. What does not depend on temperature, such as −ln|J|, is added here.
        reference_kelvin: Temperature of ``u_reference``.
        current_kelvin: Temperature the flow was trained for.
        target_kelvin: Temperature to reach, not above the current one.
        minimum_ess: Smallest raw effective sample size as a fraction, 0 < minimum_ess < 1.

    Returns:
        A temperature in kelvin; the target itself where the samples reach it.

    Raises:
        InputError: If temperatures are not positive and falling, or ``minimum_ess`` is not between 0 and 1.
        WeightsError: If not even the smallest step keeps the effective sample size, or the weights cannot be normalised.

    References:
        Schopmans & Friederich, Temperature-annealed Boltzmann generators, ICML 2025 (reweighting between temperatures); the
        next temperature from the effective sample size: Jasra et al., Scand. J. Stat. 38, 1 (2011).
    """
    if not 0 < target_kelvin <= current_kelvin or not reference_kelvin > 0:
        raise InputError(f"expected 0 < target <= current temperature, got a target of {target_kelvin} K below {current_kelvin} K")
    if not 0.0 < minimum_ess < 1.0:
        raise InputError(f"expected a minimum effective sample size between 0 and 1, got {minimum_ess}; a usual one is 0.5")

    def ess(kelvin: float) -> float:
        return _ess(log_weights(u_reference, log_q, factor=reference_kelvin / kelvin))

    if ess(target_kelvin) >= minimum_ess:
        return target_kelvin
    good, poor = max((1 - SMALLEST_STEP) * current_kelvin, target_kelvin), target_kelvin
    found = ess(good)
    if found < minimum_ess:
        raise WeightsError(
            f"expected a raw effective sample size of {minimum_ess:.3g} or more one step below {current_kelvin:.1f} K, at {good:.1f} K, "
            f"got {found:.3g}: the flow is too poor to be cooled; train it longer on the hot data, or lower the minimum"
        )
    while good - poor > RESOLUTION * poor:
        middle = 0.5 * (good + poor)
        good, poor = (middle, poor) if ess(middle) >= minimum_ess else (good, middle)
    return good


def tempered_exponent(log_w: Tensor, *, minimum_ess: float) -> float:
    """The largest λ ≤ 1 at which weights w^λ keep an effective sample size: how far towards the target q^{1−λ} p^λ samples of q carry.

    Args:
        log_w: Log weights ``[n]``; −inf is weight zero.
        minimum_ess: Smallest effective sample size as a fraction, 0 < minimum_ess < 1.

    Returns:
        λ in (0, 1], by bisection.

    Raises:
        InputError: If ``minimum_ess`` is not between 0 and 1.
        WeightsError: If the weights cannot be normalised.

    References:
        Jasra et al., Scand. J. Stat. 38, 1 (2011), section 4.
    """
    if not 0.0 < minimum_ess < 1.0:
        raise InputError(f"expected a minimum effective sample size between 0 and 1, got {minimum_ess}; a usual one is 0.3")
    forbidden = torch.isneginf(log_w)

    def ess(exponent: float) -> float:
        return _ess((exponent * log_w).masked_fill(forbidden, -torch.inf))

    if ess(1.0) >= minimum_ess:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > RESOLUTION * high and high > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ess(middle) >= minimum_ess else (low, middle)
    return max(low, 1e-9)


def anneal(
    flow: Flow,
    target: Target,
    *,
    start_kelvin: float,
    target_kelvin: float,
    minimum_ess: float,
    n_samples: int,
    settings: FitSettings,
    batch_size: int,
    generator: torch.Generator,
    store_for: Callable[[int], CheckpointStore] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> tuple[AnnealingStep, ...]:
    """Cool a flow from the temperature it was trained at to that of the target, in place.

    Every round draws samples, evaluates their energies once, chooses the next temperature by :func:`next_temperature`, weighs the
    samples for it, and trains the flow on batches drawn in proportion to the weights (forward KL).

    An interrupted annealing is resumed by calling it again with the flow and the generator as they were at its start and the
    same ``store_for``: rounds that are done are drawn and weighed again, without training, and give the same flow.

    Args:
        flow: Flow that follows the target at ``start_kelvin``.
        target: Target, at any temperature; its reduced potential must be affine in 1/T (a Jacobian part is allowed).
        start_kelvin: Temperature the flow was trained at.
        target_kelvin: Temperature to reach; not above ``start_kelvin``. Where they are equal nothing is done.
        minimum_ess: Smallest raw effective sample size (0–1) at which samples are reweighted to the next temperature.
        n_samples: Samples, and energy evaluations, per round.
        settings: Training of every round.
        batch_size: Rows per training step; samples are drawn in batches of this size as well.
        generator: Random numbers.
        store_for: Checkpoints of round 0, 1, …
        should_stop: See :func:`boltzgen.training.fit.fit`.
        progress: Whether to show progress bars on stderr.

    Returns:
        One entry per round; the last is at ``target_kelvin``.

    Raises:
        InputError: If the temperatures do not fall, or a number is out of range.
        InexactDensityError: If the target's energies are altered (regularised).
        WeightsError: If the flow is too poor to be cooled.
        Interrupted: If ``should_stop`` said so.

    References:
        Schopmans & Friederich, Temperature-annealed Boltzmann generators, ICML 2025.
    """
    if not 0 < target_kelvin <= start_kelvin:
        raise InputError(f"expected annealing from hot to cold, got from {start_kelvin} K to {target_kelvin} K")
    if n_samples < 1 or batch_size < 1:
        raise InputError(f"expected positive n_samples and batch_size, got {n_samples} and {batch_size}")
    if not target.is_exact:
        raise InexactDensityError("annealing weighs samples with the energies: give it the exact target, not a regularised view")
    rounds: list[AnnealingStep] = []
    kelvin = start_kelvin
    while kelvin > target_kelvin:
        x, u, log_q = _weighable_samples(
            flow, target, start_kelvin, n=n_samples, batch_size=batch_size, generator=generator, label=f"sampling at {kelvin:.0f} K",
            progress=progress,
        )  # fmt: skip
        kelvin = next_temperature(
            u, log_q, reference_kelvin=start_kelvin, current_kelvin=kelvin, target_kelvin=target_kelvin, minimum_ess=minimum_ess
        )
        log_w = log_weights(u, log_q, factor=start_kelvin / kelvin)
        result = fit(
            flow, ForwardKL(x, batch_size=batch_size, log_w=log_w), settings=settings, generator=generator,
            store=store_for(len(rounds)) if store_for else None, should_stop=should_stop, label=f"cooling to {kelvin:.0f} K",
            progress=progress,
        )  # fmt: skip
        rounds.append(AnnealingStep(temperature_kelvin=kelvin, ess=_ess(log_w), steps=result.steps, n_energies=n_samples))
    return tuple(rounds)


def log_weights(u_reference: Tensor, log_q: Tensor, *, factor: float) -> Tensor:
    """log_w = −factor · u_ref − log_q ``[n]``, float64, with factor = T_ref / T."""
    return -factor * u_reference.to(torch.float64) - log_q.to(torch.float64)


@torch.no_grad()
def _weighable_samples(
    flow: Flow, target: Target, kelvin: float, *, n: int, batch_size: int, generator: torch.Generator, label: str, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the flow, the part of their reduced potential at ``kelvin`` that scales as 1/T, and log_q plus the rest.

    With u(T) = a/T + c the halved temperature tells the two parts apart: a/T = u(T/2) − u(T), c = 2 u(T) − u(T/2). A target that
    evaluates all temperatures at once (:meth:`boltzgen.core.Target.reduced_potentials`) is asked for each energy once.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in trange(0, n, batch_size, desc=label, unit="batch", disable=not progress):
        x, log_q = flow.sample(min(batch_size, n - start), generator=generator)
        u, u_half = target.reduced_potentials(x, (kelvin, kelvin / 2)).to("cpu", torch.float64)
        forbidden = torch.isposinf(u)
        scaling = torch.where(forbidden, u, u_half - u)
        constant = torch.where(forbidden, 0.0, 2 * u - u_half)
        parts.append((x, scaling, log_q.to("cpu", torch.float64) + constant))
    x, scaling, log_q = (torch.cat(column) for column in zip(*parts, strict=True))
    return x, scaling, log_q


def _ess(log_w: Tensor) -> float:
    """Raw effective sample size as a fraction, (Σw)² / (n Σw²)."""
    weights = normalised_weights(log_w)
    return float(1.0 / (len(weights) * np.square(weights).sum()))
