"""Which OpenMM platform computes a system fastest: found by timing it, or stated by the user."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import openmm

from boltzgen.errors import PlatformError
from boltzgen.md.contexts import ContextPool

#: Platforms of OpenMM, in the order in which they are tried.
_KNOWN = ("CUDA", "HIP", "OpenCL", "CPU", "Reference")
_PRECISIONS = ("single", "mixed", "double")

#: Seconds that the timing of all candidates may take before no further number of contexts is tried.
_TIMING_BUDGET = 1.5
_SECONDS_PER_CANDIDATE = 0.08
_MOST_ROWS_PER_CONTEXT = 4096

#: Below this number of particles more contexts than cores are tried as well.
_SMALL_SYSTEM = 2000

#: More contexts must be faster by this factor to be worth their memory; a smaller difference is noise of the timing.
_WORTH_MORE_CONTEXTS = 1.1

#: The Reference platform can only win by the CPU platform's fixed cost of about a millisecond per call; one call of it may take
#: minutes on a large system. It is not tried where the CPU platform is slower than this many evaluations per second.
_REFERENCE_WORTH_TRYING = 100.0


@dataclass(frozen=True)
class PlatformChoice:
    """What the user asks of the platform; None leaves it to the timing.

    Attributes:
        name: OpenMM platform, such as ``CPU`` or ``CUDA``.
        precision: ``single``, ``mixed`` or ``double``, on platforms that have the choice.
        device: Device index, on platforms that have devices.
        contexts: Number of contexts that compute in parallel.
    """

    name: str | None = None
    precision: Literal["single", "mixed", "double"] | None = None
    device: str | None = None
    contexts: int | None = None


@dataclass(frozen=True)
class ResolvedPlatform:
    """A platform, its properties, and the number of contexts to run on it."""

    name: str
    properties: Mapping[str, str]
    contexts: int


@dataclass(frozen=True)
class AvailablePlatform:
    """A platform on this machine.

    Attributes:
        name: Its name.
        usable: Whether it computed a small system.
        reason: Why it is not usable, or an empty string.
        properties: Names of its properties.
    """

    name: str
    usable: bool
    reason: str
    properties: tuple[str, ...]


def available_platforms() -> list[AvailablePlatform]:
    """Every platform of this OpenMM, tried on two particles, and those that could not be loaded."""
    found = [_try(openmm.Platform.getPlatform(i)) for i in range(openmm.Platform.getNumPlatforms())]
    present = {platform.name for platform in found}
    failures = openmm.Platform.getPluginLoadFailures()
    for name in _KNOWN:
        if name not in present:
            reasons = [text for text in failures if f"libOpenMM{name}." in text]
            found.append(AvailablePlatform(name, False, reasons[0] if reasons else "not part of this OpenMM installation", ()))
    return found


def choose_platform(
    system: openmm.System, positions: np.ndarray, *, choice: PlatformChoice = PlatformChoice(), box: np.ndarray | None = None
) -> ResolvedPlatform:
    """The platform and number of contexts that evaluate the most configurations per second.

    Candidates are timed on the system itself with all their contexts at work, for about two seconds in total. What the user states is
    obeyed or refused, never replaced. Contexts on the CPU platform have one thread each; accelerators use mixed precision by default.

    Args:
        system: The system.
        positions: ``[n, 3]`` in nm.
        choice: What the user states.
        box: Box vectors ``[3, 3]`` in nm; the system's own by default.

    Returns:
        The fastest candidate.

    Raises:
        PlatformError: If the choice cannot be obeyed, or no platform computes the system.
    """
    names = require_platform(choice)
    if len(names) == 1 and choice.contexts is not None:
        return ResolvedPlatform(names[0], _properties(names[0], choice), choice.contexts)
    if box is not None:
        system = copy.deepcopy(system)
        system.setDefaultPeriodicBoxVectors(*np.asarray(box))
    timed: list[tuple[float, ResolvedPlatform]] = []
    problems: list[str] = []
    deadline = time.perf_counter() + _TIMING_BUDGET
    for name in names:
        if _is_hopeless(name, timed):
            continue
        try:
            timed += _timings(system, positions, name=name, choice=choice, deadline=deadline)
        except PlatformError as error:
            problems.append(str(error))
    if not timed:
        raise PlatformError("; ".join(problems))
    best_rate, best = timed[0]
    for rate, platform in timed[1:]:
        margin = _WORTH_MORE_CONTEXTS if platform.contexts > best.contexts else 1.0
        if rate > margin * best_rate:
            best_rate, best = rate, platform
    return best


def require_platform(choice: PlatformChoice) -> list[str]:
    """Names of the platforms that a choice allows, the preferred first.

    Raises:
        PlatformError: If there is none; the message names those there are.
    """
    present = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    available = f"available here: {', '.join(sorted(present))} (see `boltzgen platforms`)"
    if choice.contexts is not None and choice.contexts < 1:
        raise PlatformError(f"expected at least one context, got {choice.contexts}")
    if choice.precision is not None and choice.precision not in _PRECISIONS:
        raise PlatformError(f"expected a precision of {', '.join(_PRECISIONS)}, got {choice.precision!r}")
    if choice.name is not None:
        if choice.name not in present:
            known = "cannot be used" if choice.name in _KNOWN else "is unknown"
            raise PlatformError(f"platform {choice.name!r} {known}; {available}")
        _properties(choice.name, choice)
        return [choice.name]
    wanted = _wanted_properties(choice)
    names = [name for name in present if set(wanted) <= _property_names(name)]
    if not names:
        raise PlatformError(
            f"no platform here has a choice of {' and '.join(wanted)}; leave it out, or use a machine with a GPU; {available}"
        )
    return sorted(names, key=lambda name: _KNOWN.index(name) if name in _KNOWN else len(_KNOWN))


def count_cores() -> int:
    """Number of cores that this process may use; all of the machine where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wanted_properties(choice: PlatformChoice) -> dict[str, str]:
    wanted = {"Precision": choice.precision, "DeviceIndex": choice.device}
    return {name: value for name, value in wanted.items() if value is not None}


