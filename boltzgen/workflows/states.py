"""For openmmtools users: free energy differences of two or more thermodynamic states from samples of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from boltzgen.config import Joining
from boltzgen.core import Chain, Transform
from boltzgen.errors import EnergyError, InputError
from boltzgen.md.loading import LoadedSystem, load_state, positions_of
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import of_frames
from boltzgen.workflows.folds import make_folds
from boltzgen.workflows.joining import Ensemble, exact_enough, require_joinable, train_map
from boltzgen.workflows.multistate_analysis import MultistateAnalysis, analyse_states
from boltzgen.workflows.tfep_analysis import WorkAnalysis, analyse_works
from boltzgen.workflows.tfep_maps import make_map


def join_states(
    a: Any,
    b: Any,
    *,
    samples_a: Sequence[Any] | np.ndarray,
    samples_b: Sequence[Any] | np.ndarray,
    topology: Any,
    settings: Joining | None = None,
    evaluate_fraction: float = 0.5,
    progress: bool = True,
) -> WorkAnalysis:
    """F_B − F_A of two openmmtools ``ThermodynamicState`` objects, by a map learned from samples of both.

    The first half of the samples trains the map, the second gives the estimate, beside plain perturbation with all of them: what
    ``boltzgen tfep`` does with files. Energies are computed by OpenMM; nothing is simulated and nothing is written.

    Args:
        a: State A.
        b: State B, of the same atoms.
        samples_a: Samples of A in the order of time: openmmtools ``SamplerState`` objects, or configurations ``[n, atoms, 3]`` in nm.
        samples_b: Samples of B likewise.
        topology: OpenMM topology with the bonds.
        settings: Map, training and evaluation.
        evaluate_fraction: Share of the samples, in whole time blocks, that the map never sees.
        progress: Whether to show progress bars.

    Returns:
        Estimates in kT, the first of them F_B − F_A, diagnostics, and the verdict.

    Raises:
        InputError, TopologyError: If the states have different atoms or constraints, or the samples do not fit.
        EnergyError: If a sample has no finite energy.
    """
    settings = settings or Joining()
    if settings.training.cross_fitting and evaluate_fraction != 0.5:
        raise InputError(f"training.cross_fitting takes halves: leave evaluate_fraction at 0.5, not {evaluate_fraction}")
    given = [("a", a, samples_a), ("b", b, samples_b)]
    made = [_ensemble(name, state, some, topology=topology, evaluate_fraction=evaluate_fraction) for name, state, some in given]
    loaded, ends = [one for one, _ in made], [end for _, end in made]
    require_joinable(settings, loaded)
    judged, warnings = [], list[str]()
    for fold in make_folds(settings, loaded, ends, box=ends[0].target.box):
        fold.train(settings, progress=progress)
        judged.append(fold.judged(settings, [fold.transform]))
        warnings += [warning for end in fold.ends for warning in end.warnings]
    return analyse_works(settings, judged, warnings=tuple(dict.fromkeys(warnings)))


def join_many_states(
    states: Sequence[Any],
    *,
    samples: Sequence[Sequence[Any] | np.ndarray],
    topology: Any,
    settings: Joining | None = None,
    evaluate_fraction: float = 0.5,
    progress: bool = True,
) -> MultistateAnalysis:
    """F_k − F_0 of several openmmtools ``ThermodynamicState`` objects, by a map learned from the first state to each other one.

    The first half of the samples of each state trains the maps, the second is pulled back to the first state and gives all
    differences at once by MBAR (:mod:`boltzgen.estimators.multistate`), beside MBAR without maps of all samples. K maps of N samples cost
    K² N energies. Nothing is simulated and nothing is written.

    Args:
        states: The states, of the same atoms; the first is the one that others are mapped from.
        samples: For every state, its samples in the order of time, as for :func:`join_states`.
        topology: OpenMM topology with the bonds.
        settings: Maps, training and evaluation.
        evaluate_fraction: Share of the samples, in whole time blocks, that the maps never see.
        progress: Whether to show progress bars.

    Returns:
        Estimates in kT, all free energies with their covariance, diagnostics, and the verdict.

    Raises:
        InputError, TopologyError: If the states have different atoms or constraints, or the samples do not fit.
        EnergyError: If a sample has no finite energy.
        NoOverlapError: If the maps leave states without any overlap.
    """
    settings = settings or Joining()
    if len(states) != len(samples) or len(states) < 2:
        raise InputError(f"expected samples of each of two or more states, got {len(states)} states and samples of {len(samples)}")
    if settings.training.cross_fitting:
        raise InputError("training.cross_fitting is for two states: join_states takes it; leave it out here")
    if settings.map.kind == "continuous":
        raise InputError("map.kind continuous joins two states, by join_states; take coupling, low_rank or affine for several")
    given = zip(map(str, range(len(states))), states, samples, strict=True)
    made = [_ensemble(name, state, some, topology=topology, evaluate_fraction=evaluate_fraction) for name, state, some in given]
    loaded, ends = [one for one, _ in made], [end for _, end in made]
    for one in loaded[1:]:
        require_joinable(settings, [loaded[0], one])
    if settings.map.kind == "identity":
        return analyse_states(settings, ends, [Chain()] * len(ends), warnings=())
    first = (loaded[0], ends[0].training)
    pieces = [
        make_map(settings, [first, (one, end.training)], box=ends[0].target.box, targets=[ends[0].target, end.target])
        for one, end in zip(loaded[1:], ends[1:], strict=True)
    ]
    for k, piece in enumerate(pieces, start=1):
        ends[0], ends[k] = ends[0].in_sector(piece.sector_a, piece.atoms), ends[k].in_sector(piece.sector_b, piece.atoms)
    transforms: list[Transform] = [Chain()]
    for piece, end in zip(pieces, ends[1:], strict=True):
        train_map(settings, [ends[0], end], piece, progress=progress)
        transforms += exact_enough(settings, [ends[0], end], [piece.transform])
    warnings = tuple(warning for end in ends for warning in end.warnings)
    return analyse_states(settings, ends, transforms, warnings=warnings)


def _ensemble(
    name: str, state: Any, samples: Sequence[Any] | np.ndarray, *, topology: Any, evaluate_fraction: float
) -> tuple[LoadedSystem, Ensemble]:
    """A thermodynamic state and its samples, checked.

    Raises:
        InputError: If the samples do not fit.
        EnergyError: If one has no finite energy.
    """
    x = positions_of(samples)
    loaded, kelvin = load_state(state, topology, x[0])
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=kelvin)
    with torch.no_grad():
        u = target.reduced_potential(torch.from_numpy(x)).numpy()
    bad = np.flatnonzero(~np.isfinite(u))
    if len(bad):
        raise EnergyError(
            f"sample {bad[0]} of state {name} has the energy {u[bad[0]]}; expected a finite one: is it a sample of this state?"
        )
    trajectory = of_frames([x], [u], topology=topology, temperature_kelvin=kelvin)
    return loaded, Ensemble.of(name, target, trajectory, evaluate_fraction=evaluate_fraction)
