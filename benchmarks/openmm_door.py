"""Energy and force evaluations per second of OpenMMTarget against the loops that users write.

    python benchmarks/openmm_door.py [--out benchmarks/results/openmm_door.json]

Small systems: batch 1,024 through the target against a loop of ``setPositions`` / ``getState(getEnergy, getForces)`` with
``asNumpy`` forces and unit conversion on one context, on OpenMM's default platform and on Reference. A large system: batch 8 against
bare ``getState`` calls on one context. All contestants take turns; the ratios are medians over the rounds. CPU time per evaluation is
given as well: it hardly depends on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import openmm
import torch
from openmm import unit
from openmmtools import testsystems
from stored import out_path, store
from tqdm import tqdm

from boltzgen.md.loading import load_objects
from boltzgen.md.target import OpenMMTarget

BATCH = 1024
LARGE_BATCH = 8
ROUNDS = 7


def plain_loop(context: openmm.Context, x: np.ndarray) -> None:
    """What users write."""
    for row in x:
        context.setPositions(row * unit.nanometer)
        state = context.getState(getEnergy=True, getForces=True)
        state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)


def bare_get_state(context: openmm.Context, x: np.ndarray) -> float:
    """Seconds inside ``getState`` alone, summed over the rows."""
    total = 0.0
    for row in x:
        context.setPositions(row)
        start = time.perf_counter()
        context.getState(getEnergy=True, getForces=True)
        total += time.perf_counter() - start
    return total


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def context_of(system: openmm.System, platform_name: str | None) -> openmm.Context:
    integrator = openmm.VerletIntegrator(0.001)
    if platform_name is None:
        return openmm.Context(system, integrator)
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform_name))


def rows_of(positions: np.ndarray, n: int) -> np.ndarray:
    return positions + 0.002 * np.random.default_rng(0).normal(size=(n, *positions.shape))


def small_system(name: str, made: testsystems.TestSystem) -> dict[str, object]:
    loaded = load_objects(made.topology, made.system, made.positions)
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0)
    x = rows_of(loaded.positions, BATCH)
    tensor = torch.from_numpy(x)
    contexts = {"default": context_of(loaded.system, None), "Reference": context_of(loaded.system, "Reference")}
    plain_rows = {key: x[: BATCH if seconds(lambda c=c: plain_loop(c, x[:32])) < 0.02 else 128] for key, c in contexts.items()}
    calls: dict[str, tuple[int, Callable[[], object]]] = {"target": (BATCH, lambda: target.value_and_grad(tensor))}
    for key, context in contexts.items():
        calls[key] = (len(plain_rows[key]), lambda c=context, rows=plain_rows[key]: plain_loop(c, rows))
    rates: dict[str, list[float]] = {key: [] for key in calls}
    cpu: dict[str, list[float]] = {key: [] for key in calls}
    target.value_and_grad(tensor)
    for _ in tqdm(range(ROUNDS), desc=name, file=sys.stderr):
        for key, (n_rows, call) in calls.items():
            cpu_before = time.process_time()
            rates[key].append(n_rows / seconds(call))
            cpu[key].append(1e6 * (time.process_time() - cpu_before) / n_rows)
    result: dict[str, object] = {
        "batch": BATCH,
        "target_platform": target.platform_name,
        "target_contexts": target.n_contexts,
        "default_platform": contexts["default"].getPlatform().getName(),
        "evaluations_per_second": {key: statistics.median(values) for key, values in rates.items()},
        "cpu_microseconds_per_evaluation": {key: statistics.median(values) for key, values in cpu.items()},
    }
    for key in contexts:
        ratios = [a / b for a, b in zip(rates["target"], rates[key], strict=True)]
        result[f"ratio_to_{key}_loop"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    target.close()
    return result


def large_system(name: str, made: testsystems.TestSystem) -> dict[str, object]:
    loaded = load_objects(made.topology, made.system, made.positions)
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0)
    x = rows_of(loaded.positions, LARGE_BATCH)
    tensor = torch.from_numpy(x)
    context = context_of(loaded.system, None)
    bare_get_state(context, x)
    target.value_and_grad(tensor)
    times: dict[str, list[float]] = {"target": [], "bare": []}
    for _ in tqdm(range(ROUNDS), desc=name, file=sys.stderr):
        times["bare"].append(bare_get_state(context, x) / LARGE_BATCH)
        times["target"].append(seconds(lambda: target.value_and_grad(tensor)) / LARGE_BATCH)
    ratios = [a / b for a, b in zip(times["target"], times["bare"], strict=True)]
    result = {
        "batch": LARGE_BATCH,
        "particles": loaded.system.getNumParticles(),
        "target_platform": target.platform_name,
        "target_contexts": target.n_contexts,
        "bare_platform": context.getPlatform().getName(),
        "milliseconds_per_evaluation": {key: 1e3 * statistics.median(values) for key, values in times.items()},
        "time_over_bare_get_state": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    target.close()
    return result


def main() -> None:
    out = out_path(__doc__)
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = {
        "seed": 0,
        "rounds": ROUNDS,
        "vacuum": small_system("alanine dipeptide, vacuum", testsystems.AlanineDipeptideVacuum(constraints=None)),
        "implicit": small_system("alanine dipeptide, implicit", testsystems.AlanineDipeptideImplicit(constraints=None)),
        "explicit": large_system("alanine dipeptide, explicit", testsystems.AlanineDipeptideExplicit(constraints=None, rigid_water=False)),
    }
    result["wall_seconds"] = time.perf_counter() - start
    print(json.dumps(result, indent=2))
    store(out, result)


if __name__ == "__main__":
    main()
