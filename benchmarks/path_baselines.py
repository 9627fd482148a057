"""Three usual ways to the free energy of two basins at equal cost: plain MD, well-tempered metadynamics, umbrella sampling with MBAR.

    python benchmarks/path_baselines.py --system polymer_in_solvent --method all --replicas 8 --evaluations 1000000

Every run starts in the basin of small distances from a configuration of its own, makes at most ``--evaluations`` force evaluations of the
whole system, and gives ΔF = −ln(p_far / p_near) in kT at about twelve numbers of evaluations. All are counted: equilibration, pulling
through the windows, every window. An estimate that does not exist yet (no crossing, a window without frames) is null.
The runs are independent and in turn: the first replica of every method, then the second. The file is written after each.

* md: frames of one Langevin run, the first 5,000 steps left out.
* metadynamics: OpenMM's ``app.Metadynamics`` on the distance. ``bias`` is the estimate from the bias at that time,
  F(R) = −γ/(γ−1) V(R, t) integrated over the basins; ``reweighted`` weighs frames by exp((V(R_t, t) − c(t))/kT) with the c(t) of Tiwary
  and Parrinello, J. Phys. Chem. B 119, 736 (2015), eq. 12, and leaves out the first fifth.
* umbrella: pulled through the windows once, then all windows in turn, a short piece each, every window going on from its own last
  configuration; MBAR over the frames so far, the first tenth of every window left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import openmm
from openmm import app
from scipy.special import logsumexp
from tqdm import tqdm
from umbrella import (
    COMPARISONS,
    DISTANCES,
    ROOT,
    Comparison,
    Distance,
    biased_context,
    langevin,
    solve,
    start,
    start_below_the_barrier,
    thermal_context,
    trace,
)

from boltzgen.workflows.run_folder import provenance

STRIDE = 20
Curves = dict[str, list[float]]


def difference(log_w: np.ndarray, far: np.ndarray) -> float:
    """−ln of the ratio of total weights, far over near; nan where one side is empty."""
    if not far.any() or far.all():
        return math.nan
    return float(logsumexp(log_w[~far]) - logsumexp(log_w[far]))


class Method(ABC):
    """A way to ΔF whose estimates are asked for at given numbers of force evaluations."""

    @abstractmethod
    def run(self, distance: Distance, x: np.ndarray, *, checkpoints: np.ndarray, seed: int) -> Curves:
        """Estimates by name, one per checkpoint, in kT; nan where there is none. ``x`` ``[n, 3]`` in nm is in the near basin."""


@dataclasses.dataclass(frozen=True)
class PlainMD(Method):
    """One Langevin run."""

    equilibration: int = 5_000

    def run(self, distance: Distance, x: np.ndarray, *, checkpoints: np.ndarray, seed: int) -> Curves:
        context = thermal_context(distance, distance.load()[0], x, dt=distance.dt, seed=seed)
        context.getIntegrator().step(self.equilibration)
        r = trace(distance, context, (int(checkpoints[-1]) - self.equilibration) // STRIDE, STRIDE)
        counts = (checkpoints - self.equilibration) // STRIDE
        return {"frequencies": [difference(np.zeros(n), r[:n] > distance.barrier) if n > 0 else math.nan for n in counts]}


@dataclasses.dataclass(frozen=True)
class WellTempered(Method):
    """Well-tempered metadynamics.

    Attributes:
        height: Of the first Gaussians, in kT.
        width: Of the Gaussians, in σ.
        pace: Steps between Gaussians.
        gamma: Bias factor.
    """

    height: float = 0.25
    width: float = 0.1
    pace: int = 200
    gamma: float = 8.0

    def run(self, distance: Distance, x: np.ndarray, *, checkpoints: np.ndarray, seed: int) -> Curves:
        simulation, metadynamics, grid = self._simulation(distance, x, seed)
        frames, hills, from_bias, crossed = [], [], [], False
        for wanted in checkpoints:
            while simulation.currentStep + STRIDE <= wanted:
                metadynamics.step(simulation, STRIDE)
                r = metadynamics.getCollectiveVariables(simulation)[0] / distance.sigma
                if simulation.currentStep % self.pace == 0:
                    hills.append(metadynamics._totalBias / distance.kt)
                frames.append((r, len(hills) - 1))
                crossed |= r > distance.barrier
            flooded = difference(self.gamma / (self.gamma - 1) * hills[-1], grid > distance.barrier) if crossed and hills else math.nan
            from_bias.append(flooded)
        r, stage = (np.array(part) for part in zip(*frames, strict=True))
        log_w = self._log_weights(r, stage.astype(int), grid, np.array(hills))
        return {"bias": from_bias, "reweighted": [self._reweighted(distance, r, log_w, n // STRIDE) for n in checkpoints]}

    def _simulation(self, distance: Distance, x: np.ndarray, seed: int) -> tuple[app.Simulation, app.Metadynamics, np.ndarray]:
        system, _ = distance.load()
        bond = openmm.CustomBondForce("r")
        bond.addBond(*distance.atoms, [])
        low, high = distance.edges[0] - 0.4, distance.edges[1] + 0.4
        n_grid = math.ceil(5 * (high - low) / self.width)
        variable = app.BiasVariable(bond, low * distance.sigma, high * distance.sigma, self.width * distance.sigma, gridWidth=n_grid)
        metadynamics = app.Metadynamics(system, [variable], distance.kelvin, self.gamma, self.height * distance.kt, self.pace)
        platform = openmm.Platform.getPlatformByName("CPU")
        simulation = app.Simulation(app.Topology(), system, langevin(distance, distance.dt, seed), platform, {"Threads": "1"})
        start(distance, simulation.context, x, seed=seed)
        return simulation, metadynamics, np.linspace(low, high, n_grid)

    def _log_weights(self, r: np.ndarray, stage: np.ndarray, grid: np.ndarray, hills: np.ndarray) -> np.ndarray:
        """(V(R_t, t) − c(t)) / kT of every frame; ``stage`` is the last bias in ``hills`` that it saw, −1 for none."""
        c = logsumexp(self.gamma / (self.gamma - 1) * hills, axis=1) - logsumexp(hills / (self.gamma - 1), axis=1)
        out = np.zeros(len(r))
        for k in range(len(hills)):
            here = stage == k
            out[here] = np.interp(r[here], grid, hills[k]) - c[k]
        return out

    @staticmethod
    def _reweighted(distance: Distance, r: np.ndarray, log_w: np.ndarray, n: int) -> float:
        kept = slice(n // 5, n)
        return difference(log_w[kept], r[kept] > distance.barrier)


@dataclasses.dataclass(frozen=True)
class Umbrella(Method):
    """Umbrella sampling and MBAR.

    Attributes:
        pulling: Steps in every window of the first passage.
        piece: Steps in a window before the next one's turn.
        left_out: Fraction of every window's frames, from its start.
    """

    pulling: int = 400
    piece: int = 200
    left_out: float = 0.1

    def run(self, distance: Distance, x: np.ndarray, *, checkpoints: np.ndarray, seed: int) -> Curves:
        context = biased_context(distance, distance.load()[0], x, dt=distance.dt, seed=seed)
        windows, evaluations = range(len(distance.centres)), 0
        first = int(np.argmin(np.abs(distance.centres - distance.measure(context))))
        states: dict[int, tuple[Any, Any]] = {}
        for k in [*range(first, -1, -1), *range(first + 1, len(windows))]:
            if k == first + 1:
                self._enter(context, distance, k, states[first])
            context.setParameter("centre", distance.centres[k] * distance.sigma)
            context.getIntegrator().step(self.pulling)
            states[k] = self._leave(context)
            evaluations += self.pulling
        frames: dict[int, list[np.ndarray]] = {k: [] for k in windows}
        estimates = []
        for wanted in checkpoints:
            while evaluations + len(windows) * self.piece <= wanted:
                for k in windows:
                    self._enter(context, distance, k, states[k])
                    frames[k].append(trace(distance, context, self.piece // STRIDE, STRIDE))
                    states[k] = self._leave(context)
                evaluations += len(windows) * self.piece
            estimates.append(self._estimate(distance, frames))
        return {"mbar": estimates}

    @staticmethod
    def _enter(context: openmm.Context, distance: Distance, k: int, state: tuple[Any, Any]) -> None:
        context.setParameter("centre", distance.centres[k] * distance.sigma)
        context.setPositions(state[0])
        context.setVelocities(state[1])

    @staticmethod
    def _leave(context: openmm.Context) -> tuple[Any, Any]:
        state = context.getState(positions=True, velocities=True)
        return state.getPositions(asNumpy=True), state.getVelocities(asNumpy=True)

    def _estimate(self, distance: Distance, frames: Mapping[int, Sequence[np.ndarray]]) -> float:
        if not all(len(pieces) for pieces in frames.values()):
            return math.nan
        series = {k: np.concatenate(pieces) for k, pieces in frames.items()}
        return solve(distance, {k: r[int(self.left_out * len(r)) :] for k, r in series.items()}, bins=10).delta_f


def methods(comparison: Comparison) -> dict[str, Method]:
    """By name, with the settings of a system."""
    return {"md": PlainMD(), "metadynamics": WellTempered(width=comparison.hill, gamma=comparison.gamma), "umbrella": Umbrella()}


def without_nan(curves: Curves) -> dict[str, list[float | None]]:
    """As JSON has it."""
    return {name: [None if math.isnan(f) else f for f in curve] for name, curve in curves.items()}


@click.command()
@click.option("--system", type=click.Choice(list(DISTANCES)), default="polymer_in_solvent")
@click.option("--method", type=click.Choice(["md", "metadynamics", "umbrella", "all"]), default="all")
@click.option("--replicas", "n_replicas", default=8)
@click.option("--evaluations", default=1_000_000)
@click.option("--dt", type=float, default=None, help="Time step in tau; that of the system's comparison by default.")
@click.option("--seed", default=2026)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="results/path_baselines_SYSTEM.json by default.")
def main(system: str, method: str, n_replicas: int, evaluations: int, dt: float | None, seed: int, out: Path | None) -> None:
    """Run, and store the curves."""
    dt, out = dt or COMPARISONS[system].dt, out or ROOT / "results" / f"path_baselines_{system}.json"
    distance, known = dataclasses.replace(DISTANCES[system], dt=dt), methods(COMPARISONS[system])
    names = list(known) if method == "all" else [method]
    checkpoints = np.geomspace(min(10_000, evaluations / 10), evaluations, 12).round().astype(int)
    made_by, runs = provenance(seed, "", sha256={}), []
    for replica in range(n_replicas):
        x = start_below_the_barrier(distance, seed=seed + replica)
        for index, name in enumerate(tqdm(names, desc=f"replica {replica + 1}/{n_replicas}", mininterval=10)):
            begun, one_seed = time.perf_counter(), seed + 1000 * (index + 1) + replica
            curves = known[name].run(distance, x, checkpoints=checkpoints, seed=one_seed)
            seconds = round(time.perf_counter() - begun)
            runs.append({"method": name, "replica": replica, "seed": one_seed, "wall_seconds": seconds, "delta_f_kT": without_nan(curves)})
            stored = {
                "definition": f"-ln(p(r > {distance.barrier:g} sigma)/p(r < {distance.barrier:g} sigma)) in kT, from the near basin",
                "system": system, "evaluations": checkpoints.tolist(), "dt_tau": dt, "friction_per_tau": distance.friction,
                "windows_sigma": distance.centres.tolist(), "stiffness_kT_per_sigma2": distance.stiffness,
                "settings": {one: dataclasses.asdict(known[one]) for one in names},  # type: ignore[call-overload]
                "command": f"python benchmarks/path_baselines.py --system {system} --method {method} --replicas {n_replicas} "
                f"--evaluations {evaluations} --dt {dt:g} --seed {seed}",
                "machine": made_by["machine"], "versions": made_by["versions"], "runs": runs,
            }  # fmt: skip
            out.write_text(json.dumps(stored, indent=1) + "\n")
            last = {estimate: curve[-1] for estimate, curve in runs[-1]["delta_f_kT"].items()}
            print(f"{name} {replica}: {last} after {evaluations} evaluations, {seconds} s", flush=True)


if __name__ == "__main__":
    main()
