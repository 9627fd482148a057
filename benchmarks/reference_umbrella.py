"""Independent reference of the two basins of a distance: ΔF and profile by umbrella sampling and MBAR.

    python benchmarks/reference_umbrella.py polymer_in_solvent

ΔF = F(R > barrier) − F(R < barrier) = −ln(p_far / p_near) in kT; the profile is −ln of the density of R itself, no Jacobian removed.
One walker goes up and down through the windows, several times, each window from where the last ended; a part of every window is left
out. Sweeps up and sweeps down are solved apart too, and must agree. The error is the larger of the scatter of the sweeps and that of
halves of the windows' frames. The walker moves by generalised hybrid Monte Carlo, which has no error of the time step. ``--langevin``
takes Langevin dynamics instead, which has one: a check, stored beside the first. Windows beyond the basins get a quarter of the steps.
Writes into ``benchmarks/results/reference_umbrella.json``.

    python benchmarks/reference_umbrella.py polymer_in_solvent --engine compiled --sweeps 24 --keep SWEEPS.npz

takes compiled code for the polymer (needs a C compiler), some five times as fast, under a key of its own. ``probability`` of every entry is
that of bins of 0.02 σ, from all sweeps and from pairs of them (one up, one down), so that a profile is known with its error on any bins.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from hybrid_monte_carlo import LENGTH, CompiledWalker, HybridWalker
from liquid_order import largest_structure_factor
from tqdm import tqdm
from umbrella import DISTANCES, ROOT, Distance, biased_context, fine_edges, solve, sweep

from boltzgen.workflows.run_folder import provenance

RESULT = ROOT / "results" / "reference_umbrella.json"
Frames = list[dict[int, np.ndarray]]


@dataclass(frozen=True)
class Plan:
    """How long: sweeps, steps of a window that are kept and those that are left out."""

    n_sweeps: int
    n_steps: int
    equilibration: int

    def orders(self, n_windows: int) -> list[range]:
        """The windows of every sweep, up and down in turn."""
        return [range(n_windows) if s % 2 == 0 else range(n_windows - 1, -1, -1) for s in range(self.n_sweeps)]


def sample_exactly(
    distance: Distance, plan: Plan, *, seed: int, walker_kind: type[HybridWalker | CompiledWalker] = HybridWalker, keep: Path | None = None
) -> tuple[Frames, dict[str, Any]]:
    """The distances of every sweep by window, from hybrid Monte Carlo, and what it cost. A way down comes first and is left out.

    What is done so far is in the file ``keep`` after every sweep; sweeps that are there already count, and the walker of the rest is new.
    The structure factor at the end of every window tells whether the liquid still is one; the largest of every new sweep is given.
    """
    frames, orders, edge = _kept(keep), plan.orders(len(distance.centres)), distance.edge
    peaks: list[list[float]] = []
    if len(frames) < plan.n_sweeps:
        walker = walker_kind(distance, seed=seed + len(frames))
        walker.trace(10 * plan.equilibration // LENGTH)
        for k in range(int(np.argmin(np.abs(distance.centres - walker.r))), -1, -1):
            walker.enter(k)
            walker.trace(2 * plan.equilibration // LENGTH)
    for order in tqdm(orders[len(frames) :], desc="sweeps", mininterval=10):
        frames.append({})
        peaks.append([])
        for k in order:
            walker.enter(k)
            walker.trace(plan.equilibration // LENGTH)
            frames[-1][k] = walker.trace(int(distance.share[k] * plan.n_steps) // LENGTH)
            peaks[-1].append(largest_structure_factor(walker.x, edge))
        if keep is not None:
            np.savez(keep, **{f"{s}_{k}": r for s, one in enumerate(frames) for k, r in one.items()})
    frames = frames[: plan.n_sweeps]
    moved = np.concatenate([np.diff(r) != 0 for one in frames for r in one.values()])
    trajectories = sum(len(r) + plan.equilibration // LENGTH for one in frames for r in one.values())
    return frames, {
        "acceptance": float(moved.mean()), "force_evaluations": trajectories * LENGTH,
        "largest_structure_factor_of_sweeps": [round(max(some), 1) for some in peaks],
    }  # fmt: skip


def _kept(keep: Path | None) -> Frames:
    """The sweeps in a file, if there is one."""
    if keep is None or not keep.exists():
        return []
    with np.load(keep) as file:
        n = 1 + max(int(name.split("_")[0]) for name in file.files)
        frames: Frames = [{} for _ in range(n)]
        for name in file.files:
            s, k = map(int, name.split("_"))
            frames[s][k] = file[name].astype(np.float64)
    return frames


def sample_by_langevin(distance: Distance, plan: Plan, *, seed: int, stride: int = 20) -> tuple[Frames, dict[str, Any]]:
    """The same from Langevin dynamics, which has an error of the time step."""
    system, x = distance.load()
    context = biased_context(distance, system, x, dt=distance.dt, seed=seed)
    nearest = int(np.argmin(np.abs(distance.centres - distance.measure(context))))
    steps = 2 * plan.equilibration
    first = sum(steps + 1 for _ in sweep(distance, context, range(nearest, -1, -1), n_frames=[1] * 99, stride=1, equilibration=steps))
    n_frames = (distance.share * plan.n_steps).astype(int) // stride
    frames = [
        dict(sweep(distance, context, order, n_frames=n_frames, stride=stride, equilibration=plan.equilibration))
        for order in tqdm(plan.orders(len(distance.centres)), desc="sweeps", mininterval=10)
    ]
    counted = plan.n_sweeps * (n_frames.sum() * stride + len(n_frames) * plan.equilibration)
    return frames, {"force_evaluations": int(first + counted)}


def pooled(frames: Frames) -> dict[int, np.ndarray]:
    """All frames by window."""
    return {k: np.concatenate([one[k] for one in frames]) for k in frames[0]}


def scatter(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis."""
    return np.asarray(values.std(axis=0, ddof=1) / np.sqrt(len(values)))