def _property_names(name: str) -> set[str]:
    return set(openmm.Platform.getPlatformByName(name).getPropertyNames())


def _properties(name: str, choice: PlatformChoice) -> dict[str, str]:
    allowed, wanted = _property_names(name), _wanted_properties(choice)
    for key, value in wanted.items():
        if key not in allowed:
            raise PlatformError(f"platform {name} has no {key}, so {value!r} cannot be obeyed; leave it out or choose another platform "
                                f"(Reference always computes in double, CPU in single precision)")  # fmt: skip
    defaults = {"Threads": "1", "Precision": "mixed"}
    return {key: value for key, value in defaults.items() if key in allowed} | wanted


def _is_hopeless(name: str, timed: list[tuple[float, ResolvedPlatform]]) -> bool:
    """Whether what was timed already shows that a platform cannot win."""
    if name == "OpenCL":
        return any(platform.name in ("CUDA", "HIP") for _, platform in timed)
    cpu_rates = [rate for rate, platform in timed if platform.name == "CPU"]
    return name == "Reference" and bool(cpu_rates) and max(cpu_rates) < _REFERENCE_WORTH_TRYING


def _timings(
    system: openmm.System, positions: np.ndarray, *, name: str, choice: PlatformChoice, deadline: float
) -> list[tuple[float, ResolvedPlatform]]:
    """Evaluations per second of one platform with several numbers of contexts."""
    properties = _properties(name, choice)
    cores = count_cores()
    waiting = 2 if system.getNumParticles() < _SMALL_SYSTEM else 1  # small systems spend much of a call waiting
    sizes = {"CPU": [cores, waiting * cores], "Reference": [1, cores]}.get(name, [1, 2])
    timed: list[tuple[float, ResolvedPlatform]] = []
    for contexts in [choice.contexts] if choice.contexts is not None else sorted(set(sizes)):
        if timed and time.perf_counter() > deadline:
            break
        pool = ContextPool(system, platform_name=name, properties=properties, n_contexts=contexts)
        try:
            timed.append((_rate(pool, positions), ResolvedPlatform(name, properties, contexts)))
        finally:
            pool.close()
    return timed


def _rate(pool: ContextPool, positions: np.ndarray) -> float:
    """Evaluations per second with every context at work, at slightly moved positions."""
    seconds = _seconds(pool, positions, pool.n_contexts)  # the first call also sets the contexts up
    seconds = min(seconds, _seconds(pool, positions, pool.n_contexts))
    n_rows = pool.n_contexts * min(_MOST_ROWS_PER_CONTEXT, int(_SECONDS_PER_CANDIDATE / seconds))
    if n_rows <= pool.n_contexts:
        return pool.n_contexts / seconds
    return n_rows / _seconds(pool, positions, n_rows)


def _seconds(pool: ContextPool, positions: np.ndarray, n_rows: int) -> float:
    shift = 1e-4 * np.sin(np.arange(n_rows * positions.size)).reshape(n_rows, *positions.shape)
    x = np.ascontiguousarray(positions + shift, dtype=np.float64)
    start = time.perf_counter()
    batch = pool.evaluate(x)
    seconds = time.perf_counter() - start
    if batch.failures or np.isnan(batch.energies).any():
        said = next(iter(batch.failures.values()), "the energy is not a number")
        raise PlatformError(f"platform {pool.platform_name} fails at the given coordinates: {said}")
    return seconds


def _try(platform: openmm.Platform) -> AvailablePlatform:
    name, properties = platform.getName(), tuple(platform.getPropertyNames())
    system = openmm.System()
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.1, 1000.0)
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(force)
    try:
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
        context.setPositions(np.array([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]))
        context.getState(energy=True, forces=True)
    except openmm.OpenMMException as error:
        return AvailablePlatform(name, False, str(error), properties)
    return AvailablePlatform(name, True, "", properties)
