"""The job of steered paths: walkers, a proposal learned while sampling, frozen production, free energies from all paths."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from boltzgen.config import PathsConfig, trained_by
from boltzgen.config.sections import limit
from boltzgen.core import Distribution
from boltzgen.cvs import CollectiveVariables
from boltzgen.distributions import NormalMixture
from boltzgen.errors import InputError
from boltzgen.md.loading import LoadedSystem, file_hash, load, with_parameters
from boltzgen.md.named_variables import build_cvs, variable_hashes
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.steering import OpenMMSteering
from boltzgen.mixtures import Mixture
from boltzgen.paths import PathWalkers, Schedule
from boltzgen.sampling.adaptive import AdaptiveSampler, Plan
from boltzgen.sampling.cv_learner import FixedProposal, LearnedProposal
from boltzgen.sampling.periodic_proposals import require_same_circles
from boltzgen.sampling.pilot import PathSettings, tuned_paths
from boltzgen.sampling.steered import FreePaths, PathInfo
from boltzgen.training.checkpoints import save_weights
from boltzgen.units import parse_quantity
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.cycle_records import never, run_cycles
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.path_analysis import PathAnalysis, analyse_paths, enough
from boltzgen.workflows.path_films import FILMS, film_paths
from boltzgen.workflows.path_proposals import PROPOSAL, broad_proposal, fixed_proposal, flow_recipe
from boltzgen.workflows.path_records import Recorder
from boltzgen.workflows.path_report import WORKS, build_paths_report, work_arrays
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of, provenance
from boltzgen.workflows.seeds import stream
from boltzgen.workflows.walker_starts import equilibrated, in_turn, start_positions, stored_starts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PathProblem:
    """A system that paths can be steered on.

    Attributes:
        loaded: The checked files.
        variables: Its collective variables.
        engine: Runs the paths.
    """

    loaded: LoadedSystem
    variables: CollectiveVariables
    engine: OpenMMSteering


def run_paths(config: PathsConfig, folder: RunFolder, *, progress: bool = True) -> Results:
    """Sample by steered paths and write everything that a user needs of it.

    Args:
        config: What to do.
        folder: Where; data and checkpoints found there are used.
        progress: Whether to show progress bars.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        ConfigError, InputError, EnergyError, CheckpointError, OutputError: With what to do.
        Interrupted: After SIGTERM or SIGINT; the run can be resumed.
    """
    folder.settle_config(config)
    torch.set_num_threads(1)
    clock = Clock(folder)
    with clock.stage("loading"):
        problem = open_problem(config)
    fingerprint = _fingerprint(config, problem)
    with clock.stage("starts"):
        walkers, spent_starts = _starts(config, problem, folder, fingerprint=fingerprint)
    with clock.stage("tuning"):
        settings, spent_tuning = _tuned(config, problem, walkers, folder)
    engine = problem.engine.with_settings(widths=settings.widths)
    schedule = replace(settings.schedule, looks=settings.widths) if config.paths.looks and len(config.names) == 1 else settings.schedule
    sampler, recorder = make_sampler(config, problem, engine, walkers, schedule), Recorder(folder, config.production.save_interval)
    with clock.stage("sampling"), stop_on_signal() as should_stop:
        ends = (lambda: enough(config, recorder)) if config.production.round_trips else never
        run_cycles(sampler, recorder, fingerprint=fingerprint, should_stop=should_stop, enough=ends, progress=progress)
    proposal = sampler.learner.proposal  # type: ignore[attr-defined]
    save_weights(proposal, folder.path / PROPOSAL, fingerprint=fingerprint)
    films = film_paths(engine, sampler.state, proposal, schedule=settings.schedule, generator=stream(config.seed, 23))  # type: ignore[arg-type]
    with clock.stage("analysis"):
        production = recorder.history("production")
        adaptation = recorder.history("adaptation") if config.adaptation.rounds and config.proposal.kind == "learned" else None
        found, kept = analyse_paths(config, production, adaptation, restraint=engine.restraint), production.kept(config.production)
    evaluations = {"starts": spent_starts, "tuning": spent_tuning, **found.evaluations, "picture of a path": films.n_force}
    evaluations["total"] = sum(evaluations.values())
    results = _results(config, problem, settings, found, n_failed=int(kept.paths.failed.sum()), evaluations=evaluations, clock=clock)
    folder.write_npz("samples.npz", {"x": kept.x, "cycle": kept.x_cycle})
    folder.write_npz("paths.npz", kept.paths.arrays())
    folder.write_npz("looks.npz", kept.looks.arrays())
    folder.write_npz("visited.npz", {"xi": kept.visited})
    folder.write_npz(FILMS, films.arrays())
    folder.write_npz(WORKS, work_arrays({pair: (one.forward, one.reverse, one.crossing) for pair, one in found.works.items()}))
    build_paths_report(folder.path, config, results.to_dict(), production, adaptation, proposal=proposal)
    folder.finish(results)
    logger.info("%s; verdict: %s", found.estimates[0] if found.estimates else "no estimate", found.verdict.word)
    return results


def _results(
    config: PathsConfig,
    problem: PathProblem,
    settings: PathSettings,
    found: PathAnalysis,
    *,
    n_failed: int,
    evaluations: Mapping[str, int],
    clock: Clock,
) -> Results:
    return Results(
        task=config.task,
        estimates=found.estimates,
        diagnostics={
            **found.diagnostics,
            "path_steps": settings.schedule.n_steps, "bend": settings.schedule.bend,
            "widths": dict(zip(config.names, settings.widths, strict=True)),
            "failed_paths": n_failed, "energy_evaluations": dict(evaluations),
        },
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=found.verdict.word,
        provenance=provenance(config.seed, problem.engine.platform_name, sha256=_hashes(config, problem)),
        reasons=found.verdict.reasons,
        notes=(*found.notes, *problem.loaded.notes, *problem.engine.notes),
    )  # fmt: skip


def require_usable(config: PathsConfig) -> None:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted."""
    loaded = _load(config)
    variables = build_cvs(config.collective_variables, loaded, trust=config.trust_files)
    if config.proposal.kind == "fixed":
        require_same_circles(fixed_proposal(config, variables.periods), variables.periods)
    start_positions(config.walkers.files, loaded)


