"""The maps that a configuration of two states names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from boltzgen.config import TfepConfig
from boltzgen.core import Transform
from boltzgen.errors import InputError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.trajectory import Trajectory
from boltzgen.recipes import CouplingSize, StateMap, internal_coordinate_map, matched_domains, radial_solvent_map
from boltzgen.training.checkpoints import load_weights
from boltzgen.workflows.seeds import stream


def make_map(config: TfepConfig, ends: Sequence[tuple[LoadedSystem, Trajectory]], *, box: Tensor | None) -> StateMap:
    """The untrained map between two states.

    Args:
        config: What it is.
        ends: Both states with their training frames.
        box: Vectors of the box in nm ``[3, 3]``, or None.

    Raises:
        InputError, TopologyError: If the atoms have no such map.
    """
    settings, loaded = config.map, ends[0][0]
    if settings.kind == "radial":
        xs = [training.x for _, training in ends]
        return radial_solvent_map(xs, centre=settings.centre, outer=settings.outer, box=box, n_bins=settings.radial_bins)
    atoms = mapped_atoms(config, loaded)
    molecule = loaded.molecule_of(atoms)
    hot = [part.x[:, atoms] for _, training in ends for part in training.hot]
    domains = matched_domains(molecule, [training.x[:, atoms] for _, training in ends], hot=hot)
    size = None
    if settings.kind == "coupling":
        size = CouplingSize(
            torsion_layers=settings.torsion_layers, torsion_bins=settings.torsion_bins, stiff_layers=settings.stiff_layers,
            stiff_bins=settings.stiff_bins, hidden=settings.hidden, compiled=False,
        )  # fmt: skip
    made = internal_coordinate_map(molecule, *domains, size=size, generator=stream(config.seed, 3))
    return made if loaded.is_one_molecule else made.carrying(atoms, n_atoms=loaded.topology.getNumAtoms())


def mapped_atoms(config: TfepConfig, loaded: LoadedSystem) -> np.ndarray:
    """Atoms that the configured map moves.

    Raises:
        InputError: If the molecule that it names does not exist.
    """
    parts, settings = loaded.parts, config.map
    if settings.kind == "radial":
        return np.arange(loaded.topology.getNumAtoms())
    if settings.molecule >= len(parts):
        raise InputError(f"map.molecule: expected a molecule from 0 to {len(parts) - 1}, got {settings.molecule}")
    return parts[settings.molecule]


def of_epochs(pieces: StateMap, folder: Path, *, n: int, fingerprint: str) -> list[Transform]:
    """The maps of the last ``n`` looks during training, from their folder; the last one is the trained map."""
    found = []
    for path in sorted(folder.glob("step-*.safetensors"))[-n:]:
        of_epoch = copy.deepcopy(pieces)
        load_weights(of_epoch.learned, path, fingerprint=fingerprint)
        found.append(of_epoch.transform)
    return found
