"""The main job: data, training, fresh weighted samples, free energies, report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from boltzgen.config import GeneratorConfig
from boltzgen.core import Target, WeightedSamples
from boltzgen.errors import CheckpointError
from boltzgen.md.checks import require_flow_over_all_atoms
from boltzgen.md.loading import LoadedSystem, file_hash, load
from boltzgen.md.platforms import require_platform
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import Trajectory, read_frames, split_blocks, write_xtc
from boltzgen.recipes import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains
from boltzgen.sampling.importance import importance_sample
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.training.checkpoints import load_weights, save_weights
from boltzgen.transforms.domains import Domains
from boltzgen.transforms.zmatrix import build_zmatrix, check_geometry
from boltzgen.workflows.analysis import Analysis, analyse
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.coordinates import basins, collective_variables
from boltzgen.workflows.data import collect, coverage_warnings, onto_constraints, platform_choice
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.report import build_report
from boltzgen.workflows.run_folder import Results, RunFolder, provenance
from boltzgen.workflows.train import Trainer

logger = logging.getLogger(__name__)

_FLOW, _DOMAINS, _PLATFORM = "flow.safetensors", "domains.json", "platform.json"

#: Spline evaluations, each with its gradient, that pay for compiling (benchmarks/splines.py: about 20,000, doubled to be sure).
_COMPILE_FROM_CALLS = 40_000


@dataclass(frozen=True)
class _Problem:
    """The user's system, ready to be sampled."""

    loaded: LoadedSystem
    openmm_target: OpenMMTarget
    target: Target


def run_generator(config: GeneratorConfig, folder: RunFolder, *, resume: bool = False, progress: bool = True) -> Results:
    """Train a Boltzmann generator and write everything that a user needs of it.

    Args:
        config: What to do.
        folder: Where; data and checkpoints found there are used.
        resume: Whether the folder holds an earlier part of this run; only said in the log.
        progress: Whether to show progress bars.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        ConfigError, InputError, TopologyError, EnergyError, CheckpointError, OutputError: With what to do.
        Interrupted: After SIGTERM or SIGINT during training; the run can be resumed.
    """
    folder.settle_config(config)
    if resume:
        logger.info("going on with the run in %s", folder.path)
    torch.set_num_threads(config.training.threads)
    clock = Clock(folder)
    with clock.stage("loading"):
        problem = _load(config, platform_name=_platform_of(folder))
        folder.write_json(_PLATFORM, {"name": problem.openmm_target.platform_name})
        for note in problem.loaded.notes:
            logger.info("note: %s", note)
        variables = collective_variables(config, problem.loaded.molecule)
        regions = basins(config, variables)
        logger.info("%d atoms; energies on %s", problem.loaded.molecule.n_atoms, problem.openmm_target.platform_name)
    with clock.stage("data"):
        target = problem.target
        trajectory = collect(config, problem.loaded, folder=folder, target=target, progress=progress)
        training, held_out = split_blocks(trajectory, evaluate_fraction=config.data.evaluate_fraction)
        pieces = _build(config, problem.loaded, training)
        folder.write_json(_DOMAINS, pieces.domains.to_dict())
        training, held_out = _only_sector(training, pieces), _only_sector(held_out, pieces)
    logger.info("%d frames to train on, %d independent ones held out", len(training), len(held_out))
    before = problem.openmm_target.n_evaluations
    with clock.stage("training"), stop_on_signal() as should_stop:
        fingerprint = _fingerprint(config, problem.loaded, pieces)
        try:
            Trainer(config=config, pieces=pieces, target=target, training=training, held_out=held_out, folder=folder,
                    fingerprint=fingerprint, should_stop=should_stop, progress=progress).run()  # fmt: skip
        finally:
            spent_in_training = _spent_in_training(folder, problem.openmm_target.n_evaluations - before)
        save_weights(pieces.flow, folder.path / _FLOW, fingerprint=fingerprint)
    after_training = problem.openmm_target.n_evaluations
    with clock.stage("evaluation"):
        samples = _draw(config, pieces, target, n=config.evaluation.n_samples, seed_offset=1, progress=progress)
        warnings = coverage_warnings(trajectory, torsions={v.name: v.atoms for v in variables if len(v.atoms) == 4})
        found = analyse(config, pieces.flow, samples, held_out, md=trajectory, variables=variables, basins=regions, warnings=warnings)
    evaluations = {
        "data": trajectory.n_force_evaluations,
        "training": spent_in_training,
        "evaluation": problem.openmm_target.n_evaluations - after_training,
    }
    return _write(config, folder, problem, trajectory, samples, found, clock=clock, evaluations=evaluations)


