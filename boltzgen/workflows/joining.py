"""Two ensembles and the map that joins them: what files and plug-ins share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boltzgen.config import Joining, WorkEvaluationConfig
from boltzgen.config.tfep import LOOKED_AT, LOOKS
from boltzgen.core import Bridge, Target, Transform
from boltzgen.errors import InputError, SolverError
from boltzgen.md.checks import require_free, require_unconstrained, share_constraints
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import Trajectory, split_blocks
from boltzgen.recipes import StateMap
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.targeted import EndState, TargetedPerturbation
from boltzgen.transforms.continuous import MOST_REFINED, ContinuousTransform, FixedStep, measure_work_error, more_steps
from boltzgen.transforms.domains import MAX_OTHER_SECTOR
from boltzgen.transforms.one_to_one import OneToOne
from boltzgen.workflows.ensemble_matching import match_ensembles
from boltzgen.workflows.seeds import stream
from boltzgen.workflows.tfep_maps import mapped_atoms

logger = logging.getLogger(__name__)

#: Share of the frames at which a map need not be one to one: their works are +inf, which costs a little precision only.
MAX_LEFT_OUT = 0.02


@dataclass(frozen=True)
class Ensemble:
    """A state and its data.

    Attributes:
        name: What messages call it.
        target: Its reduced potential; +inf outside its basin, where it has one.
        trajectory: All frames.
        training: Frames that the map may learn from.
        held_out: Frames that trained nothing.
        n_outside: Frames that were left out, outside the sector of the map's coordinates.
        walled: The reduced potential with walls around its basin, finite everywhere, for training; None without a basin.
    """

    name: str
    target: Target
    trajectory: Trajectory
    training: Trajectory
    held_out: Trajectory
    n_outside: int = 0
    walled: OpenMMTarget | None = None

    @classmethod
    def of(
        cls, name: str, target: Target, trajectory: Trajectory, *, evaluate_fraction: float, walled: OpenMMTarget | None = None
    ) -> Ensemble:
        """All frames of a state, with the last blocks of every chain held out."""
        training, held_out = split_blocks(trajectory, evaluate_fraction=evaluate_fraction, decorrelated=False)
        return cls(name, target, trajectory, training, held_out, walled=walled)

    def exchanged(self) -> Ensemble:
        """The same frames with the first half of every chain held out, and the second to train on."""
        training, held_out = split_blocks(self.trajectory, evaluate_fraction=0.5, decorrelated=False, evaluate_first=True)
        return replace(self, training=training, held_out=held_out)

    def in_sector(self, sector: Transform, atoms: Tensor | None) -> Ensemble:
        """The frames that a map's coordinates can describe: all but those of hydrogens that swung past their neighbours."""

        def kept(part: Trajectory) -> Trajectory:
            with torch.no_grad():
                x = torch.as_tensor(part.x, dtype=torch.float64)
                _, log_det = sector.inverse(x if atoms is None else x[:, atoms])
            return part.rows(torch.isfinite(log_det).numpy())

        trajectory = kept(self.trajectory)
        n = self.n_outside + len(self.trajectory) - len(trajectory)
        return replace(self, trajectory=trajectory, training=kept(self.training), held_out=kept(self.held_out), n_outside=n)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence where many frames were left out."""
        share = self.n_outside / (len(self.trajectory) + self.n_outside)
        if share <= MAX_OTHER_SECTOR:
            return ()
        return (f"state {self.name}: {share:.2%} of the frames have another handedness or labelling and were left out",)


def require_joinable(settings: Joining, ends: Sequence[LoadedSystem]) -> None:
    """Refuse two states that a map cannot join.

    Raises:
        InputError: If they constrain different bonds, the map is to depend on surroundings that are not there, or a continuous map meets a
            periodic box or several molecules.
        TopologyError: If the map would move a constrained atom.
    """
    a, b = ends
    if not share_constraints(a.system, b.system):
        raise InputError(
            "the two states constrain different bonds, or the same to other lengths, so that no configuration belongs to both: make both "
            "systems with the same constraints"
        )
    if settings.map.kind == "continuous":
        _require_one_free_molecule(ends)
    if settings.map.kind != "identity":
        for loaded in ends:
            if loaded.is_one_molecule and settings.map.surroundings:
                raise InputError(
                    "map.surroundings: the topology is one molecule, which has nothing around it: leave it out, or give one with solvent"
                )
            if loaded.is_one_molecule:
                require_unconstrained(loaded)
            else:
                require_free(loaded, mapped_atoms(settings, loaded))


def _require_one_free_molecule(ends: Sequence[LoadedSystem]) -> None:
    for loaded in ends:
        if loaded.box is not None:
            raise InputError(
                "map.kind continuous moves atoms of one molecule without a box, and this system is periodic: make both systems without "
                "periodic boundaries (NoCutoff), or choose map.kind coupling, which maps one molecule in its solvent"
            )
        if not loaded.is_one_molecule:
            raise InputError(
                f"map.kind continuous moves all atoms of one molecule, and the topology has {len(loaded.parts)}: choose map.kind "
                "coupling, which maps one and carries the others"
            )


def train_map(
    settings: Joining,
    ends: Sequence[Ensemble],
    pieces: StateMap,
    *,
    store: CheckpointStore | None = None,
    keep: Callable[[int, Any], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> list[Mapping[str, object]]:
    """Train a map between two ensembles in place.

    Args:
        settings: How.
        ends: A and B.
        pieces: The map.
        store: Where checkpoints are written and looked for.
        keep: Called ten times during training with the step and the averaged map.
        should_stop: Asked after every step.
        progress: Whether to show a progress bar.

    Returns:
        Rows of numbers to be logged; none if there is nothing to train.
    """
    matched = list[Mapping[str, object]]()
    if settings.map.kind == "continuous" and settings.training.matching.steps:
        frames = [torch.as_tensor(end.training.x, dtype=torch.float64) for end in ends]
        matched = match_ensembles(settings, frames, pieces.learned, store=store, should_stop=should_stop, progress=progress)
    if not settings.map.is_learned or not settings.training.steps:
        return matched
    training = settings.training
    states = []
    for end, fixed in zip(ends, (pieces.fixed_a, pieces.fixed_b), strict=True):
        with torch.no_grad():
            y, _ = fixed.inverse(torch.as_tensor(end.training.x, dtype=torch.float64))
        states.append(EndState.of(PulledBack(end.walled or end.target, fixed, event_shape=tuple(y.shape[1:])), y.to(torch.float32)))
    objective = TargetedPerturbation(
        states[0], states[1], batch_size=training.batch_size, forward_weight=training.forward_weight,
        reverse_weight=training.reverse_weight, outlier_limit=training.outlier_limit,
    )  # fmt: skip
    rows = [np.linspace(0, len(end.held_out) - 1, min(LOOKED_AT, len(end.held_out))).astype(int) for end in ends]
    few = [torch.as_tensor(end.held_out.x[chosen], dtype=torch.float64) for end, chosen in zip(ends, rows, strict=True)]

    def look(learned: Transform) -> Mapping[str, float]:
        bridge, (x, y) = Bridge(ends[0].target, ends[1].target, pieces.reported(learned)), few
        with torch.no_grad():
            return {"upper_bound": float(bridge.works(x).mean()), "lower_bound": -float(bridge.reverse_works(y).mean())}

    result = fit(
        pieces.learned, objective, generator=stream(settings.seed, 4), held_out=look, keep=keep, should_stop=should_stop, label="map",
        progress=progress, store=store,
        settings=FitSettings(
            steps=training.steps, learning_rate=training.learning_rate, gradient_clip=training.gradient_clip, ema_decay=training.ema_decay,
            checkpoint_every=training.checkpoint_every, evaluate_every=max(1, training.steps // LOOKS),
        ),
    )  # fmt: skip
    logger.info("map: %d steps, %d skipped", result.steps, result.skipped)
    return [*matched, *({"stage": "map", **row} for row in result.history)]


def exact_enough(settings: Joining, ends: Sequence[Ensemble], transforms: Sequence[Transform]) -> list[Transform]:
    """The maps with as many solver steps as their works ask for, their error measured on held-out frames; others as they are.

    Raises:
        SolverError: If no number of steps up to eight times those asked for is enough.
    """
    solved = ContinuousTransform, OneToOne
    return [_exact_enough(settings.evaluation, ends, one) if isinstance(one, solved) else one for one in transforms]


def _exact_enough(evaluation: WorkEvaluationConfig, ends: Sequence[Ensemble], transform: ContinuousTransform | OneToOne) -> Transform:
    rows = [torch.as_tensor(end.held_out.x[:: max(1, len(end.held_out) // LOOKED_AT)], dtype=torch.float64) for end in ends]
    steps, most = evaluation.solver_steps, MOST_REFINED * evaluation.solver_steps
    while True:
        made = transform.with_solver(FixedStep(steps))
        left_out = _left_out(made, rows)
        error = measure_work_error(Bridge(ends[0].target, ends[1].target, made), *rows) if left_out <= MAX_LEFT_OUT else math.inf
        logger.info("works are known to %.1e nats with %d solver steps, %.2g of the frames have none", error, steps, left_out)
        if error <= evaluation.log_det_error:
            return made
        if steps == most:
            what = f"{left_out:.1%} of the frames have no work" if left_out > MAX_LEFT_OUT else f"works are known to {error:.2g} nats only"
            raise SolverError(
                f"with {steps} solver steps {what}, above evaluation.log_det_error: take more evaluation.solver_steps and --resume "
                "(training is kept), or train with more training.solver_steps"
            )
        steps = min(more_steps(steps, error / evaluation.log_det_error), most)


@torch.no_grad()
def _left_out(transform: Transform, rows: Sequence[Tensor]) -> float:
    """Share of configurations of A and B at which a map is not one to one, the larger one; zero for all maps but those of steps."""
    if not isinstance(transform, OneToOne):
        return 0.0
    found = (way(x)[1] for way, x in zip((transform.forward, transform.inverse), rows, strict=True))
    return max(1.0 - float(torch.isfinite(log_det).double().mean()) for log_det in found)
