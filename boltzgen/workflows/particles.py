"""The job for clusters: walkers, a continuous flow, fresh weighted samples, free energies, report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boltzgen.config import ParticlesConfig, trained_by
from boltzgen.core import Estimate, Flow, Target, WeightedSamples
from boltzgen.distributions import ParticleNormal
from boltzgen.networks.pairs import neighbour_distance
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo, relaxed, sample_walkers, tuned_step_size
from boltzgen.sampling.importance import importance_sample, log_ratios
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster, LennardJonesCluster
from boltzgen.targets.views import Counted
from boltzgen.training.checkpoints import load_weights, save_weights
from boltzgen.workflows.analysis import judge
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.continuous import FieldFlow, make_field, root_mean_square
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.matching import Matcher, started_from
from boltzgen.workflows.particles_report import build_particles_report
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of, provenance
from boltzgen.workflows.seeds import stream

logger = logging.getLogger(__name__)

_FLOW = "flow.safetensors"
#: Share of the walkers held out.
_HELD_OUT_SHARE = 0.2
#: Moves of the two tunings of the step, within the burn-in.
_TUNING_MOVES = 200
_NORMALISATION = (
    "ln Z counts labelled particles (no 1/n!), lengths in nm; where energies do not change under translation it is that of the mean-free "
    "subspace with its natural volume"
)


def run_particles(config: ParticlesConfig, folder: RunFolder, *, progress: bool = True) -> Results:
    """Train a continuous flow of particles and write everything that a user needs of it.

    Args:
        config: What to do.
        folder: Where; data and checkpoints found there are used.
        progress: Whether to show progress bars.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        EnergyError, SolverError, CheckpointError, OutputError: With what to do.
        Interrupted: After SIGTERM or SIGINT during training; the run can be resumed.
    """
    folder.settle_config(config)
    torch.set_num_threads(config.training.threads)
    clock, target, fingerprint = Clock(folder), make_target(config), _fingerprint(config)
    with clock.stage("data"):
        walked = _walk(config, target, folder=folder, progress=progress)
    held_out = _held_out(config, walked["chain"])
    x = torch.from_numpy(walked["x"])
    learned = x[~torch.from_numpy(held_out)]
    pieces = make_pieces(config, target, learned)
    counted = Counted(target)
    with clock.stage("training"), stop_on_signal() as should_stop:
        try:
            Matcher(
                settings=config.training, pieces=pieces, target=counted, allowed=counted,
                x=x[:0] if config.training.from_energies else learned, seed=config.seed, folder=folder,
                fingerprint=fingerprint, should_stop=should_stop, progress=progress,
            ).run()  # fmt: skip
        finally:
            spent = folder.spent_in_training(counted.n_evaluations)
    with clock.stage("evaluation"):
        judges = one_of_each(walked["chain"], held_out, generator=stream(config.seed, 5))

        def draw(flow: Flow) -> WeightedSamples:
            return importance_sample(
                flow, target, n=config.evaluation.n_samples, batch_size=config.evaluation.batch_size, generator=stream(config.seed, 2),
                progress=progress,
            )  # fmt: skip

        flow, samples, exactness = pieces.weighted(draw, data=x[judges], generator=stream(config.seed, 1))
        ratios = log_ratios(flow, x[judges], torch.from_numpy(walked["u"][judges]))
    save_weights(flow, folder.path / _FLOW, fingerprint=fingerprint)
    evaluations = {"data": int(walked["n_energies"]), "training": spent, "evaluation": len(samples)}
    results = _results(config, target, samples, walked, ratios, exactness=exactness, clock=clock, evaluations=evaluations)
    folder.write_npz("weights.npz", samples.weight_arrays())
    folder.write_npz("samples.npz", {"x": samples.x.numpy().astype(np.float32)})
    build_particles_report(folder.path, config, results.to_dict())
    folder.finish(results)
    logger.info("raw ESS %.3g; verdict: %s", results.diagnostics["ess_raw"], results.verdict)
    return results


def draw_particles(folder: RunFolder, config: ParticlesConfig, n: int, *, progress: bool = True) -> Path:
    """Draw fresh weighted samples from the flow of a finished run.

    Args:
        folder: The run.
        config: Its configuration.
        n: Number of samples.
        progress: Whether to show a progress bar.

    Returns:
        An npz file with ``x`` ``[n, particles, d]`` in nm and the weights.

    Raises:
        CheckpointError: If the flow in the folder is corrupt or belongs to another run.
    """
    target = make_target(config)
    with np.load(folder.path / "data.npz", allow_pickle=False) as data:
        held_out = _held_out(config, data["chain"])
        steps = json.loads(folder.results_path.read_text())["diagnostics"]["solver_steps"]
        flow = make_pieces(config, target, torch.from_numpy(data["x"][~held_out])).reported(steps)
    load_weights(flow, folder.path / _FLOW, fingerprint=_fingerprint(config))
    number = folder.next_samples_number()
    samples = importance_sample(
        flow, target, n=n, batch_size=min(n, config.evaluation.batch_size), generator=stream(config.seed, 1000 + number), progress=progress
    )
    samples.require_exact()
    name = f"samples-{number:03d}.npz"
    folder.write_npz(name, {"x": samples.x.numpy().astype(np.float32), **samples.weight_arrays()})
    return folder.path / name


def make_target(config: ParticlesConfig) -> Target:
    """The target that a configuration names."""
    system = config.system
    n, d = system.n_particles, system.n_dimensions
    if system.kind == "coulomb":
        return CoulombGas(n, d, beta=system.beta)
    return DoubleWellCluster(n, d) if system.kind == "double_well" else LennardJonesCluster(n, d)


def make_pieces(config: ParticlesConfig, target: Target, x: Tensor) -> FieldFlow:
    """The untrained field on its base.

    Args:
        config: Its size.
        target: What it shall follow.
        x: Configurations ``[m, n, d]`` that the base is fitted to, where it is.
    """
    n, d = target.event_shape
    settings = config.field
    length = settings.length or neighbour_distance(x)
    field = make_field(settings, target, length=length, generator=stream(config.seed, 3))
    centre = 1 / math.sqrt(2 * config.system.beta * n) if isinstance(target, CoulombGas) else None
    scale = root_mean_square(x) if settings.base == "fitted" else settings.scale  # equal particles: the one number that they share
    base = ParticleNormal.isotropic(n, d, scale=scale, centre_scale=centre, dtype=torch.float32)
    return FieldFlow(base, field, settings)


def _walk(config: ParticlesConfig, target: Target, *, folder: RunFolder, progress: bool) -> dict[str, np.ndarray]:
    """Equilibrated configurations of the walkers, from the run folder where they are there already."""
    path = folder.path / "data.npz"
    if not path.exists():
        settings, generator = config.walkers, stream(config.seed, 4)
        free = not isinstance(target, CoulombGas)
        start = settings.spread * torch.randn(settings.n_walkers, *target.event_shape, generator=generator, dtype=torch.float64)
        move = HamiltonianMonteCarlo(target, step_size=settings.step_size, n_leapfrog=settings.n_leapfrog, mean_free=free)
        state = move.init(relaxed(target, start))
        move, state = tuned_step_size(move, state, generator=generator, n_moves=_TUNING_MOVES)
        state = sample_walkers(move, state, n_times=1, thin=settings.burn_in, generator=generator, progress=progress).state  # type: ignore[assignment]
        move, state = tuned_step_size(move, state, generator=generator, n_moves=_TUNING_MOVES)
        run = sample_walkers(move, state, n_times=settings.n_times, thin=settings.thin, generator=generator, progress=progress)
        moves = 2 * _TUNING_MOVES + settings.burn_in + settings.n_times * settings.thin
        folder.write_npz("data.npz", {
            "x": run.samples.x.numpy().astype(np.float32), "u": run.samples.u.numpy(), "chain": run.samples.chain.numpy(),
            "n_energies": np.array(moves * settings.n_leapfrog * settings.n_walkers), "acceptance": run.acceptance.numpy(),
        })  # fmt: skip
        logger.info("walkers: acceptance %.2f at a step of %.3g nm", float(run.acceptance.mean()), move.step_size)
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _held_out(config: ParticlesConfig, chain: np.ndarray) -> np.ndarray:
    """Rows ``[m]`` of the walkers that train nothing."""
    return chain < math.ceil(_HELD_OUT_SHARE * config.walkers.n_walkers)


def one_of_each(chain: np.ndarray, chosen: np.ndarray, *, generator: torch.Generator) -> np.ndarray:
    """One random row of every chosen walker: independent rows, however slowly walkers move.

    Args:
        chain: Walker of every row ``[m]``.
        chosen: Which rows may be taken, bool ``[m]``.
        generator: Random numbers.

    Returns:
        Rows, ascending by walker.
    """
    rows = np.flatnonzero(chosen)
    shuffled = rows[torch.randperm(len(rows), generator=generator).numpy()]
    return shuffled[np.unique(chain[shuffled], return_index=True)[1]]


def _results(
    config: ParticlesConfig,
    target: Target,
    samples: WeightedSamples,
    walked: Mapping[str, np.ndarray],
    ratios: Tensor,
    *,
    exactness: Mapping[str, Any],
    clock: Clock,
    evaluations: Mapping[str, int],
) -> Results:
    judged = judge(samples, ratios, settings=config.evaluation, seed=config.seed)
    ln_z, lower = judged.estimates[:2]
    estimates = [*judged.estimates, _walkers_energy(walked)]
    if isinstance(target, CoulombGas):
        estimates += [_per_beta(ln_z, "F = -ln Z / beta", config.system.beta), _per_beta(lower, "F, variational", config.system.beta)]
    return Results(
        task="particles",
        estimates=tuple(estimates),
        diagnostics={**judged.diagnostics, **exactness, "energy_evaluations": dict(evaluations)},
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=judged.verdict.word,
        provenance=provenance(config.seed, "analytic", sha256={}),
        reasons=judged.verdict.reasons,
        notes=(_NORMALISATION,),
    )


def _walkers_energy(walked: Mapping[str, np.ndarray]) -> Estimate:
    """Mean energy of the walkers; each is one independent unit."""
    n = int(walked["chain"].max()) + 1
    means = np.bincount(walked["chain"], weights=walked["u"], minlength=n) / np.bincount(walked["chain"], minlength=n)
    return Estimate("mean reduced potential, walkers alone", float(means.mean()), float(means.std(ddof=1) / math.sqrt(n)), "kT", float(n))


def _per_beta(estimate: Estimate, name: str, beta: float) -> Estimate:
    return Estimate(
        name, -float(estimate.value) / beta, float(estimate.stderr) / beta, "in units of the trap", estimate.n_effective, note=estimate.note
    )


def _fingerprint(config: ParticlesConfig) -> str:
    return fingerprint_of(trained_by(config) | started_from(config.training))