def require_usable(config: GeneratorConfig) -> None:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted.

    Raises:
        ConfigError, InputError, PlatformError, TopologyError: With what to do.
    """
    loaded = _load_system(config)
    require_platform(platform_choice(config))
    basins(config, collective_variables(config, loaded.molecule))
    for path in config.data.files:
        onto_constraints(read_frames(path, loaded.topology), loaded.molecule)


def draw_samples(folder: RunFolder, config: GeneratorConfig, n: int, *, progress: bool = True) -> Path:
    """Draw fresh weighted samples from the flow of a finished run.

    Args:
        folder: The run.
        config: Its configuration.
        n: Number of samples.
        progress: Whether to show a progress bar.

    Returns:
        The XTC file; its weights lie beside it in an npz of the same name.

    Raises:
        CheckpointError: If the flow in the folder is corrupt or belongs to another system.
    """
    problem = _load(config, platform_name=_platform_of(folder))
    trained_on = json.loads(folder.results_path.read_text())["provenance"]["sha256"]
    changed = [name for name, digest in problem.loaded.sha256.items() if trained_on.get(name) != digest]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed since the run in {folder.path}, so that new samples would belong to another system: "
            "restore the file, or make a new run"
        )
    pieces = _rebuild(config, problem.loaded, folder)
    number = folder.next_samples_number()
    samples = _draw(config, pieces, problem.target, n=n, seed_offset=1 + number, progress=progress)
    name = f"samples-{number:03d}"
    write_xtc(folder.path / f"{name}.xtc", samples.x.numpy(), topology=problem.loaded.topology)
    folder.write_npz(f"{name}.npz", samples.weight_arrays())
    return folder.path / f"{name}.xtc"


def _load_system(config: GeneratorConfig) -> LoadedSystem:
    loaded = load(config.topology, config.system, state=config.state, coordinates=config.coordinates, trust=config.trust_files)
    require_flow_over_all_atoms(loaded)
    check_geometry(build_zmatrix(loaded.molecule), torch.from_numpy(loaded.positions)[None])
    return loaded


def _platform_of(folder: RunFolder) -> str | None:
    """The platform that an earlier part of the run computed on: a resumed run stays on it."""
    path = folder.path / _PLATFORM
    return json.loads(path.read_text())["name"] if path.exists() else None


def _load(config: GeneratorConfig, *, platform_name: str | None = None) -> _Problem:
    loaded = _load_system(config)
    asked = platform_choice(config)
    choice = replace(asked, name=asked.name or platform_name)
    openmm_target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=config.temperature_kelvin, platform=choice)
    target: Target = ConstrainedTarget(openmm_target, loaded.molecule) if len(loaded.molecule.constraints) else openmm_target
    return _Problem(loaded=loaded, openmm_target=openmm_target, target=target)


def _size(config: GeneratorConfig) -> CouplingSize:
    flow = config.flow
    return CouplingSize(
        torsion_layers=flow.torsion_layers, torsion_bins=flow.torsion_bins, stiff_layers=flow.stiff_layers,
        stiff_bins=flow.stiff_bins, hidden=flow.hidden, compiled=_worth_compiling(config) if flow.compile is None else flow.compile,
    )  # fmt: skip


def _worth_compiling(config: GeneratorConfig) -> bool:
    """Whether the splines of all steps gain more time than compiling them costs."""
    steps = config.training.forward_kl_steps + 2 * config.training.reverse_kl_steps
    return steps * config.flow.stiff_layers >= _COMPILE_FROM_CALLS


def _build(config: GeneratorConfig, loaded: LoadedSystem, training: Trajectory) -> InternalCoordinateFlow:
    everything = np.concatenate([training.x, *(hot.x for hot in training.hot)])
    domains = learn_domains(loaded.molecule, everything)
    generator = torch.Generator().manual_seed(config.seed)
    return internal_coordinate_flow(loaded.molecule, domains, size=_size(config), data=training.x, generator=generator)


def _only_sector(trajectory: Trajectory, pieces: InternalCoordinateFlow) -> Trajectory:
    """The frames of the flow's sector; the others, far-swung hydrogens of hot data, are counted in the log."""
    hot = tuple(part.rows(pieces.in_sector(part.x)) for part in trajectory.hot)
    kept = replace(trajectory.rows(pieces.in_sector(trajectory.x)), hot=hot)
    if len(kept) < len(trajectory):
        logger.info(
            "%d of %d frames at the target temperature lie outside the sector and are left out",
            len(trajectory) - len(kept),
            len(trajectory),
        )
    return kept


