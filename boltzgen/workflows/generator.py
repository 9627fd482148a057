"""The main job: data, training, fresh weighted samples, free energies, report."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from boltzgen.config import GeneratorConfig
from boltzgen.core import Flow, Molecule, Target, WeightedSamples
from boltzgen.errors import CheckpointError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.trajectory import Trajectory, split_blocks
from boltzgen.recipes import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains
from boltzgen.sampling.importance import importance_sample
from boltzgen.training.checkpoints import load_weights, save_weights
from boltzgen.transforms.domains import Domains
from boltzgen.workflows.analysis import analyse
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.data import collect, coverage_warnings
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.molecule import begin, finish, load_finished, write_more
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of
from boltzgen.workflows.seeds import stream
from boltzgen.workflows.train import Trainer

logger = logging.getLogger(__name__)

_FLOW, _DOMAINS = "flow.safetensors", "domains.json"

_NORMALISATION = (
    "ln Z is that of one mirror image and one labelling of equivalent hydrogens, with lengths in nm, all orientations (8 pi^2) "
    "and one molecule per nm^3 of removed translation"
)

#: Spline evaluations, each with its gradient, that pay for compiling (benchmarks/splines.py: about 20,000, doubled to be sure).
_COMPILE_FROM_CALLS = 40_000


def run_generator(config: GeneratorConfig, folder: RunFolder, *, progress: bool = True) -> Results:
    """Train a Boltzmann generator and write everything that a user needs of it.

    Args:
        config: What to do.
        folder: Where; data and checkpoints found there are used.
        progress: Whether to show progress bars.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        ConfigError, InputError, TopologyError, EnergyError, CheckpointError, OutputError: With what to do.
        Interrupted: After SIGTERM or SIGINT during training; the run can be resumed.
    """
    folder.settle_config(config)
    torch.set_num_threads(config.training.threads)
    clock = Clock(folder)
    with clock.stage("loading"):
        problem = begin(config, folder)
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
            spent = folder.spent_in_training(problem.openmm_target.n_evaluations - before)
        save_weights(pieces.flow, folder.path / _FLOW, fingerprint=fingerprint)
    after_training = problem.openmm_target.n_evaluations
    with clock.stage("evaluation"):
        samples = _draw(config, pieces, target, n=config.evaluation.n_samples, seed_offset=1, progress=progress)
        warnings = coverage_warnings(trajectory, torsions={v.name: v.atoms for v in problem.variables if len(v.atoms) == 4})
        found = analyse(
            config, pieces.flow, samples, held_out, md=trajectory, variables=problem.variables, basins=problem.regions,
            warnings=warnings, normalisation=_NORMALISATION,
        )  # fmt: skip
    evaluations = {
        "data": trajectory.n_force_evaluations,
        "training": spent,
        "evaluation": problem.openmm_target.n_evaluations - after_training,
    }
    return finish(config, folder, problem, trajectory, samples, found, clock=clock, evaluations=evaluations)


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
    problem = load_finished(config, folder)
    pieces = _rebuild(config, problem.loaded, folder)
    number = folder.next_samples_number()
    samples = _draw(config, pieces, problem.target, n=n, seed_offset=1 + number, progress=progress)
    return write_more(folder, problem, samples, number=number)


def load_flow(folder: RunFolder, config: GeneratorConfig) -> tuple[Flow, Molecule]:
    """The flow of a finished run, over configurations of the molecule in nm, and the molecule.

    Args:
        folder: The run.
        config: Its configuration.

    Raises:
        CheckpointError: If the flow in the folder is corrupt or belongs to another system.
    """
    problem = load_finished(config, folder)
    problem.openmm_target.close()
    return _rebuild(config, problem.loaded, folder).flow, problem.loaded.molecule


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
    generator = stream(config.seed, seed_offset)
    return importance_sample(
        pieces.flow, target, n=n, batch_size=min(config.evaluation.batch_size, n), generator=generator, progress=progress
    )


def _fingerprint(config: GeneratorConfig, loaded: LoadedSystem, pieces: InternalCoordinateFlow) -> str:
    """Hash of whatever a checkpoint depends on: inputs, settings, coordinates."""
    settings = config.model_dump(mode="json", include={"temperature", "parameters", "seed", "data", "flow", "training"})
    content = {"inputs": sorted(loaded.sha256.values()), "settings": settings, "domains": pieces.domains.to_dict()}
    return fingerprint_of(content)
