"""The job for clusters: walkers, a continuous flow, fresh weighted samples, free energies, report."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boltzgen.config import ParticlesConfig
from boltzgen.core import Distribution, Estimate, Flow, Target, WeightedSamples
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import SolverError
from boltzgen.estimators.reweighting import log_z, log_z_lower, log_z_upper, mean
from boltzgen.estimators.verdict import generator_verdict
from boltzgen.estimators.weights import (
    clipped_effective_sample_size,
    effective_sample_size,
    ess_by_batch,
    forward_effective_sample_size,
    pareto_k,
)
from boltzgen.networks.egnn import EGNN
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.hollow_field import HollowField
from boltzgen.networks.radial_field import RadialField
from boltzgen.networks.tensor_field import TensorField
from boltzgen.recipes import FieldSize, particle_field
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo, relaxed, sample_walkers, tuned_step_size
from boltzgen.sampling.importance import importance_sample, log_ratios
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster, LennardJonesCluster
from boltzgen.training.checkpoints import load_weights, save_weights
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep, measure_log_det_error
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.matching import Matcher
from boltzgen.workflows.particles_report import build_particles_report
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

logger = logging.getLogger(__name__)

FIELDS: Mapping[str, type[ParticleField]] = {
    "embedded": EmbeddedField,
    "egnn": EGNN,
    "tensor": TensorField,
    "gradient": GradientField,
    "hollow": HollowField,
    "radial": RadialField,
}

_FLOW = "flow.safetensors"
#: Share of the walkers held out, and rows of them that judge the flow.
_HELD_OUT_SHARE, _JUDGES = 0.2, 1000
#: Steps may be doubled up to this multiple of those asked for, until the density is exact enough.
_MOST_REFINED = 8
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
    clock, target = Clock(folder), make_target(config)
    with clock.stage("data"):
        walked = _walk(config, target, folder=folder, progress=progress)
    held_out = _held_out(config, walked["chain"])
    x = torch.from_numpy(walked["x"])
    learned = x[~torch.from_numpy(held_out)]
    training = make_flow(config, target, learned, dtype=torch.float32, steps=config.field.training_steps)
    fingerprint = _fingerprint(config)
    with clock.stage("training"), stop_on_signal() as should_stop:
        matcher = Matcher(
            config=config, flow=training, target=target, x=x[:0] if config.training.from_energies else learned, folder=folder,
            fingerprint=fingerprint, should_stop=should_stop, progress=progress,
        )  # fmt: skip
        matcher.run()
    with clock.stage("evaluation"):
        flow, error = _exact_enough(config, training)
        samples = importance_sample(
            flow, target, n=config.evaluation.n_samples, batch_size=config.evaluation.batch_size, generator=_generator(config, 2),
            progress=progress,
        )  # fmt: skip
        judges = np.flatnonzero(held_out)[:: max(1, int(held_out.sum()) // _JUDGES)]
        ratios = log_ratios(flow, x[judges], torch.from_numpy(walked["u"][judges]))
    save_weights(flow, folder.path / _FLOW, fingerprint=fingerprint)
    spent = matcher.n_evaluations
    results = _results(config, target, samples, walked, ratios, error=error, steps=_steps(flow), clock=clock, trained_with=spent)
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
        flow = make_flow(config, target, torch.from_numpy(data["x"][~held_out]), dtype=torch.float32, steps=steps)
    load_weights(flow, folder.path / _FLOW, fingerprint=_fingerprint(config))
    number = folder.next_samples_number()
    samples = importance_sample(
        flow, target, n=n, batch_size=min(n, config.evaluation.batch_size), generator=_generator(config, 1000 + number), progress=progress
    )
    name = f"samples-{number:03d}.npz"
    folder.write_npz(name, {"x": samples.x.numpy().astype(np.float32), **samples.weight_arrays()})
    return folder.path / name


def _exact_enough(config: ParticlesConfig, trained: Flow) -> tuple[Flow, float]:
    """The trained flow with as many steps as the density asks for, and the error it then has in nats."""
    steps = config.field.steps
    while True:
        assert isinstance(trained.transform, ContinuousTransform)
        flow = Flow(trained.base, trained.transform.with_solver(FixedStep(steps)))
        error = measure_log_det_error(flow, generator=_generator(config, 1))
        logger.info("log densities are known to %.1e nats with %d steps", error, steps)
        if error <= config.field.log_det_error:
            return flow, error
        if steps >= _MOST_REFINED * config.field.steps:
            raise SolverError(
                f"with {steps} steps the log density is still known to {error:.2g} nats only, above field.log_det_error: the field is too "
                "steep; train longer or with a smaller learning rate, or take more field.steps"
            )
        steps *= 2


def make_target(config: ParticlesConfig) -> Target:
    """The target that a configuration names."""
    system = config.system
    n, d = system.n_particles, system.n_dimensions
    if system.kind == "coulomb":
        return CoulombGas(n, d, beta=system.beta)
    return DoubleWellCluster(n, d) if system.kind == "double_well" else LennardJonesCluster(n, d)


def make_flow(config: ParticlesConfig, target: Target, x: Tensor, *, dtype: torch.dtype, steps: int) -> Flow:
    """The untrained flow.

    Args:
        config: Its size.
        target: What it shall follow.
        x: Configurations that the base is fitted to, where it is.
        dtype: Precision of the base.
        steps: Runge-Kutta steps.
    """
    settings = config.field
    size = FieldSize(
        length=settings.length, n_layers=settings.n_layers, hidden=settings.hidden, n_radial=settings.n_radial, compiled=settings.compile
    )
    field = particle_field(FIELDS[config.field.kind], target, size=size, generator=_generator(config, 3))
    return Flow(_base(config, target, x, dtype=dtype), ContinuousTransform(field, FixedStep(steps)))


def _base(config: ParticlesConfig, target: Target, x: Tensor, *, dtype: torch.dtype) -> Distribution:
    n, d = target.event_shape
    centre = 1 / math.sqrt(2 * config.system.beta * n) if isinstance(target, CoulombGas) else None
    scale = config.field.scale
    if config.field.base == "fitted":  # equal particles: the one number that they share
        relative = x - x.mean(dim=1, keepdim=True)
        scale = float((relative.square().sum(dim=(1, 2)).double().mean() / (d * (n - 1))).sqrt())
    return ParticleNormal.isotropic(n, d, scale=scale, centre_scale=centre, dtype=dtype)


def _walk(config: ParticlesConfig, target: Target, *, folder: RunFolder, progress: bool) -> dict[str, np.ndarray]:
    """Equilibrated configurations of the walkers, from the run folder where they are there already."""
    path = folder.path / "data.npz"
    if not path.exists():
        settings, generator = config.walkers, _generator(config, 4)
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


def _results(
    config: ParticlesConfig,
    target: Target,
    samples: WeightedSamples,
    walked: Mapping[str, np.ndarray],
    ratios: Tensor,
    *,
    error: float,
    steps: int,
    clock: Clock,
    trained_with: int,
) -> Results:
    settings, seed = config.evaluation, config.seed
    ln_z = log_z(samples, n_bootstrap=settings.n_bootstrap, seed=seed)
    lower, upper = log_z_lower(samples), log_z_upper(ratios)
    energy = mean(samples, samples.u, name="mean reduced potential", unit="kT", n_bootstrap=settings.n_bootstrap, seed=seed)
    estimates = [ln_z, lower, upper, energy, _walkers_energy(walked)]
    if isinstance(target, CoulombGas):
        estimates += [_per_beta(ln_z, "F = -ln Z / beta", config.system.beta), _per_beta(lower, "F, variational", config.system.beta)]
    diagnostics: dict[str, Any] = {
        "ess_raw": effective_sample_size(samples),
        "ess_batch_median": float(np.median(ess_by_batch(samples, batch_size=min(settings.batch_size, len(samples))))),
        "ess_clipped": clipped_effective_sample_size(samples, fraction=settings.clip_fraction),
        "clip_fraction": settings.clip_fraction,
        "pareto_k": pareto_k(samples),
        "forward_ess": forward_effective_sample_size(ratios),
        "held_out_rows": len(ratios),
        "elbo": lower.value,
        "eubo": upper.value,
        "log_det_error": error,
        "solver_steps": steps,
        "n_samples": len(samples),
        "energy_evaluations": {"data": int(walked["n_energies"]), "training": trained_with, "evaluation": len(samples)},
    }
    verdict = generator_verdict(
        ess_raw=diagnostics["ess_raw"], pareto_k=diagnostics["pareto_k"], n_samples=len(samples), forward_ess=diagnostics["forward_ess"],
        n_forward_effective=float(len(ratios)), elbo=float(lower.value), eubo=float(upper.value), log_z=float(ln_z.value),
    )  # fmt: skip
    return Results(
        task="particles", estimates=tuple(estimates), diagnostics=diagnostics,
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())}, verdict=verdict.word,
        provenance=provenance(seed, "analytic", sha256={}), reasons=verdict.reasons, notes=(_NORMALISATION,),
    )  # fmt: skip


def _walkers_energy(walked: Mapping[str, np.ndarray]) -> Estimate:
    """Mean energy of the walkers; each is one independent unit."""
    n = int(walked["chain"].max()) + 1
    means = np.bincount(walked["chain"], weights=walked["u"], minlength=n) / np.bincount(walked["chain"], minlength=n)
    return Estimate("mean reduced potential, walkers alone", float(means.mean()), float(means.std(ddof=1) / math.sqrt(n)), "kT", float(n))


def _per_beta(estimate: Estimate, name: str, beta: float) -> Estimate:
    return Estimate(
        name, -float(estimate.value) / beta, float(estimate.stderr) / beta, "in units of the trap", estimate.n_effective, note=estimate.note
    )


def _steps(flow: Flow) -> int:
    """Steps of a flow's fixed-step solver."""
    assert isinstance(flow.transform, ContinuousTransform)
    assert isinstance(flow.transform.solver, FixedStep)
    return flow.transform.solver.n_steps


def _fingerprint(config: ParticlesConfig) -> str:
    settings = config.model_dump(mode="json", exclude={"evaluation"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _generator(config: ParticlesConfig, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0]))