def _rebuild(config: GeneratorConfig, loaded: LoadedSystem, folder: RunFolder) -> InternalCoordinateFlow:
    try:
        domains = Domains.from_dict(json.loads((folder.path / _DOMAINS).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {folder.path / _DOMAINS}: {error}; the run has to be made again") from error
    generator = torch.Generator().manual_seed(config.seed)
    pieces = internal_coordinate_flow(loaded.molecule, domains, size=_size(config), data=None, generator=generator)
    load_weights(pieces.flow, folder.path / _FLOW, fingerprint=_fingerprint(config, loaded, pieces))
    return pieces


def _draw(
    config: GeneratorConfig, pieces: InternalCoordinateFlow, target: Target, *, n: int, seed_offset: int, progress: bool
) -> WeightedSamples:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, seed_offset]).generate_state(1)[0]))
    return importance_sample(
        pieces.flow, target, n=n, batch_size=min(config.evaluation.batch_size, n), generator=generator, progress=progress
    )


def _fingerprint(config: GeneratorConfig, loaded: LoadedSystem, pieces: InternalCoordinateFlow) -> str:
    """Hash of whatever a checkpoint depends on: inputs, settings, coordinates."""
    settings = config.model_dump(mode="json", include={"temperature", "seed", "data", "flow", "training"})
    content = {"inputs": sorted(loaded.sha256.values()), "settings": settings, "domains": pieces.domains.to_dict()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _spent_in_training(folder: RunFolder, now: int) -> int:
    """Energies spent in training, those of earlier parts of a resumed run included."""
    path = folder.path / "evaluations.json"
    total = now + (json.loads(path.read_text())["training"] if path.exists() else 0)
    folder.write_json("evaluations.json", {"training": total})
    return total


def _write(
    config: GeneratorConfig,
    folder: RunFolder,
    problem: _Problem,
    trajectory: Trajectory,
    samples: WeightedSamples,
    found: Analysis,
    *,
    clock: Clock,
    evaluations: Mapping[str, int],
) -> Results:
    topology = problem.loaded.topology
    write_xtc(folder.path / "samples.xtc", samples.x.numpy(), topology=topology)
    write_xtc(folder.path / "chain.xtc", found.chain.x.numpy(), topology=topology)
    folder.write_npz("weights.npz", {**samples.weight_arrays(), **found.sample_arrays})
    folder.write_npz("data.npz", found.data_arrays)
    results = Results(
        task="generator",
        estimates=found.estimates,
        diagnostics={**found.diagnostics, "energy_evaluations": dict(evaluations)},
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=found.verdict.word,
        provenance=provenance(config.seed, problem.openmm_target.platform_name, sha256=problem.loaded.sha256 | _data_hashes(config)),
        reasons=found.verdict.reasons,
        notes=(*problem.loaded.notes, *trajectory.notes, *found.notes, *_precision_notes(problem.openmm_target.platform_name)),
    )
    build_report(folder.path, config, results.to_dict())
    folder.finish(results)
    logger.info("raw ESS %.3g; verdict: %s", found.diagnostics["ess_raw"], found.verdict.word)
    return results


def _data_hashes(config: GeneratorConfig) -> dict[str, str]:
    """Hashes of the user's trajectories."""
    return {f"trajectory {k + 1} {path.name}": file_hash(path) for k, path in enumerate(config.data.files)}


def _precision_notes(platform_name: str) -> tuple[str, ...]:
    """What the platform does to energies that are called exact."""
    if platform_name == "Reference":
        return ()
    return (
        f"OpenMM's {platform_name} platform computes energies partly in single precision: weights carry that rounding, about 0.0001 kT for "
        "small molecules; platform: {name: Reference} computes in double precision",
    )
