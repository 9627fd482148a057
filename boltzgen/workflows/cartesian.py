"""The job of one molecule in Cartesian coordinates: data, a continuous flow over all atoms, fresh weighted samples, report."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boltzgen.chirality import Folded, Handedness, equal_hydrogens
from boltzgen.config import CartesianConfig, trained_by
from boltzgen.core import Distribution, Flow, Molecule, Target, WeightedSamples
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.trajectory import Trajectory, split_blocks
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.networks.pairs import neighbour_distance
from boltzgen.sampling.importance import importance_sample
from boltzgen.targets.views import Restricted
from boltzgen.training.checkpoints import load_weights, save_weights
from boltzgen.workflows.analysis import analyse
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.continuous import FieldFlow, make_field
from boltzgen.workflows.data import collect, coverage_warnings
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.matching import Matcher, started_from
from boltzgen.workflows.molecule import Problem, begin, finish, load_finished, write_more
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of
from boltzgen.workflows.seeds import stream

logger = logging.getLogger(__name__)

_FLOW, _BASE = "flow.safetensors", "base.npz"
_NORMALISATION = (
    "ln Z is that of one mirror image and one labelling of equivalent hydrogens, those of your structure, on the subspace of mean position "
    "zero with its natural volume, lengths in nm, all orientations"
)


def run_cartesian(config: CartesianConfig, folder: RunFolder, *, progress: bool = True) -> Results:
    """Train a continuous flow over the atoms of a molecule and write everything that a user needs of it.

    Args:
        config: What to do.
        folder: Where; data and checkpoints found there are used.
        progress: Whether to show progress bars.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        ConfigError, InputError, TopologyError, EnergyError, SolverError, CheckpointError, OutputError: With what to do.
        Interrupted: After SIGTERM or SIGINT during training; the run can be resumed.
    """
    folder.settle_config(config)
    torch.set_num_threads(config.training.threads)
    clock = Clock(folder)
    with clock.stage("loading"):
        problem = _with_equal_hydrogens(begin(config, folder))
        fingerprint = _fingerprint(config, problem.loaded)
    with clock.stage("data"):
        trajectory = collect(config, problem.loaded, folder=folder, target=problem.target, progress=progress)
        hand = _one_hand(trajectory, problem)
        training, held_out = split_blocks(trajectory, evaluate_fraction=config.data.evaluate_fraction)
        x = _centred(training)
        held_out = replace(held_out, x=_centred(held_out).double().numpy())
        pieces = _pieces(config, problem, x, folder)
    logger.info("%d frames to train on, %d independent ones held out", len(training), len(held_out))
    before = problem.openmm_target.n_evaluations
    with clock.stage("training"), stop_on_signal() as should_stop:
        try:
            Matcher(
                settings=config.training, pieces=pieces, target=problem.openmm_target, x=x, seed=config.seed, folder=folder,
                allowed=allowed(problem.openmm_target, hand, is_mirrored=pieces.field.is_mirrored), fingerprint=fingerprint,
                should_stop=should_stop, progress=progress,
            ).run()  # fmt: skip
        finally:
            spent = folder.spent_in_training(problem.openmm_target.n_evaluations - before)
    after_training = problem.openmm_target.n_evaluations
    with clock.stage("evaluation"):

        def draw(flow: Flow) -> WeightedSamples:
            density, target = of_one_hand(flow, problem.target, hand, is_mirrored=pieces.field.is_mirrored)
            return importance_sample(
                density, target, n=config.evaluation.n_samples, batch_size=config.evaluation.batch_size, generator=stream(config.seed, 2),
                progress=progress,
            )  # fmt: skip

        flow, samples, exactness = pieces.weighted(draw, data=torch.from_numpy(held_out.x), generator=stream(config.seed, 1))
        save_weights(flow, folder.path / _FLOW, fingerprint=fingerprint)
        density, _ = of_one_hand(flow, problem.target, hand, is_mirrored=pieces.field.is_mirrored)
        warnings = coverage_warnings(trajectory, torsions={v.name: v.atoms for v in problem.variables if len(v.atoms) == 4})
        found = analyse(
            config, density, samples, held_out, md=trajectory, variables=problem.variables, basins=problem.regions, warnings=warnings,
            normalisation=_NORMALISATION, more=exactness,
        )  # fmt: skip
    evaluations = {
        "data": trajectory.n_force_evaluations,
        "training": spent,
        "evaluation": problem.openmm_target.n_evaluations - after_training,
    }
    return finish(config, folder, problem, trajectory, samples, found, clock=clock, evaluations=evaluations)


def draw_cartesian(folder: RunFolder, config: CartesianConfig, n: int, *, progress: bool = True) -> Path:
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
    problem, density, target = _finished(config, folder)
    number = folder.next_samples_number()
    samples = importance_sample(
        density, target, n=n, batch_size=min(n, config.evaluation.batch_size), generator=stream(config.seed, 1000 + number),
        progress=progress,
    )  # fmt: skip
    return write_more(folder, problem, samples, number=number)


def load_cartesian_flow(folder: RunFolder, config: CartesianConfig) -> Distribution:
    """The density of a finished run, over configurations of the molecule with mean position zero in nm.

    Args:
        folder: The run.
        config: Its configuration.

    Raises:
        CheckpointError: If the flow in the folder is corrupt or belongs to another system.
    """
    problem, density, _ = _finished(config, folder)
    problem.openmm_target.close()
    return density


def _finished(config: CartesianConfig, folder: RunFolder) -> tuple[Problem, Distribution, Target]:
    """The problem of a finished run, with the density and the target of its samples."""
    problem = _with_equal_hydrogens(load_finished(config, folder))
    pieces = _pieces(config, problem, None, folder)
    flow = pieces.reported(json.loads(folder.results_path.read_text())["diagnostics"]["solver_steps"])
    load_weights(flow, folder.path / _FLOW, fingerprint=_fingerprint(config, problem.loaded))
    return problem, *of_one_hand(flow, problem.target, _hand(problem), is_mirrored=pieces.field.is_mirrored)


def of_one_hand(flow: Flow, target: Target, hand: Handedness, *, is_mirrored: bool) -> tuple[Distribution, Target]:
    """Density and target of one handedness.

    A field that cannot tell mirror images apart, or equal hydrogens, makes them all: its density is folded onto the right one.
    """
    if not len(hand.centres):
        return flow, target
    folds = hand.n_images(mirror=is_mirrored) > 1
    return (Folded(flow, hand, mirror=is_mirrored) if folds else flow), Restricted(target, hand.contains)


def allowed(target: Target, hand: Handedness, *, is_mirrored: bool) -> Target:
    """The target where evaluation gives weight, once the flow is folded."""
    if not len(hand.centres):
        return target
    return Restricted(target, lambda x: hand.contains(hand.folded(x, mirror=is_mirrored)))


def _with_equal_hydrogens(problem: Problem) -> Problem:
    """The problem with equal labels for hydrogens that its energy does not tell apart: the field treats them alike."""
    molecule, x = problem.loaded.molecule, torch.from_numpy(problem.loaded.positions)
    problem.openmm_target.labels = equal_hydrogens(molecule, problem.openmm_target.reduced_potential, x)
    return problem


def _hand(problem: Problem) -> Handedness:
    """The handedness of the user's structure."""
    return Handedness.of(problem.loaded.molecule, torch.from_numpy(problem.loaded.positions), labels=problem.openmm_target.labels)