def aligned(profiles: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Profiles ``[n, bins]`` shifted to the same probability over the bins ``common`` that all have seen."""
    return np.asarray(profiles + np.log(np.exp(-profiles[:, common]).sum(axis=1, keepdims=True)))


def analyse(distance: Distance, frames: Frames, bins: int) -> dict[str, Any]:
    """Estimate from all frames, its error, and what tells whether to trust it."""
    everything = solve(distance, pooled(frames), bins)
    sweeps = [solve(distance, one, bins) for one in frames]
    halves = [solve(distance, {k: np.array_split(r, 2)[h] for k, r in one.items()}, bins) for one in frames for h in range(2)]
    up, down = (solve(distance, pooled(frames[d::2]), bins).delta_f for d in range(2))
    by_sweep, by_half = (np.array([s.delta_f for s in some]) for some in (sweeps, halves))
    profiles = np.array([s.profile for s in sweeps])
    edges = np.linspace(*distance.edges, bins + 1)
    low = everything.profile < 10
    shown = np.isfinite(profiles).all(axis=0) & low
    errors = scatter(aligned(profiles[:, shown], np.ones(shown.sum(), dtype=bool)))
    wanted = everything.profile[shown] < 6
    return {
        "delta_f_kT": everything.delta_f,
        "stderr_kT": float(max(scatter(by_sweep), scatter(by_half))),
        "stderr_by_sweeps_kT": float(scatter(by_sweep)),
        "stderr_by_halves_of_windows_kT": float(scatter(by_half)),
        "up_kT": up,
        "down_kT": down,
        "sweeps_kT": by_sweep.tolist(),
        "mbar_overlap": everything.overlap,
        "largest_profile_stderr_below_6_kT": float(errors[wanted].max()),
        "profile": {
            "r_sigma": (0.5 * (edges[1:] + edges[:-1]))[shown].tolist(),
            "f_kT": everything.profile[shown].tolist(),
            "stderr_kT": errors.tolist(),
        },
        "probability": {"edges_sigma": fine_edges(distance).round(6).tolist(), "all": _digits(everything.probability),
                        "pairs_of_sweeps": [_digits(solve(distance, pooled(frames[s : s + 2]), bins).probability)
                                            for s in range(0, len(frames) - 1, 2)]},
    }  # fmt: skip


def _digits(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4e}") for value in values]


@click.command()
@click.argument("system", type=click.Choice(list(DISTANCES)))
@click.option("--sweeps", "n_sweeps", default=10, help="Sweeps through all windows, up and down in turn.")
@click.option("--steps", "n_steps", default=24_000, help="Recorded steps of every window between the basins and sweep.")
@click.option("--equilibration", default=1_800, help="Steps left out at the start of every window.")
@click.option("--langevin", is_flag=True, help="Langevin dynamics instead of hybrid Monte Carlo: a check.")
@click.option("--engine", type=click.Choice(["openmm", "compiled"]), default="openmm", help="What moves the walker of hybrid Monte Carlo.")
@click.option("--keep", type=click.Path(path_type=Path), default=None, help="File for the distances of all sweeps so far.")
@click.option("--dt", type=float, default=None, help="Time step in tau; that of the system by default.")
@click.option("--bins", default=60)
@click.option("--seed", default=2026)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(
    system: str, n_sweeps: int, n_steps: int, equilibration: int, langevin: bool, engine: str, keep: Path | None, dt: float | None,
    bins: int, seed: int, out: Path,
) -> None:  # fmt: skip
    """Sample, solve and store the reference of SYSTEM."""
    begun, distance = time.perf_counter(), DISTANCES[system]
    if dt is not None:
        distance = dataclasses.replace(distance, dt=dt)
    plan = Plan(n_sweeps, n_steps, equilibration)
    kind = CompiledWalker if engine == "compiled" else HybridWalker
    frames, cost = (
        sample_by_langevin(distance, plan, seed=seed) if langevin
        else sample_exactly(distance, plan, seed=seed, walker_kind=kind, keep=keep)
    )  # fmt: skip
    found = analyse(distance, frames, bins)
    made_by = provenance(seed, "", sha256={})
    options = f"--sweeps {n_sweeps} --steps {n_steps} --equilibration {equilibration}{' --langevin' if langevin else f' --engine {engine}'}"
    found |= {
        "definition": f"-ln(p(r > {distance.barrier:g} sigma)/p(r < {distance.barrier:g} sigma)); profile: -ln density of r, per sigma, "
        "its lowest value zero, no Jacobian removed",
        "sigma_nm": distance.sigma, "tau_ps": distance.tau, "kelvin": distance.kelvin,
        "centres_sigma": distance.centres.tolist(), "share_of_steps": distance.share.tolist(),
        "stiffness_kT_per_sigma2": distance.stiffness, "dt_tau": distance.dt, "friction_per_tau": distance.friction,
        **cost, "seed": seed, "wall_seconds": round(time.perf_counter() - begun),
        "command": f"python benchmarks/reference_umbrella.py {system} {options} --dt {distance.dt:g} --bins {bins} --seed {seed}",
        "machine": made_by["machine"], "versions": made_by["versions"],
    }  # fmt: skip
    stored = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(exist_ok=True)
    key = f"{system}, Langevin" if langevin else f"{system}, compiled" if engine == "compiled" else system
    out.write_text(json.dumps(stored | {key: found}, indent=1) + "\n")
    print(
        f"{system}: dF = {found['delta_f_kT']:.3f} +- {found['stderr_kT']:.3f} kT; up {found['up_kT']:.3f}, down {found['down_kT']:.3f}; "
        f"profile +- {found['largest_profile_stderr_below_6_kT']:.3f} below 6 kT"
    )


if __name__ == "__main__":
    main()
