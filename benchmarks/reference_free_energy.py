"""Independent reference of the free energy of φ ∈ (0, 2) rad against the rest, for alanine dipeptide at 300 K.

    python benchmarks/reference_free_energy.py vacuum      # ff96
    python benchmarks/reference_free_energy.py implicit    # ff96 + OBC1

ΔF = F(φ ∈ (0, 2)) − F(rest) = −ln(p_in / p_out) in kT, from umbrella sampling along φ with exchange of neighbouring windows, solved by
MBAR; no flow is involved. A fixed potential W(φ, ψ), from a preliminary metadynamics run, flattens the landscape in all windows, because
ψ is slow in some of them; MBAR removes it exactly. Half of the repeats start every window from ψ = 150°, the other half from ψ = −40°, and
must agree. Every start is checked to be the L enantiomer with trans peptide bonds, and the fraction of frames that are is stored.
Masses do not enter a configurational density: hydrogens weigh 4 Da here, so that a step of 2 fs integrates unconstrained bonds.
The implicit system is sampled with OpenMM's native OBC2 force, which is 20 times faster than the OBC1 CustomGBForce, and every frame is
reweighted exactly to OBC1 as an unsampled state of MBAR; the effective sample size of that step is stored.
Writes its result and the φ profile to ``benchmarks/results/reference_free_energy.json``.
"""

from __future__ import annotations

import copy
import json
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import openmm
from openmm import app, unit
from scipy.special import logsumexp
from tqdm import tqdm

from boltzgen.estimators.mbar import mbar_free_energies
from boltzgen.units import thermal_energy

ROOT = Path(__file__).parent
RESULT = ROOT / "results" / "reference_free_energy.json"
PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)
DOWNSTREAM = {PHI: range(9, 22), PSI: range(15, 22)}
OMEGAS = ((1, 4, 6, 8), (8, 14, 16, 18))
TEMPERATURE, TIMESTEP_PS, STEPS_PER_FRAME, FORCE_CONSTANT = 300.0, 0.002, 100, 150.0
BINS, BLOCKS = 64, 5
GRID, DEEPEST = 65, 60.0
KT = thermal_energy(TEMPERATURE)


@dataclass(frozen=True)
class Frames:
    """Everything recorded: configurations ``[r, t, w, 22, 3]`` (float32), energy without bias, W, and φ ``[r, t, w]``."""

    x: np.ndarray
    u: np.ndarray
    flat: np.ndarray
    phi: np.ndarray


def torsion(x: np.ndarray, atoms: tuple[int, int, int, int]) -> np.ndarray:
    """Torsion in (−π, π] of configurations ``[..., 22, 3]``."""
    a, b, c, d = (x[..., i, :] for i in atoms)
    first, axis, last = b - a, c - b, d - c
    n1, n2 = np.cross(first, axis), np.cross(axis, last)
    sine = (first * n2).sum(-1) * np.linalg.norm(axis, axis=-1)
    return np.arctan2(sine, (n1 * n2).sum(-1))


def rotated(x: np.ndarray, atoms: tuple[int, int, int, int], wanted: float) -> np.ndarray:
    """One configuration with a torsion set, everything downstream of its axis turned rigidly."""
    axis = x[atoms[2]] - x[atoms[1]]
    axis /= np.linalg.norm(axis)
    angle, rows = wanted - torsion(x, atoms), list(DOWNSTREAM[atoms])
    r = x[rows] - x[atoms[2]]
    turned = r * np.cos(angle) + np.cross(axis, r) * np.sin(angle) + np.outer(r @ axis, axis) * (1 - np.cos(angle))
    out = x.copy()
    out[rows] = turned + x[atoms[2]]
    return out


def is_l_and_trans(x: np.ndarray) -> np.ndarray:
    """Whether CA is L and both peptide bonds are trans, for configurations ``[..., 22, 3]``; neither changes at 300 K within ns."""
    n, c, cb = (x[..., i, :] - x[..., 8, :] for i in (6, 14, 10))
    volume = (np.cross(n, c) * cb).sum(-1)
    return (volume > 0) & np.all([np.abs(torsion(x, atoms)) > np.pi / 2 for atoms in OMEGAS], axis=0)


