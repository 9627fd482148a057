"""What every job of one molecule begins and ends with: the loaded system as a target, and the files of a finished run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from boltzgen.config import MoleculeConfig, SystemConfig
from boltzgen.core import Target, WeightedSamples
from boltzgen.cvs import CollectiveVariables
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.checks import require_flow_over_all_atoms, require_unconstrained
from boltzgen.md.loading import LoadedSystem, file_hash, load, with_parameters
from boltzgen.md.named_variables import variable_hashes
from boltzgen.md.platforms import require_platform
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import Trajectory, read_frames, write_xtc
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.transforms.zmatrix import build_zmatrix, check_geometry
from boltzgen.workflows.analysis import Analysis
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.coordinates import Ranges, basins, collective_variables
from boltzgen.workflows.data import onto_constraints, platform_choice, sampled_system
from boltzgen.workflows.report import build_report
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

logger = logging.getLogger(__name__)

_PLATFORM = "platform.json"
#: Change of the energy, in kT, that moving and turning a molecule may cause by rounding.
_MOVED_KT = 0.05


@dataclass(frozen=True)
class Problem:
    """The user's system, ready to be sampled.

    Attributes:
        loaded: System, topology and positions.
        openmm_target: Its energies.
        target: The same with the mass-metric term of rigid bonds, where there are any.
        variables: Coordinates that are looked along.
        regions: Basin → coordinate → range.
    """

    loaded: LoadedSystem
    openmm_target: OpenMMTarget
    target: Target
    variables: CollectiveVariables
    regions: Mapping[str, Ranges]


def load_problem(config: SystemConfig, folder: RunFolder) -> Problem:
    """Read every input; the platform is the one that an earlier part of the run computed on.

    Raises:
        ConfigError, InputError, PlatformError, TopologyError: With what to do.
    """
    loaded = _load_system(config)
    asked, path = platform_choice(config), folder.path / _PLATFORM
    before = json.loads(path.read_text())["name"] if path.exists() else None
    choice = replace(asked, name=asked.name or before)
    openmm_target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=config.temperature_kelvin, platform=choice)
    if loaded.box is None or config.task != "tfep":  # between states in a box nothing has to be free: every Z is finite
        _require_invariant(openmm_target, loaded)
    has_metric = loaded.system.getNumConstraints() > 0 and (loaded.is_one_molecule or config.task != "tfep")
    target: Target = ConstrainedTarget(openmm_target, loaded.molecule) if has_metric else openmm_target  # that of carried solvent cancels
    variables = collective_variables(config, loaded)
    return Problem(loaded, openmm_target, target, variables, basins(config, variables))


def begin(config: SystemConfig, folder: RunFolder) -> Problem:
    """Load the problem of a run, say so in its log, and settle its platform."""
    problem = load_problem(config, folder)
    folder.write_json(_PLATFORM, {"name": problem.openmm_target.platform_name})
    for note in problem.loaded.notes:
        logger.info("note: %s", note)
    logger.info("%d atoms; energies on %s", problem.loaded.topology.getNumAtoms(), problem.openmm_target.platform_name)
    return problem


def require_system(config: SystemConfig) -> LoadedSystem:
    """The system of a configuration, refused where it cannot work; its coordinates, basins and platform are there.

    Raises:
        ConfigError, InputError, PlatformError, TopologyError: With what to do.
    """
    loaded = _load_system(config)
    require_platform(platform_choice(config))
    basins(config, collective_variables(config, loaded))
    return loaded


def require_usable(config: MoleculeConfig) -> LoadedSystem:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted.

    Returns:
        The system.

    Raises:
        ConfigError, InputError, PlatformError, TopologyError: With what to do.
    """
    loaded = require_system(config)
    sampled_system(config, loaded)
    for path in config.data.files:
        onto_constraints(read_frames(path, loaded.topology), loaded)
    return loaded


def load_finished(config: MoleculeConfig, folder: RunFolder) -> Problem:
    """Load the problem of a finished run, to go on with it.

    Raises:
        CheckpointError: If input files have changed since, naming them.
    """
    problem = load_problem(config, folder)
    trained_on = json.loads(folder.results_path.read_text())["provenance"]["sha256"]
    changed = [name for name, digest in problem.loaded.sha256.items() if trained_on.get(name) != digest]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed since the run in {folder.path}, so that new samples would belong to another system: "
            "restore the file, or make a new run"
        )
    return problem


