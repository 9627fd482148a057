"""Steered paths beside the usual ways of path_baselines.py: ΔF of the polymer's two basins against force evaluations.

    python benchmarks/path_sampling.py --replicas 8 --evaluations 500000

Every run starts four walkers from the configuration of the near basin that the baselines of the same replica start from, and counts
everything: equilibration, adaptation, rejected paths. ``fixed`` has the proposal of arXiv 2512.16812 (a tenth of it the whole range);
``learned`` knows only the range of the distance, and learns a flow while it samples. ``bar`` is Bennett's estimator over all paths of the
frozen production, ``walkers`` the share of the walkers in each basin. An estimate that does not exist yet is null.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from umbrella import DISTANCES, ROOT, start_below_the_barrier

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

SYSTEM, SIGMA, WALKERS, WAY = "polymer_in_solvent", 0.34, 4, 0.72
TOP = f"{4.62 * SIGMA} nanometer"
PEAKS = [{"centre": {"r": f"{mean * SIGMA} nanometer"}, "width": {"r": f"{0.17 * SIGMA} nanometer"}} for mean in (3.529, 5.651)]
PROPOSALS: dict[str, dict[str, Any]] = {"fixed": {"kind": "fixed", "peaks": PEAKS}, "learned": {"kind": "learned"}}


def configuration(method: str, *, steps: int, seed: int) -> PathsConfig:
    """The run of a method, long enough to be stopped by its evaluations."""
    config = make_config(
        {
            "task": "paths", "topology": "topology.pdb", "system": "system.xml", "seed": seed,
            "platform": {"name": "CPU", "contexts": 1},
            "collective_variables": {"r": {"kind": "distance", "atoms": [0, 8]}},
            "ranges": {"r": ["0.95 nanometer", "2.2 nanometer"]}, "widths": {"r": f"{0.1 * SIGMA} nanometer"},
            "basins": {"near": {"r": ["0 nanometer", TOP]}, "far": {"r": [TOP, "9 nanometer"]}},
            "dynamics": {"timestep": "23.3 femtosecond"}, "local": {"steps": 50, "per_cycle": 1}, "paths": {"steps": steps},
            "proposal": PROPOSALS[method], "adaptation": {"rounds": 4, "cycles": 8}, "production": {"cycles": 100_000},
        },
        folder=ROOT.parent / "systems" / SYSTEM,
    )  # fmt: skip
    assert isinstance(config, PathsConfig)
    return config


def run(method: str, problem: PathProblem, x: np.ndarray, *, steps: int, checkpoints: np.ndarray, seed: int) -> dict[str, Any]:
    """Curves of one run."""
    config = configuration(method, steps=steps, seed=seed)
    engine, generator, spent = problem.engine, stream(seed, 21), 0
    walkers = engine.locate(torch.from_numpy(x)[None].repeat(WALKERS, 1, 1))
    local = FreePaths(engine, n_steps=50)
    for _ in range(10):
        walkers, info = local.step(walkers, generator=generator)
        spent += int(info.result.n_force.sum())
    sampler = make_sampler(config, problem, engine, walkers, Schedule(steps, span=(WAY,)))
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
                shares.append(cycle.state.xi.numpy()[:, 0] > 4.62 * SIGMA)
        for name, value in estimates(config, tables, shares, seed=seed).items():
            curves[name].append(value)
    paths = Paths.joined(tables)
    far = 4.62 * SIGMA
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
@click.option("--method", type=click.Choice(["all", *PROPOSALS]), default="all")
@click.option("--replicas", "n_replicas", default=8)
@click.option("--evaluations", default=500_000)
@click.option("--steps", default=500, help="Steps of a path from basin to basin.")
@click.option("--seed", default=1)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results/path_sampling.json")
def main(method: str, n_replicas: int, evaluations: int, steps: int, seed: int, out: Path) -> None:
    """Run, and store the curves."""
    torch.set_num_threads(1)
    names = list(PROPOSALS) if method == "all" else [method]
    checkpoints = np.geomspace(min(10_000, evaluations / 10), evaluations, 12).round().astype(int)
    made_by, runs, distance = provenance(seed, "", sha256={}), list[dict[str, Any]](), DISTANCES[SYSTEM]
    problem = open_problem(configuration(names[0], steps=steps, seed=seed))
    for replica in range(n_replicas):
        x = start_below_the_barrier(distance, seed=seed + replica)
        for index, name in enumerate(names):
            begun, one_seed = time.perf_counter(), seed + 1000 * (index + 1) + replica
            found = run(name, problem, x, steps=steps, checkpoints=checkpoints, seed=one_seed)
            seconds = round(time.perf_counter() - begun)
            runs.append({"method": name, "replica": replica, "seed": one_seed, "wall_seconds": seconds, **found})
            stored = {
                "definition": "-ln(p(r > 4.62 sigma)/p(r < 4.62 sigma)) in kT, from the near basin", "system": SYSTEM,
                "evaluations": checkpoints.tolist(), "steps": steps, "walkers": WALKERS,
                "command": f"python benchmarks/path_sampling.py --method {method} --replicas {n_replicas} --evaluations {evaluations} "
                f"--steps {steps} --seed {seed}",
                "machine": made_by["machine"], "versions": made_by["versions"], "runs": runs,
            }  # fmt: skip
            out.write_text(json.dumps(stored, indent=1) + "\n")
            last = found["delta_f_kT"]
            print(f"{name} {replica}: {last['bar'][-1]} +- {last['bar_stderr'][-1]}, walkers {last['walkers'][-1]}; across "
                  f"{found['acceptance_across']:.3f} at {found['steps_across']:.0f} steps, {found['crossings_per_million']:.0f} crossings "
                  f"per million; {seconds} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
