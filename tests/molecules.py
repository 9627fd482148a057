"""Molecules for tests: bond graphs written by hand and the prepared systems of ``systems/``."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Molecule

SYSTEMS = Path(__file__).parents[1] / "systems"
MASSES = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999}


def graph(elements: str, bonds: list[tuple[int, int]], *, constraints: dict[tuple[int, int], float] | None = None) -> Molecule:
    """A molecule from one-letter elements and bonds."""
    rigid = constraints or {}
    return Molecule(
        elements=tuple(elements),
        bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
        masses=np.array([MASSES[e] for e in elements]),
        names=tuple(f"{e}{i}" for i, e in enumerate(elements)),
        constraints=np.array(list(rigid), dtype=np.int64).reshape(-1, 2),
        constraint_lengths=np.array(list(rigid.values()), dtype=np.float64),
    )


def water() -> Molecule:
    return graph("OHH", [(0, 1), (0, 2)])


def ethane() -> Molecule:
    return graph("CCHHHHHH", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (1, 7)])


def methanol() -> Molecule:
    return graph("COHHHH", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5)])


def neopentane() -> Molecule:
    carbons = [(0, c) for c in (1, 2, 3, 4)]
    hydrogens = [(c, 5 + 3 * (c - 1) + h) for c in (1, 2, 3, 4) for h in range(3)]
    return graph("CCCCC" + "H" * 12, carbons + hydrogens)


def cyclopropane() -> Molecule:
    return graph("CCCHHHHHH", [(0, 1), (1, 2), (2, 0), (0, 3), (0, 4), (1, 5), (1, 6), (2, 7), (2, 8)])


def read(name: str, *, constrain_hydrogens: bool = False) -> tuple[Molecule, Tensor]:
    """A prepared system and its coordinates ``[1, n, 3]`` in nm, optionally with its X–H bonds constrained at their lengths."""
    trajectory = mdtraj.load(SYSTEMS / name / "topology.pdb")
    elements = tuple(atom.element.symbol for atom in trajectory.topology.atoms)
    bonds = [(a.index, b.index) for a, b in trajectory.topology.bonds]
    x = torch.from_numpy(trajectory.xyz.astype(np.float64))
    rigid = {(a, b): float((x[0, a] - x[0, b]).norm()) for a, b in bonds if "H" in (elements[a], elements[b])}
    return graph("".join(elements), bonds, constraints=rigid if constrain_hydrogens else None), x