def open_problem(config: PathsConfig) -> PathProblem:
    """The system of a configuration, with its variables, on the fastest platform."""
    loaded = _load(config)
    variables = build_cvs(config.collective_variables, loaded, trust=config.trust_files)
    choice = PlatformChoice(**config.platform.model_dump())
    engine = OpenMMSteering.from_loaded(
        loaded, variables, temperature_kelvin=config.temperature_kelvin, widths=config.width_values,
        timestep_ps=parse_quantity(config.dynamics.timestep, "picosecond"),
        friction_per_ps=parse_quantity(config.dynamics.friction, "1/picosecond"), platform=choice, planar=config.dynamics.planar,
    )  # fmt: skip
    return PathProblem(loaded=loaded, variables=variables, engine=engine)


def make_sampler(
    config: PathsConfig, problem: PathProblem, engine: OpenMMSteering, walkers: PathWalkers, schedule: Schedule
) -> AdaptiveSampler:
    """The loop of a configuration, ready to start."""
    learner: FixedProposal | LearnedProposal
    if config.proposal.kind == "fixed":
        learner = FixedProposal(engine, fixed_proposal(config, problem.variables.periods), schedule=schedule)
    else:
        recipe = flow_recipe(config, problem.variables.periods)
        learner = LearnedProposal(
            engine, recipe, broad=broad_proposal(config), defensive=config.proposal.defensive, schedule=schedule
        )  # fmt: skip
    local = FreePaths(engine, n_steps=config.local.steps, metropolised=config.local.kind == "metropolised")
    plan = Plan(
        n_local=config.local.per_cycle, n_rounds=config.adaptation.rounds if config.proposal.kind == "learned" else 0,
        n_cycles=config.adaptation.cycles, n_production=config.production.cycles,
    )  # fmt: skip
    return AdaptiveSampler(local, learner, plan=plan, state=walkers, generator=stream(config.seed, 20))


def _load(config: PathsConfig) -> LoadedSystem:
    loaded = load(config.topology, config.system, state=config.state, coordinates=config.coordinates, trust=config.trust_files)
    return with_parameters(loaded, config.parameters)