def sampled_system(system: openmm.System) -> openmm.System:
    """The system to simulate: heavy hydrogens, and native OBC2 in place of the OBC1 CustomGBForce."""
    system = copy.deepcopy(system)
    for index in reversed(range(system.getNumForces())):
        force = system.getForce(index)
        if isinstance(force, openmm.CustomGBForce):
            native = openmm.GBSAOBCForce()
            native.setSoluteDielectric(1.0)
            native.setSolventDielectric(78.5)
            for i in range(force.getNumParticles()):
                charge, reduced, scaled = force.getParticleParameters(i)
                native.addParticle(charge, reduced + 0.009, scaled / reduced)
            system.removeForce(index)
            system.addForce(native)
    for i in range(system.getNumParticles()):
        if system.getParticleMass(i) < 1.5 * unit.dalton:
            system.setParticleMass(i, 4.0)
    return system


def flat_bias(system: openmm.System, start: np.ndarray, *, n_steps: int, seed: int) -> np.ndarray:
    """W = −G(φ, ψ) on a periodic grid ``[ψ, φ]`` in kJ/mol, cut off at ``DEEPEST``, by well-tempered metadynamics."""
    variables = []
    for atoms in (PHI, PSI):
        angle = openmm.CustomTorsionForce("theta")
        angle.addTorsion(*atoms)
        variables.append(app.BiasVariable(angle, -np.pi, np.pi, 0.3, periodic=True, gridWidth=GRID))
    system = copy.deepcopy(system)
    metadynamics = app.Metadynamics(system, variables, TEMPERATURE, 15.0, 1.5, 200)
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 2.0, TIMESTEP_PS)
    integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(app.Topology(), system, integrator, platform)
    simulation.context.setPositions(start)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(TEMPERATURE, seed)
    for _ in tqdm(range(n_steps // 2000), desc="flattening", mininterval=5):
        metadynamics.step(simulation, 2000)
    free_energy = metadynamics.getFreeEnergy().value_in_unit(unit.kilojoules_per_mole)
    return -np.minimum(free_energy - free_energy.min(), DEEPEST)


def biased_system(system: openmm.System, grid: np.ndarray) -> openmm.System:
    """A copy with the umbrella on φ in force group 1 and W(φ, ψ) in force group 2."""
    system = copy.deepcopy(system)
    umbrella = openmm.CustomTorsionForce(f"0.5*{FORCE_CONSTANT}*d^2; d=min(a, 2*{np.pi}-a); a=abs(theta-phi0)")
    umbrella.addGlobalParameter("phi0", 0.0)
    umbrella.addTorsion(*PHI)
    umbrella.setForceGroup(1)
    system.addForce(umbrella)
    flat = openmm.CustomCompoundBondForce(5, "W(dihedral(p1,p2,p3,p4), dihedral(p2,p3,p4,p5))")
    table = openmm.Continuous2DFunction(GRID, GRID, grid.flatten(), -np.pi, np.pi, -np.pi, np.pi, True)
    flat.addTabulatedFunction("W", table)
    flat.addBond([*PHI, PSI[-1]])
    flat.setForceGroup(2)
    system.addForce(flat)
    return system


def bias(phi: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Umbrella potential in kT."""
    difference = np.abs(phi - centre)
    return 0.5 * FORCE_CONSTANT * np.minimum(difference, 2 * np.pi - difference) ** 2 / KT


def context_in_window(system: openmm.System, x: np.ndarray, *, centre: float, seed: int) -> openmm.Context:
    """A minimised context in one window, with Maxwell velocities."""
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 2.0, TIMESTEP_PS)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setParameter("phi0", centre)
    context.setPositions(x)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0, 200)
    minimum = context.getState(positions=True).getPositions(asNumpy=True)._value
    if not is_l_and_trans(minimum):
        raise RuntimeError(
            f"the start of the window at {centre:.2f} rad is a D or cis configuration: its samples would be of another molecule"
        )
    context.setVelocitiesToTemperature(TEMPERATURE, seed)
    return context


def exchange(contexts: list[openmm.Context], centres: np.ndarray, window: np.ndarray, *, phi: np.ndarray, rng: np.random.Generator) -> None:
    """Swap neighbouring windows (alternating pairs, around the circle) by the Metropolis rule; ``window`` is changed in place."""
    n = len(centres)
    walker = np.argsort(window)
    for left in range(int(rng.integers(2)), n, 2):
        i, j = walker[left], walker[(left + 1) % n]
        a, b = centres[left], centres[(left + 1) % n]
        log_ratio = bias(phi[i], a) + bias(phi[j], b) - bias(phi[i], b) - bias(phi[j], a)
        if np.log(rng.random()) < log_ratio:
            window[i], window[j] = window[j], window[i]
            contexts[i].setParameter("phi0", b)
            contexts[j].setParameter("phi0", a)


def sample(system: openmm.System, start: np.ndarray, *, n_windows: int, n_frames: int, repeats: int, seed: int) -> Frames:
    """Umbrella sampling with exchange: frames sorted by window, after a quarter as many that are not recorded."""
    centres = -np.pi + 2 * np.pi * (np.arange(n_windows) + 0.5) / n_windows
    shape = (repeats, n_frames, n_windows)
    frames = Frames(np.empty((*shape, 22, 3), np.float32), *(np.empty(shape) for _ in range(3)))
    skipped = n_frames // 4
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        psi_start = np.radians(150.0 if repeat % 2 == 0 else -40.0)
        seeds = rng.integers(1, 2**31 - 1, size=n_windows)
        contexts = [
            context_in_window(system, rotated(rotated(start, PHI, c), PSI, psi_start), centre=c, seed=int(s))
            for c, s in zip(centres, seeds, strict=True)
        ]
        window = np.arange(n_windows)
        for t in tqdm(range(-skipped, n_frames), desc=f"repeat {repeat + 1}/{repeats}", mininterval=5):
            x, u, flat = np.empty((n_windows, 22, 3)), np.empty(n_windows), np.empty(n_windows)
            for walker, context in enumerate(contexts):
                context.getIntegrator().step(STEPS_PER_FRAME)
                state = context.getState(positions=True, energy=True, groups={0})
                x[walker] = state.getPositions(asNumpy=True)._value
                u[walker] = state.getPotentialEnergy()._value / KT
                flat[walker] = context.getState(energy=True, groups={2}).getPotentialEnergy()._value / KT
            phi = torsion(x, PHI)
            if t >= 0:
                order = np.argsort(window)
                frames.x[repeat, t], frames.u[repeat, t] = x[order], u[order]
                frames.flat[repeat, t], frames.phi[repeat, t] = flat[order], phi[order]
            exchange(contexts, centres, window, phi=phi, rng=rng)
    return frames


def energies(system: openmm.System, x: np.ndarray) -> np.ndarray:
    """Reduced potentials of configurations ``[n, 22, 3]`` on four single-threaded CPU contexts."""
    platform = openmm.Platform.getPlatformByName("CPU")
    pool: queue.Queue[openmm.Context] = queue.Queue()
    for _ in range(4):
        pool.put(openmm.Context(system, openmm.VerletIntegrator(0.001), platform, {"Threads": "1"}))

    def block(rows: np.ndarray) -> list[float]:
        context, out = pool.get(), []
        for row in rows:
            context.setPositions(row.astype(np.float64))
            out.append(context.getState(energy=True).getPotentialEnergy()._value / KT)
        pool.put(context)
        return out

    with ThreadPoolExecutor(4) as workers:
        return np.concatenate(list(tqdm(workers.map(block, np.array_split(x, max(1, len(x) // 500))), desc="OBC1 energies", mininterval=5)))


def solve(phi: np.ndarray, flat: np.ndarray, delta_u: np.ndarray) -> tuple[float, np.ndarray, float, float]:
    """ΔF in kT, profile ``[BINS]`` in kT, Kish fraction of the step from sampled solvent to target, and overlap, of frames ``[t, w]``."""
    n_frames, n_windows = phi.shape
    centres = -np.pi + 2 * np.pi * (np.arange(n_windows) + 0.5) / n_windows
    phi, flat, delta_u = (a.T.reshape(-1) for a in (phi, flat, delta_u))
    result = mbar_free_energies(bias(phi, centres[:, None]), np.full(n_windows, n_frames))
    log_w, without_step = result.log_weights(delta_u - flat), result.log_weights(-flat)
    inside = (phi > 0) & (phi < 2)
    difference = float(logsumexp(log_w[~inside]) - logsumexp(log_w[inside]))
    p, edges = np.histogram(phi, bins=BINS, range=(-np.pi, np.pi), weights=np.exp(log_w))
    with np.errstate(divide="ignore"):
        profile = -np.log(p / np.diff(edges))
    kish = float(np.exp(logsumexp(2 * without_step) - logsumexp(2 * log_w)))
    return difference, profile, kish, result.overlap


def analyse(frames: Frames, delta_u: np.ndarray) -> dict:
    """Estimate from all frames; errors from repeats and from time blocks, the larger one stated."""
    repeats, n_frames, n_windows = frames.phi.shape

    def pooled(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, n_windows)

    difference, profile, kish, overlap = solve(pooled(frames.phi), pooled(frames.flat), pooled(delta_u))
    per_repeat = [solve(frames.phi[r], frames.flat[r], delta_u[r])[0] for r in range(repeats)]
    cuts = np.array_split(np.arange(n_frames), BLOCKS)
    blocks = [solve(frames.phi[r][cut], frames.flat[r][cut], delta_u[r][cut])[:2] for r in range(repeats) for cut in cuts]
    block_values, block_profiles = np.array([b[0] for b in blocks]), np.array([b[1] for b in blocks])
    shifted = block_profiles + np.log((np.exp(-block_profiles)).sum(axis=1, keepdims=True))
    by_repeats = float(np.std(per_repeat, ddof=1) / np.sqrt(repeats))
    by_blocks = float(np.std(block_values, ddof=1) / np.sqrt(len(block_values)))
    return {
        "delta_f_kT": difference,
        "stderr_kT": max(by_repeats, by_blocks),
        "stderr_by_repeats": by_repeats,
        "stderr_by_blocks": by_blocks,
        "repeats_kT": per_repeat,
        "from_psi_150_kT": float(np.mean(per_repeat[0::2])),
        "from_psi_minus_40_kT": float(np.mean(per_repeat[1::2])),
        "mbar_overlap": overlap,
        "reweighting_ess_fraction": kish,
        "profile": {
            "phi_rad": (-np.pi + 2 * np.pi * (np.arange(BINS) + 0.5) / BINS).tolist(),
            "f_kT": (profile - profile.min()).tolist(),
            "stderr_kT": (shifted.std(axis=0, ddof=1) / np.sqrt(len(shifted))).tolist(),
        },
    }


@click.command()
@click.argument("solvent", type=click.Choice(["vacuum", "implicit"]))
@click.option("--frames", "n_frames", default=3000, help="Frames of each window and repeat, 0.2 ps apart.")
@click.option("--windows", "n_windows", default=30)
@click.option("--repeats", default=4, help="Independent repeats, alternating between two starts in ψ.")
@click.option("--flattening-steps", default=1_000_000, help="Steps of the metadynamics run.")
@click.option("--seed", default=2026)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(solvent: str, n_frames: int, n_windows: int, repeats: int, flattening_steps: int, seed: int, out: Path) -> None:
    """Sample, solve and store the reference of one system."""
    folder = ROOT.parent / "systems" / f"alanine_dipeptide_{solvent}"
    system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
    start = app.PDBFile(str(folder / "topology.pdb")).getPositions(asNumpy=True)._value
    begun = time.perf_counter()
    sampled = sampled_system(system)
    grid = flat_bias(sampled, start, n_steps=flattening_steps, seed=seed)
    frames = sample(biased_system(sampled, grid), start, n_windows=n_windows, n_frames=n_frames, repeats=repeats, seed=seed)
    delta_u = np.zeros_like(frames.u)
    if solvent == "implicit":
        delta_u = energies(system, frames.x.reshape(-1, 22, 3)).reshape(frames.u.shape) - frames.u
    result = analyse(frames, delta_u) | {
        "fraction_l_and_trans": float(np.mean(is_l_and_trans(frames.x))),
        "definition": "F(phi in (0, 2) rad) - F(rest) = -ln(p_in / p_out), 300 K, phi = atoms 4, 6, 8, 14",
        "sampled_with": "ff96 + OBC2, reweighted to OBC1" if solvent == "implicit" else "ff96 in vacuum",
        "sampled_ns": repeats * n_windows * n_frames * STEPS_PER_FRAME * TIMESTEP_PS / 1000,
        "command": f"python benchmarks/reference_free_energy.py {solvent} --frames {n_frames} --windows {n_windows} "
        f"--repeats {repeats} --flattening-steps {flattening_steps} --seed {seed}",
        "seed": seed,
        "wall_seconds": round(time.perf_counter() - begun),
        "machine": "2-core AMD EPYC (one core used)",
        "openmm": openmm.__version__,
    }
    stored = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(stored | {solvent: result}, indent=1) + "\n")
    print(
        f"{solvent}: dF = {result['delta_f_kT']:.3f} ± {result['stderr_kT']:.3f} kT; repeats {np.round(result['repeats_kT'], 3).tolist()}"
    )


if __name__ == "__main__":
    main()
