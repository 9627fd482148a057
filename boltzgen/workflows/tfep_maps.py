"""The maps that a configuration of two states names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boltzgen.chirality import equal_hydrogens
from boltzgen.config import Joining
from boltzgen.core import Molecule, Target, Transform
from boltzgen.errors import InputError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.trajectory import Trajectory
from boltzgen.recipes import (
    CouplingSize,
    EnsembleFlowSize,
    SolventSize,
    StateMap,
    SurroundingsSize,
    ensemble_flow_map,
    internal_coordinate_map,
    learn_domains,
    low_rank_map,
    matched_domains,
    radial_solvent_map,
    solvent_flow_map,
    surroundings_layers,
    turn_between,
)
from boltzgen.training.checkpoints import load_weights
from boltzgen.transforms.domains import Domains
from boltzgen.workflows.seeds import stream


def make_map(
    settings: Joining,
    ends: Sequence[tuple[LoadedSystem, Trajectory]],
    *,
    box: Tensor | None,
    targets: Sequence[Target] = (),
    between_basins: bool = False,
) -> StateMap:
    """The untrained map between two states.

    Args:
        settings: What it is.
        ends: Both states with their training frames.
        box: Vectors of the box in nm ``[3, 3]``, or None.
        targets: Reduced potentials of both, finite everywhere, which tell a continuous map the hydrogens that are equal; without them all
            atoms differ.
        between_basins: Whether torsions start by turning from the mean of one state to that of the other.

    Raises:
        InputError, TopologyError: If the atoms have no such map.
    """
    chosen, loaded = settings.map, ends[0][0]
    if chosen.kind == "radial":
        xs = [training.x for _, training in ends]
        return radial_solvent_map(xs, centre=chosen.centre, outer=chosen.outer, box=box, n_bins=chosen.radial_bins)
    if chosen.kind == "solvent":
        size = SolventSize(
            n_central=chosen.n_central, n_radial=chosen.n_radial, n_times=chosen.n_times,
            training_steps=settings.training.solver_steps, steps=settings.evaluation.solver_steps,
        )  # fmt: skip
        xs = [training.x for _, training in ends]
        return solvent_flow_map(xs, size=size, centre=chosen.centre, outer=chosen.outer, length=chosen.length, box=box)
    if chosen.kind == "continuous":
        flow_size = EnsembleFlowSize(
            n_layers=chosen.field_layers, hidden=chosen.field_width, n_radial=chosen.n_radial, pair_scales=chosen.pair_scales,
            training_steps=settings.training.solver_steps, steps=settings.evaluation.solver_steps,
        )  # fmt: skip
        xs = [training.x for _, training in ends]
        labels = equal_in_all(loaded, targets, torch.as_tensor(xs[0][0], dtype=torch.float64))
        return ensemble_flow_map(xs, size=flow_size, labels=labels, length=chosen.length, generator=stream(settings.seed, 3))
    atoms = mapped_atoms(settings, loaded)
    made, domains = _shape_map(settings, loaded.molecule_of(atoms), [training for _, training in ends], atoms, turned=between_basins)
    if loaded.is_one_molecule:
        return made
    after: list[Transform] = []
    if chosen.surroundings:
        kinds = [atom.element.symbol if atom.element is not None else atom.name for atom in loaded.topology.atoms()]
        seen = SurroundingsSize(reach=chosen.reach, n_functions=chosen.n_around, hidden=chosen.hidden)
        after = surroundings_layers(
            loaded.molecule_of(atoms), domains, [training.x for _, training in ends], atoms=atoms, kinds=kinds, box=box, size=seen,
            generator=stream(settings.seed, 5),
        )  # fmt: skip
    return made.carrying(atoms, n_atoms=loaded.topology.getNumAtoms(), after=after)


def _shape_map(
    settings: Joining, molecule: Molecule, data: Sequence[Trajectory], atoms: np.ndarray, *, turned: bool
) -> tuple[StateMap, Domains]:
    """A map of the internal coordinates of some atoms, and the domains of what it makes."""
    chosen, generator = settings.map, stream(settings.seed, 3)
    xs, hot = [part.x[:, atoms] for part in data], [hotter.x[:, atoms] for part in data for hotter in part.hot]
    if chosen.kind == "low_rank":
        a = b = learn_domains(molecule, np.concatenate([*xs, *hot]))
    else:
        a, b = matched_domains(molecule, xs, hot=hot)
    turn = turn_between(molecule, a, *xs) if turned else None
    size = CouplingSize(
        torsion_layers=chosen.torsion_layers, torsion_bins=chosen.torsion_bins, stiff_layers=chosen.stiff_layers,
        stiff_bins=chosen.stiff_bins, hidden=chosen.hidden, compiled=False,
    )  # fmt: skip
    if chosen.kind == "low_rank":
        return low_rank_map(molecule, a, size=size, rank=chosen.rank, turn=turn, generator=generator), b
    layers = size if chosen.kind == "coupling" else None
    return internal_coordinate_map(molecule, a, b, size=layers, turn=turn, generator=generator), b


def equal_in_all(loaded: LoadedSystem, targets: Sequence[Target], x: Tensor) -> tuple[str, ...]:
    """Labels of the atoms of a molecule; those of hydrogens are equal that no target tells apart, at a configuration ``[n, 3]``."""
    found = [equal_hydrogens(loaded.molecule, target.reduced_potential, x) for target in targets] or [loaded.molecule.names]
    return tuple("|".join(labels) for labels in zip(*found, strict=True))


def mapped_atoms(settings: Joining, loaded: LoadedSystem) -> np.ndarray:
    """Atoms that the configured map moves.

    Raises:
        InputError: If the molecule that it names does not exist.
    """
    parts, chosen = loaded.parts, settings.map
    if chosen.kind in ("radial", "solvent"):
        return np.arange(loaded.topology.getNumAtoms())
    if chosen.molecule >= len(parts):
        raise InputError(f"map.molecule: expected a molecule from 0 to {len(parts) - 1}, got {chosen.molecule}")
    return parts[chosen.molecule]


def of_epochs(pieces: StateMap, folder: Path, *, n: int, fingerprint: str) -> list[Transform]:
    """The maps of the last ``n`` looks during training, from their folder; the last one is the trained map."""
    found = []
    for path in sorted(folder.glob("step-*.safetensors"))[-n:]:
        of_epoch = copy.deepcopy(pieces)
        load_weights(of_epoch.learned, path, fingerprint=fingerprint)
        found.append(of_epoch.transform)
    return found