def _one_hand(trajectory: Trajectory, problem: Problem) -> Handedness:
    """The handedness of the user's structure, after checking that the data have it too: others would train and judge another molecule."""
    hand, loaded = _hand(problem), problem.loaded
    wrong = torch.nonzero(~hand.agrees(torch.as_tensor(trajectory.x, dtype=torch.float64)))
    if len(wrong):
        frame, centre = wrong[0].tolist()
        raise InputError(
            f"{len(torch.unique(wrong[:, 0]))} frames have another handedness than the structure, the first, frame {frame}, at "
            f"{loaded.molecule.names[hand.centres[centre, 0]]}: give structure and data of one stereoisomer, with hydrogens numbered alike"
        )
    return hand


def _centred(trajectory: Trajectory) -> Tensor:
    """Frames ``[m, n, 3]``, float32, with the mean position at the origin."""
    x = torch.as_tensor(trajectory.x, dtype=torch.float64)
    return (x - x.mean(dim=1, keepdim=True)).to(torch.float32)


def _pieces(config: CartesianConfig, problem: Problem, x: Tensor | None, folder: RunFolder) -> FieldFlow:
    """The untrained field on its base, fitted to frames ``[m, n, 3]`` or, without them, as the folder remembers it."""
    settings, path = config.field, folder.path / _BASE
    if x is not None:
        length = settings.length or neighbour_distance(x)
        base = make_base(config, problem.loaded.molecule, x, length=length, labels=problem.openmm_target.labels)
        pairs = PairStatistics.of(base.mean_squares, x)
        folder.write_npz(
            _BASE,
            {"precision": base.precision.numpy(), "length": np.array(length)}
            | {"square": pairs.data.numpy(), "variance": pairs.variance.numpy()},
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            base, length = ParticleNormal(torch.from_numpy(file["precision"]), 3, dtype=torch.float32), float(file["length"])
            pairs = PairStatistics(base.mean_squares, torch.from_numpy(file["square"]), torch.from_numpy(file["variance"]))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot read {path}: {error}; the run has to be made again") from error
    statistics = pairs if settings.pair_scales else None
    field = make_field(settings, problem.openmm_target, length=length, statistics=statistics, generator=stream(config.seed, 3))
    return FieldFlow(base, field, settings)


def make_base(config: CartesianConfig, molecule: Molecule, x: Tensor, *, length: float, labels: Sequence[str] = ()) -> ParticleNormal:
    """The base that a configuration names, in double precision.

    Args:
        config: Its kind and scale.
        molecule: Bonds, for a harmonic base.
        x: Frames ``[m, n, 3]`` in nm, for a fitted one.
        length: Length of a bond in nm, for a harmonic one.
        labels: One per atom, those of equal atoms equal, for a fitted one; all differ by default.
    """
    if config.field.base == "harmonic":
        return ParticleNormal.harmonic(torch.from_numpy(molecule.bonds), n_particles=molecule.n_atoms, length=length)
    if config.field.base == "isotropic":
        return ParticleNormal.isotropic(molecule.n_atoms, 3, scale=config.field.scale)
    labels = tuple(labels) or molecule.names
    kinds = torch.tensor([labels.index(label) for label in labels])
    return ParticleNormal.fitted(x, kinds=kinds, narrowest=config.field.narrowest)


def _fingerprint(config: CartesianConfig, loaded: LoadedSystem) -> str:
    """Hash of whatever a checkpoint depends on: inputs and settings."""
    values = trained_by(config)
    settings = {key: values[key] for key in ("temperature", "parameters", "seed", "data", "field", "training")}
    return fingerprint_of({"inputs": sorted(loaded.sha256.values()), "settings": settings} | started_from(config.training))