def write_more(folder: RunFolder, problem: Problem, samples: WeightedSamples, *, number: int) -> Path:
    """Write further samples of a finished run; the XTC file, its weights beside it in an npz of the same name."""
    samples.require_exact()
    name = f"samples-{number:03d}"
    write_xtc(folder.path / f"{name}.xtc", samples.x.numpy(), topology=problem.loaded.topology)
    folder.write_npz(f"{name}.npz", samples.weight_arrays())
    return folder.path / f"{name}.xtc"


def finish(
    config: MoleculeConfig,
    folder: RunFolder,
    problem: Problem,
    trajectory: Trajectory,
    samples: WeightedSamples,
    found: Analysis,
    *,
    clock: Clock,
    evaluations: Mapping[str, int],
) -> Results:
    """Write samples, weights, results and report of a run.

    Args:
        config: Its configuration.
        folder: Its folder.
        problem: Its system.
        trajectory: Its data.
        samples: Its weighted samples.
        found: What they say.
        clock: Its wall time.
        evaluations: Energies and forces computed: stage → number.

    Returns:
        The results, as written to ``results.json``.
    """
    topology = problem.loaded.topology
    write_xtc(folder.path / "samples.xtc", samples.x.numpy(), topology=topology)
    write_xtc(folder.path / "chain.xtc", found.chain.x.numpy(), topology=topology)
    folder.write_npz("weights.npz", {**samples.weight_arrays(), **found.sample_arrays})
    folder.write_npz("data.npz", found.data_arrays)
    results = Results(
        task=config.task,
        estimates=found.estimates,
        diagnostics={**found.diagnostics, "energy_evaluations": dict(evaluations)},
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=found.verdict.word,
        provenance=provenance(config.seed, problem.openmm_target.platform_name, sha256=problem.loaded.sha256 | data_hashes(config)),
        reasons=found.verdict.reasons,
        notes=(*problem.loaded.notes, *trajectory.notes, *found.notes, *precision_notes(problem.openmm_target.platform_name)),
    )
    build_report(folder.path, config, results.to_dict())
    folder.finish(results)
    logger.info("raw ESS %.3g; verdict: %s", found.diagnostics["ess_raw"], found.verdict.word)
    return results


def data_hashes(config: MoleculeConfig) -> dict[str, str]:
    """Hashes of the user's trajectories, and of the files of coordinates."""
    trajectories = {f"trajectory {k + 1} {path.name}": file_hash(path) for k, path in enumerate(config.data.files)}
    return trajectories | variable_hashes(config.collective_variables)


def precision_notes(platform_name: str) -> tuple[str, ...]:
    """What the platform does to energies that are called exact."""
    if platform_name == "Reference":
        return ()
    return (
        f"OpenMM's {platform_name} platform computes energies partly in single precision: weights carry that rounding, about 0.0001 kT for "
        "small molecules; platform: {name: Reference} computes in double precision",
    )


def _load_system(config: SystemConfig) -> LoadedSystem:
    loaded = load(config.topology, config.system, state=config.state, coordinates=config.coordinates, trust=config.trust_files)
    loaded = with_parameters(loaded, config.parameters)
    if config.task == "tfep":
        return loaded
    if config.task in ("generator", "jumps"):
        require_flow_over_all_atoms(loaded)
        check_geometry(build_zmatrix(loaded.molecule), torch.from_numpy(loaded.positions)[None])
        return loaded
    require_unconstrained(loaded)
    if loaded.system.usesPeriodicBoundaryConditions():
        raise InputError("the system is periodic and the velocity fields are not: they would tear the molecule apart at the box's faces")
    return loaded


def _require_invariant(target: OpenMMTarget, loaded: LoadedSystem) -> None:
    """Refuse energies that change when the molecule is moved and turned: every ln Z here is that of a free molecule."""
    x = torch.from_numpy(loaded.positions)
    moved = x.flip(1) * torch.tensor([1.0, 1.0, -1.0], dtype=x.dtype) + torch.tensor([0.3, -0.2, 0.5], dtype=x.dtype)  # a rotation
    with torch.no_grad():
        here, there = target.reduced_potential(torch.stack([x, moved])).tolist()
    if abs(here - there) > _MOVED_KT:
        raise InputError(
            f"the energy changes by {there - here:.3g} kT when the molecule is moved and turned: something holds it in place (a restraint, "
            "an external force); remove it, a flow of a free molecule cannot know it"
        )
