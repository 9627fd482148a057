"""Steered paths beside the usual ways of path_baselines.py: ΔF of the two basins of a distance against force evaluations.

    python benchmarks/path_sampling.py --system polymer_in_solvent --replicas 8 --evaluations 250000

Every run starts four walkers from one configuration of the near basin, made like those of the baselines (the same with the same seed), and
counts everything: equilibration, adaptation, rejected paths. ``fixed`` has a proposal that knows both basins (those of arXiv 2512.16812
and 2405.18160; a tenth of it the whole range); ``learned`` knows only the range of the distance, and learns a flow while it samples.
``bar`` is Bennett's estimator over all paths of the frozen production, ``walkers`` the share of the walkers in each basin. An estimate
that does not exist yet is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from umbrella import COMPARISONS, DISTANCES, ROOT, start_below_the_barrier

from boltzgen.config import PathsConfig, make_config
from boltzgen.estimators.path_free_energy import basin_free_energy
from boltzgen.paths import Paths, PathWalkers, Schedule
from boltzgen.sampling.adaptive import Cycle
from boltzgen.sampling.steered import FreePaths
from boltzgen.workflows.path_analysis import memberships
from boltzgen.workflows.path_records import path_rows
from boltzgen.workflows.paths import PathProblem, make_sampler, open_problem
from boltzgen.workflows.run_folder import provenance
from boltzgen.workflows.seeds import stream

WALKERS, PROPOSALS = 4, ("fixed", "learned")


def configuration(system: str, method: str, *, steps: int, seed: int) -> PathsConfig:
    """The run of a method, long enough to be stopped by its evaluations."""
    distance, comparison = DISTANCES[system], COMPARISONS[system]

    def length(sigmas: float) -> str:
        return f"{sigmas * distance.sigma} nanometer"

    peaks = [{"centre": {"r": length(mean)}, "width": {"r": length(comparison.peak_width)}} for mean in comparison.peaks]
    config = make_config(
        {
            "task": "paths", "topology": "topology.pdb", "system": "system.xml", "seed": seed, "temperature": f"{distance.kelvin} kelvin",
            "platform": {"name": "CPU", "contexts": 1},
            "collective_variables": {"r": {"kind": "distance", "atoms": list(distance.atoms)}},
            "ranges": {"r": [length(end) for end in comparison.reach]}, "widths": {"r": length(comparison.held)},
            "basins": {"near": {"r": [length(0), length(distance.barrier)]}, "far": {"r": [length(distance.barrier), length(99)]}},
            "dynamics": {"timestep": f"{1000 * comparison.dt * distance.tau:.1f} femtosecond", "planar": distance.planar},
            "local": {"steps": 50, "per_cycle": 1}, "paths": {"steps": steps},
            "proposal": {"kind": method} | ({"peaks": peaks} if method == "fixed" else {}),
            "adaptation": {"rounds": 4, "cycles": 8}, "production": {"cycles": 100_000},
        },
        folder=ROOT.parent / "systems" / system,
    )  # fmt: skip
    assert isinstance(config, PathsConfig)
    return config


def run(system: str, method: str, problem: PathProblem, x: np.ndarray, *, steps: int, checkpoints: np.ndarray, seed: int) -> dict[str, Any]:
    """Curves of one run."""
    config, distance = configuration(system, method, steps=steps, seed=seed), DISTANCES[system]
    far = distance.barrier * distance.sigma
    engine, generator, spent = problem.engine, stream(seed, 21), 0
    walkers = engine.locate(torch.from_numpy(x)[None].repeat(WALKERS, 1, 1))
    local = FreePaths(engine, n_steps=50)
    for _ in range(10):
        walkers, info = local.step(walkers, generator=generator)
        spent += int(info.result.n_force.sum())
    sampler = make_sampler(config, problem, engine, walkers, Schedule(steps, span=(COMPARISONS[system].way * distance.sigma,)))
    tables: list[Paths] = []
    shares: list[np.ndarray] = []
    curves: dict[str, list[float | None]] = {"bar": [], "bar_stderr": [], "walkers": []}
    for wanted in checkpoints:
        while spent < wanted:
            cycle = sampler.advance()
            spent += cost(cycle)
            if cycle.stage == "production":
                table = path_rows(cycle)
                assert table is not None
                assert isinstance(cycle.state, PathWalkers)
                tables.append(table)
                shares.append(cycle.state.xi.numpy()[:, 0] > far)
        for name, value in estimates(config, tables, shares, seed=seed).items():
            curves[name].append(value)
    paths = Paths.joined(tables)
    across = (paths.xi_start[:, 0] > far) != (paths.end[:, 0] > far)
    crossed = paths.accepted & ((paths.xi_start[:, 0] > far) != (paths.xi_end[:, 0] > far))
    production = int(paths.n_force.sum()) + 52 * len(paths)
    return {
        "delta_f_kT": curves, "acceptance_across": float(np.exp(-paths.w[across].clip(min=0)).mean()), "n_across": int(across.sum()),
        "steps_across": float(paths.n_force[across].mean() - 2), "acceptance": float(paths.accepted.mean()),
        "crossings": int(crossed.sum()), "crossings_per_million": 1e6 * crossed.sum() / production, "failed": int(paths.failed.sum()),
        "production_evaluations": production,
    }  # fmt: skip


def cost(cycle: Cycle) -> int:
    """Force evaluations of a cycle."""
    moves = [*cycle.local, *([] if cycle.jump is None else [cycle.jump])]
    return sum(int(info.result.n_force.sum()) for info in moves)  # type: ignore[attr-defined]


def estimates(config: PathsConfig, tables: list[Paths], shares: list[np.ndarray], *, seed: int) -> dict[str, float | None]:
    """ΔF = −ln(p_far/p_near) of the production so far."""
    if len(tables) < 4:
        return dict.fromkeys(("bar", "bar_stderr", "walkers"))
    regions = memberships(config)
    found = basin_free_energy(Paths.joined(tables), regions["near"], regions["far"], n_bootstrap=50, seed=seed).difference
    far = float(np.mean(shares))
    numbers = {
        "bar": float(found.value),
        "bar_stderr": float(found.stderr),
        "walkers": -math.log(far / (1 - far)) if 0 < far < 1 else math.nan,
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


@click.command(help=__doc__)
@click.option("--system", type=click.Choice(list(DISTANCES)), default="polymer_in_solvent")
@click.option("--method", type=click.Choice(["all", *PROPOSALS]), default="all")
@click.option("--replicas", "n_replicas", default=8)
@click.option("--evaluations", default=250_000)
@click.option("--steps", type=int, default=None, help="Steps of a path from basin to basin; that of the system's comparison by default.")
@click.option("--seed", default=2026)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="results/path_sampling_SYSTEM.json by default.")
def main(system: str, method: str, n_replicas: int, evaluations: int, steps: int | None, seed: int, out: Path | None) -> None:
    """Run, and store the curves."""
    distance, comparison = DISTANCES[system], COMPARISONS[system]
    distance, steps = dataclasses.replace(distance, dt=comparison.dt), steps or comparison.steps
    out = out or ROOT / "results" / f"path_sampling_{system}.json"
    torch.set_num_threads(1)
    names = list(PROPOSALS) if method == "all" else [method]
    checkpoints = np.geomspace(min(10_000, evaluations / 10), evaluations, 12).round().astype(int)
    made_by, runs = provenance(seed, "", sha256={}), list[dict[str, Any]]()
    problem = open_problem(configuration(system, names[0], steps=steps, seed=seed))
    for replica in range(n_replicas):
        x = start_below_the_barrier(distance, seed=seed + replica)
        for index, name in enumerate(names):
            begun, one_seed = time.perf_counter(), seed + 1000 * (index + 1) + replica
            found = run(system, name, problem, x, steps=steps, checkpoints=checkpoints, seed=one_seed)
            seconds = round(time.perf_counter() - begun)
            runs.append({"method": name, "replica": replica, "seed": one_seed, "wall_seconds": seconds, **found})
            stored = {
                "definition": f"-ln(p(r > {distance.barrier:g} sigma)/p(r < {distance.barrier:g} sigma)) in kT, from the near basin",
                "system": system, "evaluations": checkpoints.tolist(), "steps": steps, "walkers": WALKERS,
                "settings": dataclasses.asdict(comparison),
                "command": f"python benchmarks/path_sampling.py --system {system} --method {method} --replicas {n_replicas} "
                f"--evaluations {evaluations} --steps {steps} --seed {seed}",
                "machine": made_by["machine"], "versions": made_by["versions"], "runs": runs,
            }  # fmt: skip
            out.write_text(json.dumps(stored, indent=1) + "\n")
            last = found["delta_f_kT"]
            print(f"{name} {replica}: {last['bar'][-1]} +- {last['bar_stderr'][-1]}, walkers {last['walkers'][-1]}; across "
                  f"{found['acceptance_across']:.3f} at {found['steps_across']:.0f} steps, {found['crossings_per_million']:.0f} crossings "
                  f"per million; {seconds} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
