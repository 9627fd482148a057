"""The job of jumps: walkers that move locally and jump to proposals of a flow learned while sampling; then production, frozen."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch

from boltzgen.config import JumpsConfig, trained_by
from boltzgen.core import Move
from boltzgen.cvs import CollectiveVariables
from boltzgen.errors import InputError
from boltzgen.md.loading import LoadedSystem, file_hash
from boltzgen.md.named_variables import variable_hashes
from boltzgen.md.steering import OpenMMSteering
from boltzgen.recipes import CouplingSize, learn_domains
from boltzgen.recipes.molecule_learning import LearningSettings, MoleculeFlowRecipe
from boltzgen.sampling.adaptive import AdaptiveSampler, Plan
from boltzgen.sampling.coordinate_learner import CoordinateLearner
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo, tuned_step_size
from boltzgen.sampling.steered import FreePaths
from boltzgen.training.checkpoints import save_weights
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.cycle_records import run_cycles
from boltzgen.workflows.data import onto_constraints, platform_choice
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.jump_analysis import analyse_jumps
from boltzgen.workflows.jump_records import JumpHistory, JumpRecorder
from boltzgen.workflows.jump_report import build_jumps_report
from boltzgen.workflows.molecule import Problem, begin, precision_notes, require_system
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of, provenance
from boltzgen.workflows.seeds import stream
from boltzgen.workflows.walker_starts import equilibrated, in_turn, start_positions, stored_starts

logger = logging.getLogger(__name__)

FLOW = "flow.safetensors"
_SECTOR_NOTE = (
    "walkers keep the mirror image and the labelling of equivalent hydrogens that they start with: averages are those of that sector, "
    "which is all of space for whatever does not tell labels apart"
)
#: First step of leapfrog in nm, and the acceptance it is tuned to.
_FIRST_STEP, _HMC_ACCEPTANCE, _MALA_ACCEPTANCE = 1e-3, 0.75, 0.57
_TUNING_MOVES = 100


@dataclass(frozen=True)
class LocalMoves:
    """Local moves of a run.

    Attributes:
        move: The move.
        steps: Force evaluations of one move.
    """

    move: Move
    steps: int


def run_jumps(config: JumpsConfig, folder: RunFolder, *, progress: bool = True) -> Results:
    """Sample by local moves and jumps, and write everything that a user needs of it.

    Args:
        config: What to do.
        folder: Where; checkpoints found there are used.
        progress: Whether to show progress bars.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        ConfigError, InputError, TopologyError, EnergyError, CheckpointError, OutputError: With what to do.
        Interrupted: After SIGTERM or SIGINT; the run can be resumed.
    """
    folder.settle_config(config)
    torch.set_num_threads(1)
    clock = Clock(folder)
    with clock.stage("loading"):
        problem = begin(config, folder)
    hashes = _hashes(config, problem.loaded)
    fingerprint = fingerprint_of({"inputs": sorted(hashes.items()), "settings": trained_by(config)})
    with clock.stage("starts"):
        x, local, spent = _starts(config, problem, folder, fingerprint=fingerprint)
    sampler = make_sampler(config, problem, local, x)
    recorder = JumpRecorder(folder, config.production.save_interval, variables=problem.variables)
    with clock.stage("sampling"), stop_on_signal() as should_stop:
        run_cycles(sampler, recorder, fingerprint=fingerprint, should_stop=should_stop, progress=progress)
    learner = sampler.learner
    assert isinstance(learner, CoordinateLearner)
    assert learner.flow is not None
    save_weights(learner.flow, folder.path / FLOW, fingerprint=fingerprint)
    with clock.stage("analysis"):
        production, adaptation = recorder.history("production"), recorder.history("adaptation")
        found = analyse_jumps(config, production, adaptation, variables=problem.variables, regions=problem.regions)
    results = Results(
        task=config.task,
        estimates=found.estimates,
        diagnostics={**found.diagnostics, "energy_evaluations": _evaluations(config, production, adaptation, local=local, starts=spent)},
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=found.verdict.word,
        provenance=provenance(config.seed, problem.openmm_target.platform_name, sha256=hashes),
        reasons=found.verdict.reasons,
        notes=(_SECTOR_NOTE, *problem.loaded.notes, *precision_notes(problem.openmm_target.platform_name)),
    )
    folder.write_npz("samples.npz", _samples(config, production, adaptation))
    build_jumps_report(folder.path, config, results.to_dict(), production, adaptation, variables=problem.variables)
    folder.finish(results)
    logger.info("%s; verdict: %s", found.estimates[0] if found.estimates else "no estimate", found.verdict.word)
    return results


def require_usable(config: JumpsConfig) -> None:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted."""
    loaded = require_system(config)
    _require_local(config, loaded)
    _start_positions(config, loaded)


def make_sampler(config: JumpsConfig, problem: Problem, local: LocalMoves, x: torch.Tensor) -> AdaptiveSampler:
    """The loop of a configuration, ready to start from ``x`` ``[w, n_atoms, 3]`` in nm."""
    flow, learning = config.flow, config.learning
    size = CouplingSize(
        torsion_layers=flow.torsion_layers, torsion_bins=flow.torsion_bins, stiff_layers=flow.stiff_layers, stiff_bins=flow.stiff_bins,
        hidden=flow.hidden, compiled=bool(flow.compile),
    )  # fmt: skip
    settings = LearningSettings(
        steps=learning.steps, batch_size=learning.batch_size, learning_rate=learning.learning_rate, use_forces=learning.use_forces
    )
    recipe = MoleculeFlowRecipe(problem.loaded.molecule, problem.target, size, settings, seed=config.seed)
    plan = Plan(
        n_local=config.local.per_cycle, n_rounds=config.adaptation.rounds, n_cycles=config.adaptation.cycles,
        n_production=config.production.cycles,
    )  # fmt: skip
    learner = CoordinateLearner(problem.target, recipe, remembered=learning.remembered)
    return AdaptiveSampler(local.move, learner, plan=plan, state=local.move.init(x), generator=stream(config.seed, 20))


