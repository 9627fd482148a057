"""The bond graph: its connected parts, and its completion from the force field where a topology file has no bonds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import openmm
from openmm import app
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from boltzgen.md.checks import atom_name, constraints_of, symbol


def connected_parts(n_atoms: int, bonds: Iterable[tuple[int, int]]) -> list[np.ndarray]:
    """Atoms of every connected part of a graph, ascending, ordered by their first atom."""
    pairs = np.array(list(bonds), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n_atoms, n_atoms))
    n_parts, part = connected_components(graph, directed=False)
    return sorted((np.flatnonzero(part == k) for k in range(n_parts)), key=lambda atoms: int(atoms[0]))


def complete_bonds(topology: app.Topology, system: openmm.System) -> tuple[str, ...]:
    """Add the force field's bonds to a topology that lacks some, in place.

    A PDB without CONECT records has bonds for standard residues only. The missing ones are harmonic bonds and constraints to hydrogen
    of the system that join parts which the topology leaves apart. Ends of a harmonic angle are no bond
    (Urey-Bradley terms, rigid water).

    Returns:
        A note that says what was added, and advice where atoms stay without a bond.
    """
    atoms = list(topology.atoms())
    known = {(min(a.index, b.index), max(a.index, b.index)) for a, b in topology.bonds()}
    part_of = np.zeros(len(atoms), dtype=np.int64)
    for number, part in enumerate(connected_parts(len(atoms), known)):
        part_of[part] = number
    added = [(i, j) for i, j in sorted(_force_field_bonds(system, atoms) - known) if part_of[i] != part_of[j]]
    for i, j in added:
        topology.addBond(atoms[i], atoms[j])
    notes = []
    if added:
        i, j = added[0]
        notes.append(f"{len(added)} bonds missing from the topology were taken from the force field (first: {atom_name(atoms[i])} to "
                     f"{atom_name(atoms[j])}); add CONECT records to the PDB to state them yourself.")  # fmt: skip
    bonded = {i for pair in [*known, *added] for i in pair}
    single = {residue.index for residue in topology.residues() if len(list(residue.atoms())) == 1}  # ions, noble gases
    alone = [i for i, atom in enumerate(atoms) if i not in bonded and atom.residue.index not in single and not system.isVirtualSite(i)]
    if alone:
        notes.append(f"{len(alone)} atoms have no bond (first: {atom_name(atoms[alone[0]])}); for residues that OpenMM does not know, add "
                     f"CONECT records to the PDB.")  # fmt: skip
    return tuple(notes)


def compare_bonds(topology: app.Topology, system: openmm.System) -> tuple[str, ...]:
    """A note where bonds of the topology have no term in a force field that has bonds: the atoms may be in another order."""
    atoms = list(topology.atoms())
    terms = _force_field_bonds(system, atoms)
    bonds = {(min(a.index, b.index), max(a.index, b.index)) for a, b in topology.bonds()}
    strangers = sorted(bonds - terms)
    if not terms or not strangers:
        return ()
    i, j = strangers[0]
    return (f"{len(strangers)} of {len(bonds)} bonds of the topology have no harmonic bond or constraint in the system (first: "
            f"{atom_name(atoms[i])} to {atom_name(atoms[j])}): check that both list the atoms in the same order.",)  # fmt: skip


def _force_field_bonds(system: openmm.System, atoms: list[app.topology.Atom]) -> set[tuple[int, int]]:
    pairs = {(i, j) for i, j, _ in constraints_of(system) if "H" in {symbol(atoms[i]), symbol(atoms[j])}}
    ends: set[tuple[int, int]] = set()
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            rows = (force.getBondParameters(k)[:2] for k in range(force.getNumBonds()))
            pairs |= {(min(i, j), max(i, j)) for i, j in rows}
        elif isinstance(force, openmm.HarmonicAngleForce):
            angles = (force.getAngleParameters(k)[:3] for k in range(force.getNumAngles()))
            ends |= {(min(i, k), max(i, k)) for i, _, k in angles}
    return pairs - ends
