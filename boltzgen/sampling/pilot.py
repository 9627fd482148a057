"""Pilot paths: which length, width and pace of steered paths moves the variables farthest for the force evaluations they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from boltzgen.core import Distribution
from boltzgen.paths import PathWalkers, Schedule, SteeringEngine
from boltzgen.sampling.steered import SteeredMove

#: Factors of the steps and of the widths that are tried in turn, and the bends.
STEPS, WIDTHS, BENDS = (0.5, 1.0, 2.0), (0.7, 1.0, 1.4), (-0.5, 0.0, 0.5)


@dataclass(frozen=True)
class PathSettings:
    """What a pilot chooses: the schedule of the centre, and the width of the restraint of every variable."""

    schedule: Schedule
    widths: tuple[float, ...]


@dataclass(frozen=True)
class PilotScore:
    """What pilot paths of one setting gave.

    Attributes:
        settings: The setting.
        acceptance: Mean of min(1, e^{−w}).
        score: Mean of min(1, e^{−w}) |λ₁ − λ₀|² per force evaluation, distances in units of the scales: the expected squared jump.
        n_force: Force evaluations spent.
    """

    settings: PathSettings
    acceptance: float
    score: float
    n_force: int


def tuned_paths(
    engine_of: Callable[[tuple[float, ...]], SteeringEngine],
    walkers: PathWalkers,
    proposal: Distribution,
    *,
    start: PathSettings,
    scales: Sequence[float],
    n_paths: int,
    generator: torch.Generator,
) -> list[PilotScore]:
    """Try lengths, then widths, then bends, each about the best so far; the walkers stay where they are.

    The widths need no other proposal: any is exact.

    Args:
        engine_of: The engine for given widths.
        walkers: Walkers in the basins of interest.
        proposal: Where values come from.
        start: The setting to begin with.
        scales: Length of every variable.
        n_paths: Paths of every walker and setting.
        generator: Random numbers.

    Returns:
        What was tried, the best first.
    """

    def judged(settings: PathSettings) -> PilotScore:
        return _judged(engine_of(settings.widths), walkers, proposal, settings, scales=scales, n_paths=n_paths, generator=generator)

    best = judged(start)
    tried = [best]
    for variants in (_steps, _widths, _bends):
        for settings in variants(best.settings):
            tried.append(judged(settings))
        best = max(tried, key=lambda found: found.score)
    return sorted(tried, key=lambda found: -found.score)


def _steps(at: PathSettings) -> Iterable[PathSettings]:
    steps = [max(1, round(factor * at.schedule.n_steps)) for factor in STEPS if factor != 1]
    return [replace(at, schedule=replace(at.schedule, n_steps=n)) for n in steps]


def _widths(at: PathSettings) -> Iterable[PathSettings]:
    return [replace(at, widths=tuple(factor * width for width in at.widths)) for factor in WIDTHS if factor != 1]


def _bends(at: PathSettings) -> Iterable[PathSettings]:
    return [replace(at, schedule=replace(at.schedule, bend=bend)) for bend in BENDS if bend != at.schedule.bend]


def _judged(
    engine: SteeringEngine,
    walkers: PathWalkers,
    proposal: Distribution,
    settings: PathSettings,
    *,
    scales: Sequence[float],
    n_paths: int,
    generator: torch.Generator,
) -> PilotScore:
    move, lengths = SteeredMove(engine, proposal, schedule=settings.schedule), torch.tensor(list(scales), dtype=torch.float64)
    jumped = accepted = 0.0
    n_force = 0
    for _ in range(n_paths):
        _, info = move.step(walkers, generator=generator)
        probability = info.log_ratio.clamp(max=0.0).exp()
        distance = (engine.restraint.difference(info.end, info.start) / lengths).square().sum(1)
        jumped, accepted = jumped + float((probability * distance).sum()), accepted + float(probability.mean())
        n_force += int(info.result.n_force.sum())
    return PilotScore(settings=settings, acceptance=accepted / n_paths, score=jumped / n_force, n_force=n_force)