def _require_local(config: JumpsConfig, loaded: LoadedSystem) -> None:
    if config.local.kind != "md" and loaded.system.getNumConstraints():
        raise InputError(
            f"local.kind: {config.local.kind} moves every atom freely, but the system has rigid bonds: take kind: md, which keeps them"
        )


def _start_positions(config: JumpsConfig, loaded: LoadedSystem) -> np.ndarray:
    """One configuration of every walker ``[w, n_atoms, 3]`` in nm, all of one mirror image and labelling.

    Raises:
        InputError: If a file has other atoms.
        TopologyError: If they differ in mirror image or labelling.
    """
    starts = start_positions(config.walkers.files, loaded)
    if len(starts) > 1:
        learn_domains(loaded.molecule, np.stack(starts))
    return onto_constraints(in_turn(starts, config.walkers.count), loaded)


def _local_moves(config: JumpsConfig, problem: Problem) -> LocalMoves:
    """The local moves, before leapfrog's step is tuned."""
    local = config.local
    _require_local(config, problem.loaded)
    if local.kind == "md":
        engine = OpenMMSteering.from_loaded(
            problem.loaded, CollectiveVariables(()), temperature_kelvin=config.temperature_kelvin, widths=(),
            timestep_ps=config.timestep_ps, platform=platform_choice(config),
        )  # fmt: skip
        return LocalMoves(FreePaths(engine, n_steps=local.steps), local.steps + 2)
    steps = local.steps if local.kind == "hmc" else 1
    return LocalMoves(HamiltonianMonteCarlo(problem.target, step_size=local.step_size or _FIRST_STEP, n_leapfrog=steps), steps)


def _starts(config: JumpsConfig, problem: Problem, folder: RunFolder, *, fingerprint: str) -> tuple[torch.Tensor, LocalMoves, int]:
    """Equilibrated walkers, from the run folder where they are there already, the local moves, and the energies spent on them."""
    local = _local_moves(config, problem)

    def make() -> dict[str, np.ndarray]:
        move, generator, step = local.move, stream(config.seed, 21), math.nan
        state = move.init(torch.from_numpy(_start_positions(config, problem.loaded)))
        n_moves = config.walkers.equilibration
        if isinstance(move, HamiltonianMonteCarlo) and config.local.step_size is None:
            goal = _HMC_ACCEPTANCE if config.local.kind == "hmc" else _MALA_ACCEPTANCE
            for _ in range(2):  # once on the way to equilibrium, once near it
                move, state = tuned_step_size(move, state, generator=generator, n_moves=_TUNING_MOVES, acceptance=goal)
            step, n_moves = move.step_size, n_moves + 2 * _TUNING_MOVES
        advice = "take shorter steps (local.timestep, local.step_size)"
        state, _ = equilibrated(move, state, n_moves=config.walkers.equilibration, generator=generator, advice=advice)
        spent = n_moves * config.walkers.count * local.steps
        return {"x": state.x.numpy(), "step_size": np.array(step), "n_force": np.array(spent)}

    found = stored_starts(folder, fingerprint=fingerprint, make=make)
    move, step = local.move, float(found["step_size"])
    if isinstance(move, HamiltonianMonteCarlo) and math.isfinite(step):
        move = move.with_step_size(step)
    return torch.from_numpy(found["x"]), LocalMoves(move, local.steps), int(found["n_force"])


def _samples(config: JumpsConfig, production: JumpHistory, adaptation: JumpHistory) -> dict[str, np.ndarray]:
    """Stored configurations of the cycles that count, and these cycles."""
    counts = production.x_cycle >= len(adaptation) + config.production.n_discarded(len(production))
    return {"x": production.x[counts], "cycle": production.x_cycle[counts]}


def _evaluations(
    config: JumpsConfig, production: JumpHistory, adaptation: JumpHistory, *, local: LocalMoves, starts: int
) -> dict[str, int]:
    """Energies and forces by purpose.

    A jump takes that of its proposal and that of its start, and the first local move after it that of where it begins.
    """
    n_cycles, w = len(adaptation) + len(production), config.walkers.count
    after_jumps = int(np.isfinite(adaptation.u_between).any(1).sum() + np.isfinite(production.u_between).any(1).sum())
    return {
        "starts": starts,
        "local moves": w * (n_cycles * config.local.per_cycle * local.steps + after_jumps),
        "training": int(adaptation.n_learned.sum()),
        "proposals": 2 * int(np.isfinite(adaptation.u_between).sum() + np.isfinite(production.u_between).sum()),
    }


def _hashes(config: JumpsConfig, loaded: LoadedSystem) -> dict[str, str]:
    starts = {f"start {k + 1} {path.name}": file_hash(path) for k, path in enumerate(config.walkers.files)}
    return {**loaded.sha256, **variable_hashes(config.collective_variables), **starts}
