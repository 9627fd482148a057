"""Reference free energy difference of two states by MBAR over states in between; no map and no flow is involved.

    python benchmarks/reference_path.py ff96_to_amber14
    python benchmarks/reference_path.py systems/NAME/CONFIG.yaml --states 12 --steps 100000

The two states are those of a ``boltzgen tfep`` configuration: systems, parameters, temperatures and basins. State k of the path is
u_k = s_k [(1 − λ_k) u_A + λ_k u_B], λ_k = k/(K − 1): a linear mixture that is hotter in the middle, s_k = (T/T_hot)^(1 − |2λ_k − 1|), so
that replicas cross there what separates basins in A and B. K replicas, each minimised and equilibrated in its own state, exchange
neighbouring states by the Metropolis rule; independent sets of them are run one after the other. MBAR over all frames gives F_B − F_A.

A and B themselves are two more states, known by reweighting: with their exact energies, inside their basins, in the handedness of the
start. What is sampled may differ from them: basins have finite walls, hydrogens weigh 4 Da (masses do not enter a density of
configurations), and a CustomGBForce is sampled as OpenMM's native OBC2, which is many times faster. Errors are bootstraps over blocks of
time that hold the frames of all states of a set, as exchange carries configurations between them; a block is five times as long as the
slowest memory of energies and torsions, in a state or averaged over all of them. The time step (2 fs with heavy hydrogens) is the one
inexact part, as in every simulation.
Results go to ``benchmarks/results/reference_path.json``, by name.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import openmm
import torch
from reference_free_energy import sampled_system
from tqdm import tqdm

from boltzgen.chirality import Handedness
from boltzgen.config import TfepConfig, load_config
from boltzgen.config.tfep import BASIN
from boltzgen.core import Target
from boltzgen.errors import InputError
from boltzgen.estimators.multistate import MultistateFreeEnergies, halves, multistate_free_energies, multistate_verdict
from boltzgen.estimators.state_potentials import StatePotentials
from boltzgen.estimators.timeseries import statistical_inefficiency
from boltzgen.md.mixing import MixedLangevinIntegrator, end_energies, mixed_system
from boltzgen.md.platforms import PlatformChoice, choose_platform
from boltzgen.md.simulate import heavy_torsions
from boltzgen.md.trajectory import torsion_angles
from boltzgen.units import thermal_energy
from boltzgen.workflows.basin import confined
from boltzgen.workflows.molecule import load_problem
from boltzgen.workflows.run_folder import RunFolder, provenance

ROOT = Path(__file__).parent
RESULT = ROOT / "results" / "reference_path.json"
PAIRS = {
    "ff96_to_amber14": "alanine_dipeptide_vacuum/to_amber14.yaml",
    "vacuum_to_implicit": "alanine_dipeptide_vacuum/to_implicit.yaml",
    "deca_alanine_to_implicit": "deca_alanine_vacuum/to_implicit.yaml",
    "deca_alanine_alpha_helix": "deca_alanine_vacuum/alpha_helix.yaml",
}
EXCHANGE_EVERY, EQUILIBRATION = 50, 0.2


@dataclass(frozen=True)
class Ends:
    """Both states: what is sampled of them (as one mixed system), their exact targets, kT in kJ/mol, and the sector of the start."""

    mixed: openmm.System
    targets: tuple[Target, Target]
    kt: tuple[float, float]
    kelvin: float
    x: np.ndarray
    box: np.ndarray | None
    sector: Handedness | None


@dataclass(frozen=True)
class Frames:
    """Of every set, time and state: configurations, energies of the sampled A and B and of the exact ones in kT; who was where."""

    x: np.ndarray
    sampled: np.ndarray
    exact: np.ndarray
    replica: np.ndarray
    accepted: np.ndarray


def read_ends(config: TfepConfig) -> Ends:
    """The two states of a configuration."""
    systems, targets, kt, kelvin = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in config.ENDS:
            end = config.end(name)
            problem = load_problem(end, RunFolder(Path(folder)))
            loaded, target = problem.loaded, problem.target
            if BASIN in end.basins:
                state = confined(end, problem)
                loaded, target = state.loaded, state.target
            systems.append(sampled_system(loaded.system))
            targets.append(target)
            kelvin.append(end.temperature_kelvin)
            kt.append(thermal_energy(end.temperature_kelvin))
    sector = Handedness.of(loaded.molecule, torch.from_numpy(loaded.positions)) if loaded.is_one_molecule else None
    return Ends(mixed_system(*systems), (targets[0], targets[1]), (kt[0], kt[1]), kelvin[0], loaded.positions, loaded.box, sector)


def path(n_states: int, heat: float) -> np.ndarray:
    """Weights of u_A and u_B in every state ``[K, 2]``."""
    mixture = np.arange(n_states) / (n_states - 1)
    scale = heat ** -(1 - np.abs(2 * mixture - 1))
    return np.stack([scale * (1 - mixture), scale * mixture], axis=1)


def exact_energies(ends: Ends, x: np.ndarray) -> np.ndarray:
    """Energies ``[2, n]`` of the exact states in kT; +inf outside their basins and outside the sector."""
    rows = torch.from_numpy(x)
    with torch.no_grad():
        u = torch.stack([target.reduced_potential(rows) for target in ends.targets]).numpy()
    return u if ends.sector is None else np.where(ends.sector.contains(rows).numpy(), u, np.inf)


def replicas(ends: Ends, weights: np.ndarray, *, timestep_ps: float, friction_per_ps: float, seeds: np.ndarray) -> list[openmm.Context]:
    """A minimised context in every state, with Maxwell velocities."""
    chosen = choose_platform(ends.mixed, ends.x, choice=PlatformChoice(contexts=1), box=ends.box)
    platform, found = openmm.Platform.getPlatformByName(chosen.name), []
    for (a, b), seed in zip(weights, seeds, strict=True):
        integrator = MixedLangevinIntegrator(temperature_kelvin=ends.kelvin, friction_per_ps=friction_per_ps, timestep_ps=timestep_ps)
        integrator.setRandomNumberSeed(int(seed))
        scale = ends.kt[0] / ends.kt[1]
        integrator.set_weights(a, scale * b)
        context = openmm.Context(ends.mixed, integrator, platform, dict(chosen.properties))
        if ends.box is not None:
            context.setPeriodicBoxVectors(*ends.box)
        context.setPositions(ends.x)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0, 200)
        context.setVelocitiesToTemperature(ends.kelvin, int(seed))
        found.append(context)
    return found


def exchange(u: np.ndarray, weights: np.ndarray, state: np.ndarray, *, rng: np.random.Generator, counts: np.ndarray) -> None:
    """Swap neighbouring states of replicas by the Metropolis rule, pairs in turn; ``state`` of every replica and ``counts`` change."""
    replica = np.argsort(state)
    for k in range(int(rng.integers(2)), len(weights) - 1, 2):
        i, j = replica[k], replica[k + 1]
        accept = np.log(rng.random()) < (weights[k] - weights[k + 1]) @ (u[i] - u[j])
        counts[:, k] += 1, accept
        if accept:
            state[i], state[j] = k + 1, k


def sample(ends: Ends, weights: np.ndarray, *, n_steps: int, n_sets: int, timestep_ps: float, friction_per_ps: float, seed: int) -> Frames:
    """Frames of all states after equilibration, with exchange throughout."""
    n_frames, k, scale = n_steps // EXCHANGE_EVERY, len(weights), ends.kt[0] / ends.kt[1]
    skipped, shape = int(EQUILIBRATION * n_frames), (n_sets, n_frames, k)
    frames = Frames(
        np.empty((*shape, *ends.x.shape), np.float32), np.empty((*shape, 2)), np.empty((*shape, 2)), np.empty(shape, np.int64),
        np.zeros((2, k - 1)),
    )  # fmt: skip
    for one in range(n_sets):
        rng = np.random.default_rng([seed, one])
        contexts = replicas(ends, weights, timestep_ps=timestep_ps, friction_per_ps=friction_per_ps, seeds=rng.integers(1, 2**31 - 1, k))
        state = np.arange(k)
        for t in tqdm(range(-skipped, n_frames), desc=f"set {one + 1}/{n_sets}", mininterval=10):
            for context, (a, b) in zip(contexts, weights[state], strict=True):
                context.getIntegrator().set_weights(a, scale * b)
                context.getIntegrator().step(EXCHANGE_EVERY)
            u = np.array([end_energies(context) for context in contexts]) / ends.kt
            if not np.isfinite(u).all():
                raise RuntimeError(f"energies {u} of the replicas are not finite: use a smaller time step")
            if t >= 0:
                replica = np.argsort(state)
                x = np.array([contexts[i].getState(positions=True).getPositions(asNumpy=True)._value for i in replica])
                frames.x[one, t], frames.sampled[one, t], frames.replica[one, t] = x, u[replica], replica
                frames.exact[one, t] = exact_energies(ends, x).T
            exchange(u, weights, state, rng=rng, counts=frames.accepted)
    return frames


def memory(frames: Frames, system: openmm.System) -> float:
    """Largest statistical inefficiency in frames of energies and torsions, in any state and averaged over all states."""
    n_sets, n_frames, k = frames.replica.shape
    torsions, series = heavy_torsions(system), frames.sampled
    if torsions:
        angles = torsion_angles(frames.x.reshape(-1, *frames.x.shape[3:]), torsions).reshape(n_sets, n_frames, k, -1)
        series = np.concatenate([series, np.cos(angles), np.sin(angles)], axis=3)
    means = series.mean(axis=2, keepdims=True)
    return max(
        statistical_inefficiency(one) for some in (series, means) for one in np.moveaxis(some, (2, 3), (0, 1)).reshape(-1, n_sets, n_frames)
    )


def potentials(frames: Frames, weights: np.ndarray, *, slowest: float | None, sets: np.ndarray) -> StatePotentials:
    """Energies of the frames of some sets in all states of the path and in A and B, in blocks of time unless ``slowest`` is None."""
    _, n_frames, k = frames.replica.shape
    chain, at = np.repeat(np.arange(len(sets)), n_frames), np.tile(np.arange(n_frames), len(sets))
    u = []
    for state in range(k):
        sampled, exact = frames.sampled[sets, :, state].reshape(-1, 2), frames.exact[sets, :, state].reshape(-1, 2)
        u.append(np.concatenate([weights @ sampled.T, exact.T]))
    none = np.zeros(0, dtype=np.int64)
    made = StatePotentials.of(
        [*u, *[np.zeros((k + 2, 0))] * 2],
        role="evaluate",
        log_det_error=0.0,
        chain=[*[chain] * k, none, none],
        time=[*[at] * k, none, none],
    )
    return made if slowest is None else made.blocked(at_least=[slowest] * (k + 2), together=True)


def round_trips(replica: np.ndarray) -> int:
    """How often a replica went from the first state to the last and back, over all sets ``[sets, frames, K]``."""
    trips = 0
    for one in replica:
        k = one.shape[1]
        for r in range(k):
            ends_seen = [int(s) for s in np.argmax(one == r, axis=1) if s in (0, k - 1)]
            trips += sum(a != b for a, b in itertools.pairwise(ends_seen)) // 2
    return trips


def analyse(ends: Ends, frames: Frames, weights: np.ndarray, *, n_bootstrap: int, seed: int) -> dict[str, Any]:
    """The difference of A and B, and what tells whether to trust it."""
    k, n_sets, slowest = len(weights), len(frames.x), memory(frames, ends.mixed)
    rows = potentials(frames, weights, slowest=slowest, sets=np.arange(n_sets))
    found = multistate_free_energies(rows, n_bootstrap=n_bootstrap, seed=seed)
    parts = halves(rows, seed=seed)
    verdict = multistate_verdict(found, drift=parts)

    def difference(some: MultistateFreeEnergies) -> dict[str, float]:
        one = some.between(k, k + 1)
        return {"value": float(one.value), "stderr": float(one.stderr)}

    alone = [potentials(frames, weights, slowest=None, sets=np.array([one])) for one in range(n_sets)]
    return {
        "delta_f_kT": found.between(k, k + 1).value,
        "stderr_kT": found.between(k, k + 1).stderr,
        "verdict": verdict.word,
        "reasons": verdict.reasons,
        "of_each_set_kT": [multistate_free_energies(one, n_bootstrap=20, seed=seed).between(k, k + 1).value for one in alone],
        "halves_kT": [difference(one) for one in parts],
        "path_kT": found.f[:k].tolist(),
        "path_stderr_kT": np.asarray(found.estimate.stderr)[:k].tolist(),
        "overlaps": [{"states": [pair.a, pair.b], "overlap": pair.overlap, "carriers": [pair.n_a, pair.n_b]} for pair in found.neighbours],
        "carriers_of_a_and_b": [found.reweighted[k], found.reweighted[k + 1]],
        "exchange_rates": (frames.accepted[1] / frames.accepted[0]).tolist(),
        "round_trips": round_trips(frames.replica),
        "slowest_inefficiency_frames": slowest,
        "units": int(rows.units.max()) + 1,
        "share_outside_a_and_b": np.isinf(frames.exact[:, :, [0, -1], [0, 1]]).mean(axis=(0, 1)).tolist(),
    }


@click.command()
@click.argument("pair")
@click.option("--states", "n_states", default=12, help="States of the path, its two ends included.")
@click.option("--steps", "n_steps", default=100_000, help="Recorded steps of every state and set.")
@click.option("--sets", "n_sets", default=2, help="Independent sets of replicas.")
@click.option("--hottest", type=float, default=None, help="T_hot in kelvin; that of the configured ladder by default, none without.")
@click.option("--timestep-fs", default=2.0, help="Time step, with hydrogens of 4 Da.")
@click.option("--bootstrap", "n_bootstrap", default=200)
@click.option("--seed", default=2026)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(
    pair: str, n_states: int, n_steps: int, n_sets: int, hottest: float | None, timestep_fs: float, n_bootstrap: int, seed: int, out: Path
) -> None:
    """Sample, solve and store the reference of PAIR: a configuration file or one of the names in PAIRS."""
    torch.set_num_threads(1)
    file = ROOT.parent / "systems" / PAIRS[pair] if pair in PAIRS else Path(pair)
    config = load_config(file)
    if not isinstance(config, TfepConfig):
        raise InputError(f"expected the configuration of a tfep job, got {config.task}")
    begun, ends = time.perf_counter(), read_ends(config)
    if hottest is None:
        hottest = max((ends.kelvin, *config.end("a").data.temperatures_kelvin)) if config.data.source == "ladder" else ends.kelvin
    weights = path(n_states, hottest / ends.kelvin)
    frames = sample(
        ends,
        weights,
        n_steps=n_steps,
        n_sets=n_sets,
        timestep_ps=timestep_fs / 1000,
        friction_per_ps=config.data.friction_per_ps,
        seed=seed,
    )
    found = analyse(ends, frames, weights, n_bootstrap=n_bootstrap, seed=seed)
    steps = int(n_sets * n_states * n_steps * (1 + EQUILIBRATION))
    command = f"python benchmarks/reference_path.py {pair} --states {n_states} --steps {n_steps} --sets {n_sets} --hottest {hottest:g}"
    made_by = provenance(seed, "", sha256={})
    found |= {
        "definition": "F_B - F_A = -ln(Z_B/Z_A) of configurations of the two states of the configuration, in the handedness of its start",
        "configuration": str(file.resolve().relative_to(ROOT.parent)) if file.resolve().is_relative_to(ROOT.parent) else str(file),
        "states": n_states, "steps_per_state_and_set": n_steps, "sets": n_sets, "hottest_kelvin": hottest,
        "timestep_fs": timestep_fs, "weights_of_a_and_b": weights.tolist(),
        "sampled_ns": n_sets * n_states * n_steps * timestep_fs * 1e-6,
        "force_evaluations": {"steps": steps, "of_each_system": steps, "energies_at_exchanges": 2 * steps // EXCHANGE_EVERY,
                              "exact": 2 * n_sets * n_states * (n_steps // EXCHANGE_EVERY)},
        "seed": seed, "wall_seconds": round(time.perf_counter() - begun),
        "command": f"{command} --timestep-fs {timestep_fs:g} --seed {seed}", "machine": made_by["machine"], "versions": made_by["versions"],
    }  # fmt: skip
    stored = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(stored | {pair if pair in PAIRS else f"{file.parent.name}/{file.stem}": found}, indent=1) + "\n")
    estimate = f"{found['delta_f_kT']:.3f} +- {found['stderr_kT']:.3f} kT, {found['verdict']}"
    print(f"{pair}: dF = {estimate}; sets {np.round(found['of_each_set_kT'], 3).tolist()}")


if __name__ == "__main__":
    main()
