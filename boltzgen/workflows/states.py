"""For openmmtools users: the free energy difference of two thermodynamic states from samples of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from boltzgen.config import Joining
from boltzgen.core import Chain
from boltzgen.errors import EnergyError
from boltzgen.md.loading import load_state, positions_of
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import of_frames
from boltzgen.workflows.joining import Ensemble, exact_enough, require_joinable, train_map
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
    loaded, ends = [], []
    for name, state, samples in (("a", a, samples_a), ("b", b, samples_b)):
        x = positions_of(samples)
        one, kelvin = load_state(state, topology, x[0])
        target = OpenMMTarget.from_loaded(one, temperature_kelvin=kelvin)
        with torch.no_grad():
            u = target.reduced_potential(torch.from_numpy(x)).numpy()
        bad = np.flatnonzero(~np.isfinite(u))
        if len(bad):
            raise EnergyError(
                f"sample {bad[0]} of state {name} has the energy {u[bad[0]]}; expected a finite one: is it a sample of this state?"
            )
        trajectory = of_frames([x], [u], topology=topology, temperature_kelvin=kelvin)
        loaded.append(one)
        ends.append(Ensemble.of(name, target, trajectory, evaluate_fraction=evaluate_fraction))
    require_joinable(settings, loaded)
    if settings.map.kind == "identity":
        return analyse_works(settings, (ends[0], ends[1]), [Chain()], warnings=())
    known = [(one, end.training) for one, end in zip(loaded, ends, strict=True)]
    pieces = make_map(settings, known, box=ends[0].target.box, targets=[end.target for end in ends])
    ends = [end.in_sector(sector, pieces.atoms) for end, sector in zip(ends, (pieces.sector_a, pieces.sector_b), strict=True)]
    train_map(settings, ends, pieces, progress=progress)
    warnings = tuple(warning for end in ends for warning in end.warnings)
    transforms = exact_enough(settings, ends, [pieces.transform])
    return analyse_works(settings, (ends[0], ends[1]), transforms, warnings=warnings)
