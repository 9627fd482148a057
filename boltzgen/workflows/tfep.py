"""The job of two states: data of both, a map between them, works of held-out configurations, their free energy difference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from boltzgen.config import TfepConfig, trained_by
from boltzgen.config.tfep import BASIN
from boltzgen.core import Transform
from boltzgen.training.checkpoints import CheckpointStore, save_weights
from boltzgen.workflows.basin import confined
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.data import collect, coverage_warnings
from boltzgen.workflows.folds import Fold, make_folds
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.joining import Ensemble, require_joinable
from boltzgen.workflows.molecule import Problem, begin, data_hashes, precision_notes
from boltzgen.workflows.molecule import require_usable as require_molecule
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of, provenance
from boltzgen.workflows.tfep_analysis import WorkAnalysis, analyse_works
from boltzgen.workflows.tfep_maps import of_epochs
from boltzgen.workflows.tfep_report import build_tfep_report

logger = logging.getLogger(__name__)

_EPOCHS = "maps"
_MEANING = "F_B - F_A is -ln(Z_B / Z_A) of configurations at fixed volume, each Z at its own temperature, without the kinetic part"
_BASIN = "states with a basin are confined to it: their Z is that of the basin"
_SECTOR = "it is that of one mirror image and one labelling of equivalent hydrogens, those of your data"


def run_tfep(config: TfepConfig, folder: RunFolder, *, progress: bool = True) -> Results:
    """Estimate the free energy difference of two states and write everything that a user needs of it.

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
        problems = [begin(config.end(name), folder.part(name)) for name in config.ENDS]
    with clock.stage("data"):
        raw = _data(config, problems, folder=folder, progress=progress)
        folds = make_folds(config.joining, [problem.loaded for problem in problems], raw, box=raw[0].target.box)
        ends = folds[-1].ends
    for end in ends:
        logger.info("state %s: %d frames to train on, %d held out", end.name, len(end.training), len(end.held_out))
    fingerprint, before, rows = _fingerprint(config, problems), _spent(problems, ends), list[Mapping[str, object]]()
    with clock.stage("training"), stop_on_signal() as should_stop:
        try:
            for fold in folds:
                rows += _train(config, fold, folder, fingerprint=fingerprint, should_stop=should_stop, progress=progress)
        finally:
            trained = folder.spent_in_training(_spent(problems, ends) - before)
    folder.write_text("training.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    before = _spent(problems, ends)
    with clock.stage("evaluation"):
        judged = [fold.judged(config.joining, _maps(config, fold, folder, fingerprint=fingerprint)) for fold in folds]
        found = analyse_works(config.joining, judged, warnings=_warnings(problems, folds))
    data = sum(end.trajectory.n_force_evaluations for end in ends)
    evaluations = {"data": data, "training": trained, "evaluation": _spent(problems, ends) - before}
    results = _results(config, problems, ends, found, clock=clock, evaluations=evaluations)
    folder.write_text("works.csv", found.works)
    build_tfep_report(folder.path, results.to_dict())
    folder.finish(results)
    logger.info("%s; verdict: %s", found.estimates[0], found.verdict.word)
    return results


def _train(
    config: TfepConfig, fold: Fold, folder: RunFolder, *, fingerprint: str, should_stop: Callable[[], bool], progress: bool
) -> list[Mapping[str, object]]:
    """Train the map of a fold, and store it and those of epochs on the way; rows of numbers to be logged."""

    def keep(step: int, learned: Transform) -> None:
        save_weights(learned, folder.part(f"{_EPOCHS}{fold.name}").path / f"step-{step:08d}.safetensors", fingerprint=fingerprint)

    store = CheckpointStore(folder.checkpoints / f"map{fold.name}", fingerprint=fingerprint)
    rows = fold.train(config.joining, store=store, keep=keep, should_stop=should_stop, progress=progress)
    if fold.pieces is not None:
        save_weights(fold.transform, folder.path / f"map{fold.name}.safetensors", fingerprint=fingerprint)
    return rows


def _maps(config: TfepConfig, fold: Fold, folder: RunFolder, *, fingerprint: str) -> Sequence[Transform]:
    """The maps of a fold whose works are taken together; the last one is the trained map."""
    epochs = folder.path / f"{_EPOCHS}{fold.name}"
    if fold.pieces is None or not epochs.exists():
        return [fold.transform]
    return of_epochs(fold.pieces, epochs, n=config.evaluation.maps, fingerprint=fingerprint)


def require_usable(config: TfepConfig) -> None:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted.

    Raises:
        ConfigError, InputError, PlatformError, TopologyError: With what to do.
    """
    ends = [config.end(name) for name in config.ENDS]
    require_joinable(config.joining, [require_molecule(end) for end in ends])


def _data(config: TfepConfig, problems: Sequence[Problem], *, folder: RunFolder, progress: bool) -> list[Ensemble]:
    require_joinable(config.joining, [problem.loaded for problem in problems])
    ends = []
    for name, problem in zip(config.ENDS, problems, strict=True):
        logger.info("state %s", name)
        end = config.end(name)
        state = confined(end, problem) if BASIN in end.basins else None
        loaded, target = (problem.loaded, problem.target) if state is None else (state.loaded, state.walled)
        trajectory = collect(end, loaded, folder=folder.part(name), target=target, progress=progress)
        if state is not None:
            trajectory, target = state.inside(trajectory), state.target
        walled = None if state is None else state.walled
        ends.append(Ensemble.of(name, target, trajectory, evaluate_fraction=config.data.evaluate_fraction, walled=walled))
    return ends


def _warnings(problems: Sequence[Problem], folds: Sequence[Fold]) -> tuple[str, ...]:
    """What hotter data saw and the data of a state did not, and frames that were left out by any fold."""
    found = []
    for problem, end in zip(problems, folds[-1].ends, strict=True):
        torsions = {v.name: v.atoms for v in problem.variables if len(v.atoms) == 4}
        found += [f"state {end.name}: {warning}" for warning in coverage_warnings(end.trajectory, torsions=torsions)]
    found += [warning for fold in folds for end in fold.ends for warning in end.warnings]
    return tuple(dict.fromkeys(found))


def _results(
    config: TfepConfig,
    problems: Sequence[Problem],
    ends: Sequence[Ensemble],
    found: WorkAnalysis,
    *,
    clock: Clock,
    evaluations: Mapping[str, int],
) -> Results:
    platform = problems[0].openmm_target.platform_name
    hashes: dict[str, str] = {}
    for name, problem in zip(TfepConfig.ENDS, problems, strict=True):
        hashes |= {f"{name}: {file}": digest for file, digest in (problem.loaded.sha256 | data_hashes(config.end(name))).items()}
    notes = [note for problem, end in zip(problems, ends, strict=True) for note in (*problem.loaded.notes, *end.trajectory.notes)]
    return Results(
        task=config.task,
        estimates=found.estimates,
        diagnostics={
            **found.diagnostics,
            "left_out": {end.name: end.n_outside for end in ends},
            "energy_evaluations": dict(evaluations),
        },
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=found.verdict.word,
        provenance=provenance(config.seed, platform, sha256=hashes),
        reasons=found.verdict.reasons,
        notes=(
            _MEANING,
            *((_BASIN,) if any(end.walled is not None for end in ends) else ()),
            *((_SECTOR,) if config.map.is_of_a_molecule else ()),
            *dict.fromkeys(notes),
            *precision_notes(platform),
        ),
    )


def _spent(problems: Sequence[Problem], ends: Sequence[Ensemble]) -> int:
    """Energies computed so far for both states, with walls and without."""
    walled = (end.walled for end in ends)
    return sum(target.n_evaluations for target in (*(problem.openmm_target for problem in problems), *walled) if target is not None)


def _fingerprint(config: TfepConfig, problems: Sequence[Problem]) -> str:
    """Hash of whatever a checkpoint depends on."""
    return fingerprint_of({"inputs": [sorted(problem.loaded.sha256.values()) for problem in problems], "settings": trained_by(config)})
