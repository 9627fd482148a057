"""Held-out configurations of several states in all of them, through maps to one space, and what they say of the free energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from boltzgen.config import Joining
from boltzgen.core import Chain, Estimate, Transform
from boltzgen.errors import NoOverlapError
from boltzgen.estimators.multistate import MultistateFreeEnergies, halves, multistate_free_energies, multistate_verdict
from boltzgen.estimators.state_potentials import StatePotentials
from boltzgen.estimators.verdict import Verdict
from boltzgen.md.trajectory import Trajectory
from boltzgen.targets.mapped_states import MappedStates
from boltzgen.workflows.joining import Ensemble

#: Rows of one call for energies.
_ENERGY_ROWS = 2000
#: Independent units of every state that halves of the data are compared from.
_COMPARED = 8


@dataclass(frozen=True)
class MultistateAnalysis:
    """What configurations of several states say.

    Attributes:
        estimates: F_k − F_0 in kT of every state but the first, by the maps; then the same without maps from all data, for comparison.
        free_energies: All free energies by the maps, with covariance and overlaps; ``between`` gives any difference.
        without_map: The same without maps, from all data; None where states do not overlap at all.
        diagnostics: Overlaps and effective numbers.
        verdict: What may be concluded.
    """

    estimates: tuple[Estimate, ...]
    free_energies: MultistateFreeEnergies
    without_map: MultistateFreeEnergies | None
    diagnostics: Mapping[str, Any]
    verdict: Verdict


def analyse_states(
    settings: Joining, states: Sequence[Ensemble], transforms: Sequence[Transform], *, warnings: tuple[str, ...]
) -> MultistateAnalysis:
    """Estimate the free energies with maps from held-out frames, and without from all frames, as those train nothing.

    Args:
        settings: Settings of the evaluation.
        states: The states.
        transforms: The map from the first state to each, that to itself included.
        warnings: Reasons to doubt the coverage of the data.

    Raises:
        NoOverlapError: If the maps leave states without any overlap.
    """
    n_bootstrap, seed = settings.evaluation.n_bootstrap, settings.seed
    rows = state_potentials(states, transforms, [end.held_out for end in states])
    found = multistate_free_energies(rows, n_bootstrap=n_bootstrap, seed=seed)
    drift = None
    if found.n_units < _COMPARED:
        warnings = (*warnings, "too few independent configurations to compare halves of them: sample longer")
    else:
        drift = halves(rows, seed=seed)
    verdict = multistate_verdict(found, drift=drift, warnings=warnings)
    estimates = [found.between(0, k, name=f"F_{k} - F_0") for k in range(1, len(states))]
    plain = None
    try:
        bare = state_potentials(states, [Chain()] * len(states), [end.trajectory for end in states])
        plain = multistate_free_energies(bare, n_bootstrap=n_bootstrap, seed=seed)
        estimates += [plain.between(0, k, name=f"F_{k} - F_0, without maps, all data") for k in range(1, len(states))]
        without = _numbers(plain) | {"verdict": multistate_verdict(plain).word}
    except NoOverlapError:
        without = {"overlap": 0.0, "verdict": "low overlap"}
    diagnostics = {**_numbers(found), "n_k": rows.n_k.tolist(), "log_det_error": rows.log_det_error, "without_map": without}
    return MultistateAnalysis(tuple(estimates), found, plain, diagnostics, verdict)


@torch.no_grad()
def state_potentials(states: Sequence[Ensemble], transforms: Sequence[Transform], frames: Sequence[Trajectory]) -> StatePotentials:
    """Pulled-back potentials of frames of every state in all states, in units that are longer than the memory of frames and potentials."""
    mapped = MappedStates([end.target for end in states], transforms)
    found = []
    for k, one in enumerate(frames):
        parts = torch.as_tensor(one.x, dtype=torch.float64).split(_ENERGY_ROWS)
        found.append(torch.cat([mapped.reduced_potentials(part, k) for part in parts], dim=1).numpy())
    made = StatePotentials.of(
        found, role="train" if any(one.role == "train" for one in frames) else "evaluate", log_det_error=mapped.log_det_error,
        is_exact=mapped.is_exact, chain=[one.chain for one in frames],
    )  # fmt: skip
    return made.blocked(at_least=[one.statistical_inefficiency for one in frames])


def _numbers(found: MultistateFreeEnergies) -> dict[str, Any]:
    pairs = [{"states": [pair.a, pair.b], "overlap": pair.overlap, "carriers": [pair.n_a, pair.n_b]} for pair in found.neighbours]
    return {"overlap": found.overlap, "neighbours": pairs, "overlap_matrix": found.overlap_matrix, "carriers": found.carriers}
