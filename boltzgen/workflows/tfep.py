"""The job of two states: data of both, a map between them, works of held-out configurations, their free energy difference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from boltzgen.config import TfepConfig, trained_by
from boltzgen.config.tfep import LOOKED_AT, LOOKS
from boltzgen.core import Bridge, Chain, Inverse, Target, Transform
from boltzgen.errors import InputError
from boltzgen.md.checks import constraints_of, require_free, require_unconstrained
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.trajectory import Trajectory, split_blocks
from boltzgen.recipes import StateMap
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.training.checkpoints import CheckpointStore, save_weights
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.targeted import EndState, TargetedPerturbation
from boltzgen.transforms.domains import MAX_OTHER_SECTOR
from boltzgen.workflows.clock import Clock
from boltzgen.workflows.data import collect, coverage_warnings
from boltzgen.workflows.interrupts import stop_on_signal
from boltzgen.workflows.molecule import Problem, begin, data_hashes, precision_notes
from boltzgen.workflows.molecule import require_usable as require_molecule
from boltzgen.workflows.run_folder import Results, RunFolder, fingerprint_of, provenance
from boltzgen.workflows.seeds import stream
from boltzgen.workflows.tfep_analysis import Ensemble, WorkAnalysis, analyse_works
from boltzgen.workflows.tfep_maps import make_map, mapped_atoms, of_epochs
from boltzgen.workflows.tfep_report import build_tfep_report

logger = logging.getLogger(__name__)

_MAP, _EPOCHS = "map.safetensors", "maps"
_MEANING = "F_B - F_A is -ln(Z_B / Z_A) of configurations at fixed volume, each Z at its own temperature, without the kinetic part"
_SECTOR = "it is that of one mirror image and one labelling of equivalent hydrogens, those of your data"


@dataclass(frozen=True)
class _End:
    """A state with its data; ``n_outside`` frames outside the sector of the map's coordinates were left out of them."""

    problem: Problem
    trajectory: Trajectory
    training: Trajectory
    held_out: Trajectory
    n_outside: int = 0

    @property
    def target(self) -> Target:
        return self.problem.target

    @property
    def ensemble(self) -> Ensemble:
        return Ensemble(self.target, self.trajectory, self.held_out)


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
        ends = _data(config, problems, folder=folder, progress=progress)
        pieces = None
        if config.map.kind != "identity":
            pieces = make_map(config, [(end.problem.loaded, end.training) for end in ends], box=ends[0].target.box)
            ends = [_in_sector(end, sector, pieces.atoms) for end, sector in zip(ends, (pieces.sector_a, pieces.sector_b), strict=True)]
    for name, end in zip(config.ENDS, ends, strict=True):
        logger.info("state %s: %d frames to train on, %d held out", name, len(end.training), len(end.held_out))
    fingerprint, before, rows = _fingerprint(config, ends), _spent(ends), list[Mapping[str, object]]()
    with clock.stage("training"), stop_on_signal() as should_stop:
        try:
            if pieces is not None and config.map.kind in ("coupling", "radial") and config.training.steps:
                rows = _train(config, ends, pieces, folder=folder, fingerprint=fingerprint, should_stop=should_stop, progress=progress)
        finally:
            trained = folder.spent_in_training(_spent(ends) - before)
    folder.write_text("training.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    transform = Chain() if pieces is None else pieces.transform
    if pieces is not None:
        save_weights(transform, folder.path / _MAP, fingerprint=fingerprint)
    transforms = [transform]
    if pieces is not None and rows:
        transforms = of_epochs(pieces, folder.path / _EPOCHS, n=config.evaluation.maps, fingerprint=fingerprint)
    before = _spent(ends)
    with clock.stage("evaluation"):
        found = analyse_works(config, (ends[0].ensemble, ends[1].ensemble), transforms, warnings=_warnings(ends))
    data = sum(end.trajectory.n_force_evaluations for end in ends)
    evaluations = {"data": data, "training": trained, "evaluation": _spent(ends) - before}
    results = _results(config, ends, found, clock=clock, evaluations=evaluations)
    folder.write_text("works.csv", found.works)
    build_tfep_report(folder.path, results.to_dict())
    folder.finish(results)
    logger.info("%s; verdict: %s", found.estimates[0], found.verdict.word)
    return results


def require_usable(config: TfepConfig) -> None:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted.

    Raises:
        ConfigError, InputError, PlatformError, TopologyError: With what to do.
    """
    ends = [config.end(name) for name in config.ENDS]
    require_joinable(config, [require_molecule(end) for end in ends])


def require_joinable(config: TfepConfig, ends: Sequence[LoadedSystem]) -> None:
    """Refuse two states that a map cannot join.

    Raises:
        InputError: If they constrain different bonds, or bonds that the map would move.
    """
    a, b = (sorted(constraints_of(loaded.system)) for loaded in ends)
    if len(a) != len(b) or not np.allclose(np.array(a), np.array(b), rtol=0, atol=1e-6):
        raise InputError(
            "the two states constrain different bonds, or the same to other lengths, so that no configuration belongs to both: make both "
            "systems with the same constraints"
        )
    if config.map.kind != "identity":
        for loaded in ends:
            if loaded.is_one_molecule:
                require_unconstrained(loaded)
            else:
                require_free(loaded, mapped_atoms(config, loaded))


def _data(config: TfepConfig, problems: Sequence[Problem], *, folder: RunFolder, progress: bool) -> list[_End]:
    require_joinable(config, [problem.loaded for problem in problems])
    ends = []
    for name, problem in zip(config.ENDS, problems, strict=True):
        logger.info("state %s", name)
        trajectory = collect(config.end(name), problem.loaded, folder=folder.part(name), target=problem.target, progress=progress)
        training, held_out = split_blocks(trajectory, evaluate_fraction=config.data.evaluate_fraction, decorrelated=False)
        ends.append(_End(problem, trajectory, training, held_out))
    return ends


def _in_sector(end: _End, sector: Transform, atoms: Tensor | None) -> _End:
    """The frames that the internal coordinates can describe: all but those of hydrogens that swung past their neighbours."""

    def kept(part: Trajectory) -> Trajectory:
        with torch.no_grad():
            x = torch.as_tensor(part.x, dtype=torch.float64)
            _, log_det = sector.inverse(x if atoms is None else x[:, atoms])
        return part.rows(torch.isfinite(log_det).numpy())

    trajectory = kept(end.trajectory)
    n = len(end.trajectory) - len(trajectory)
    return replace(end, trajectory=trajectory, training=kept(end.training), held_out=kept(end.held_out), n_outside=n)


def _train(
    config: TfepConfig,
    ends: Sequence[_End],
    pieces: StateMap,
    *,
    folder: RunFolder,
    fingerprint: str,
    should_stop: Callable[[], bool],
    progress: bool,
) -> list[Mapping[str, object]]:
    """Train the map in place; rows of numbers to be logged."""
    settings = config.training
    states = []
    for end, fixed in zip(ends, (pieces.fixed_a, pieces.fixed_b), strict=True):
        with torch.no_grad():
            y, _ = fixed.inverse(torch.as_tensor(end.training.x, dtype=torch.float64))
        states.append(EndState.of(PulledBack(end.target, fixed, event_shape=tuple(y.shape[1:])), y.to(torch.float32)))
    objective = TargetedPerturbation(
        states[0], states[1], batch_size=settings.batch_size, forward_weight=settings.forward_weight,
        reverse_weight=settings.reverse_weight, outlier_limit=settings.outlier_limit,
    )  # fmt: skip
    rows = [np.linspace(0, len(end.held_out) - 1, min(LOOKED_AT, len(end.held_out))).astype(int) for end in ends]
    few = [torch.as_tensor(end.held_out.x[chosen], dtype=torch.float64) for end, chosen in zip(ends, rows, strict=True)]

    def look(learned: Transform) -> Mapping[str, float]:
        whole = Chain(Inverse(pieces.fixed_a), learned, pieces.fixed_b)
        bridge, (x, y) = Bridge(ends[0].target, ends[1].target, whole), few
        with torch.no_grad():
            return {"upper_bound": float(bridge.works(x).mean()), "lower_bound": -float(bridge.reverse_works(y).mean())}

    def keep(step: int, learned: Transform) -> None:
        save_weights(learned, folder.part(_EPOCHS).path / f"step-{step:08d}.safetensors", fingerprint=fingerprint)

    result = fit(
        pieces.learned, objective, generator=stream(config.seed, 4), held_out=look, keep=keep, should_stop=should_stop, label="map",
        progress=progress,
        store=CheckpointStore(folder.checkpoints / "map", fingerprint=fingerprint),
        settings=FitSettings(
            steps=settings.steps, learning_rate=settings.learning_rate, gradient_clip=settings.gradient_clip, ema_decay=settings.ema_decay,
            checkpoint_every=settings.checkpoint_every, evaluate_every=max(1, settings.steps // LOOKS),
        ),
    )  # fmt: skip
    logger.info("map: %d steps, %d skipped", result.steps, result.skipped)
    return [{"stage": "map", **row} for row in result.history]


def _warnings(ends: Sequence[_End]) -> tuple[str, ...]:
    """What hotter data saw and the data of a state did not."""
    found = []
    for name, end in zip(TfepConfig.ENDS, ends, strict=True):
        torsions = {v.name: v.atoms for v in end.problem.variables if len(v.atoms) == 4}
        found += [f"state {name}: {warning}" for warning in coverage_warnings(end.trajectory, torsions=torsions)]
        share = end.n_outside / (len(end.trajectory) + end.n_outside)
        if share > MAX_OTHER_SECTOR:
            found.append(f"state {name}: {share:.2%} of the frames have another handedness or labelling and were left out")
    return tuple(found)


def _results(config: TfepConfig, ends: Sequence[_End], found: WorkAnalysis, *, clock: Clock, evaluations: Mapping[str, int]) -> Results:
    platform = ends[0].problem.openmm_target.platform_name
    hashes: dict[str, str] = {}
    for name, end in zip(TfepConfig.ENDS, ends, strict=True):
        hashes |= {f"{name}: {file}": digest for file, digest in (end.problem.loaded.sha256 | data_hashes(config.end(name))).items()}
    notes = [note for end in ends for note in (*end.problem.loaded.notes, *end.trajectory.notes)]
    return Results(
        task=config.task,
        estimates=found.estimates,
        diagnostics={
            **found.diagnostics,
            "left_out": {name: end.n_outside for name, end in zip(TfepConfig.ENDS, ends, strict=True)},
            "energy_evaluations": dict(evaluations),
        },
        wall_seconds={**clock.seconds, "total": sum(clock.seconds.values())},
        verdict=found.verdict.word,
        provenance=provenance(config.seed, platform, sha256=hashes),
        reasons=found.verdict.reasons,
        notes=(
            _MEANING,
            *((_SECTOR,) if config.map.kind in ("coupling", "affine") else ()),
            *dict.fromkeys(notes),
            *precision_notes(platform),
        ),
    )


def _spent(ends: Sequence[_End]) -> int:
    """Energies computed so far for both states."""
    return sum(end.problem.openmm_target.n_evaluations for end in ends)


def _fingerprint(config: TfepConfig, ends: Sequence[_End]) -> str:
    """Hash of whatever a checkpoint depends on."""
    return fingerprint_of({"inputs": [sorted(end.problem.loaded.sha256.values()) for end in ends], "settings": trained_by(config)})