def _starts(config: PathsConfig, problem: PathProblem, folder: RunFolder, *, fingerprint: str) -> tuple[PathWalkers, int]:
    """Equilibrated walkers, from the run folder where they are there already, and the force evaluations they cost."""
    engine, w = problem.engine, config.walkers

    def make() -> dict[str, np.ndarray]:
        generator, spent = stream(config.seed, 21), 0
        state = engine.locate(torch.from_numpy(in_turn(start_positions(w.files, problem.loaded), w.count)))
        local = FreePaths(engine, n_steps=config.local.steps)
        if w.pulled_to:
            goals = torch.tensor([[limit(goal[n])[0] for n in config.names] for goal in w.pulled_to], dtype=torch.float64)
            end = goals[torch.arange(w.count) % len(goals)]
            pulled = engine.steer(state, state.xi, end, schedule=Schedule(w.pull_steps), generator=generator)
            if pulled.failures:
                raise InputError(f"pulling a walker to walkers.pulled_to failed ({next(iter(pulled.failures.values()))}): raise "
                                 "walkers.pull_steps, or shorten dynamics.timestep")  # fmt: skip
            state, spent = engine.locate(pulled.x), spent + int(pulled.n_force.sum())
        advice = "shorten dynamics.timestep or local.steps"
        located, infos = equilibrated(local, state, n_moves=w.equilibration, generator=generator, advice=advice)
        spent += sum(int(info.result.n_force.sum()) for info in infos if isinstance(info, PathInfo))
        return {"x": located.x.numpy(), "n_force": np.array(spent)}

    found = stored_starts(folder, fingerprint=fingerprint, make=make)
    return engine.locate(torch.from_numpy(found["x"])), int(found["n_force"])


def _tuned(config: PathsConfig, problem: PathProblem, walkers: PathWalkers, folder: RunFolder) -> tuple[PathSettings, int]:
    """How paths are run, from pilot paths where asked, and the force evaluations these cost."""
    p, widths = config.paths, config.width_values
    scales = tuple(high - low for low, high in config.limits)
    start = PathSettings(schedule=Schedule(p.steps, bend=p.bend, span=_span(config) if p.proportional else None), widths=widths)
    path = folder.path / "pilot.json"
    if not p.tune:
        return start, 0
    if not path.exists():
        proposal = _pilot_proposal(config, problem, walkers)
        tried = tuned_paths(
            lambda widths: problem.engine.with_settings(widths=widths), walkers, proposal, start=start, scales=scales,
            n_paths=p.pilot_paths, generator=stream(config.seed, 22),
        )  # fmt: skip
        rows = [
            {"steps": t.settings.schedule.n_steps, "bend": t.settings.schedule.bend, "widths": list(t.settings.widths),
             "acceptance": t.acceptance, "score": t.score, "n_force": t.n_force} for t in tried
        ]  # fmt: skip
        folder.write_json("pilot.json", rows)
        logger.info("pilot paths: %d steps, bend %g, acceptance %.2f", rows[0]["steps"], rows[0]["bend"], rows[0]["acceptance"])
    rows = json.loads(path.read_text())
    best = rows[0]
    chosen = PathSettings(Schedule(best["steps"], bend=best["bend"], span=start.schedule.span), tuple(best["widths"]))
    return chosen, sum(row["n_force"] for row in rows)


def _span(config: PathsConfig) -> tuple[float, ...]:
    """The way for which a path takes all its steps: between basins that walkers are pulled to, or half the range."""
    limits = config.limits
    goals = [[limit(goal[n])[0] for n in config.names] for goal in config.walkers.pulled_to]
    halves = [0.5 * (high - low) for low, high in limits]
    if len(goals) < 2:
        return tuple(halves)
    turns = np.array([period or math.inf for period in config.periods])
    apart = np.abs(np.array(goals)[:, None] - np.array(goals)) % turns
    ways = np.minimum(apart, turns - apart).max(axis=(0, 1))
    return tuple(float(way) if way > 0.1 * half else half for way, half in zip(ways, halves, strict=True))


def _pilot_proposal(config: PathsConfig, problem: PathProblem, walkers: PathWalkers) -> Distribution:
    """Peaks about the values of the walkers, beside the whole range: where a learned density will roughly be."""
    if config.proposal.kind == "fixed":
        return fixed_proposal(config, problem.variables.periods)
    wide = 3 * torch.tensor(config.width_values, dtype=torch.float64).expand_as(walkers.xi)
    return Mixture([NormalMixture(walkers.xi, wide, periods=problem.variables.periods), broad_proposal(config)], [0.9, 0.1])


def _hashes(config: PathsConfig, problem: PathProblem) -> dict[str, str]:
    starts = {f"start {i} {path.name}": file_hash(path) for i, path in enumerate(config.walkers.files)}
    return {**problem.loaded.sha256, **variable_hashes(config.collective_variables), **starts}


def _fingerprint(config: PathsConfig, problem: PathProblem) -> str:
    """Hash of whatever a checkpoint depends on."""
    inputs = sorted(_hashes(config, problem).items())
    return fingerprint_of({"inputs": inputs, "settings": trained_by(config), "columns": list(config.names)})
