"""Checks of a system against its topology, and of a loaded system against what a flow can describe."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.errors import InputError, TopologyError

if TYPE_CHECKING:
    from boltzgen.md.loading import LoadedSystem

#: Two constrained lengths in nm that differ by less are the same.
_SAME_LENGTH_NM = 1e-6
_NOT_FINITE = frozenset({"nan", "-nan", "inf", "-inf", "infinity", "-infinity"})


def require_same_particles(topology: app.Topology, system: openmm.System, positions: np.ndarray) -> None:
    """Topology, system and positions must describe the same number of particles.

    Raises:
        InputError: If the numbers differ, or a coordinate is not finite.
    """
    atoms, particles = topology.getNumAtoms(), system.getNumParticles()
    if atoms != particles:
        raise InputError(f"the topology has {atoms} atoms and the system {particles} particles; give the topology that the system was "
                         f"made from (with the same hydrogens, water and virtual sites)")  # fmt: skip
    if positions.shape != (particles, 3):
        raise InputError(
            f"expected positions [{particles}, 3] in nm, got {list(positions.shape)}; the coordinates belong to another system"
        )
    bad = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(bad):
        raise InputError(f"the coordinates of atom {bad[0] + 1} are not finite numbers: {positions[bad[0]]}")


def require_finite_parameters(system: openmm.System) -> tuple[str, ...]:
    """Masses, constraint lengths and every number of every force must be finite.

    Returns:
        Notes: which forces could not be inspected.

    Raises:
        InputError: If one is not; the message names it.
    """
    for i in range(system.getNumParticles()):
        mass = system.getParticleMass(i).value_in_unit(unit.dalton)
        if not (math.isfinite(mass) and mass >= 0):
            raise InputError(f"particle {i + 1} has mass {mass} dalton; make the system again with finite, non-negative masses")
    for i, j, length in constraints_of(system):
        if not (math.isfinite(length) and length > 0):
            raise InputError(f"the constraint between particles {i + 1} and {j + 1} has length {length} nm; make the system again")
    notes = []
    for number, force in enumerate(system.getForces(), start=1):
        try:
            text = openmm.XmlSerializer.serialize(force)
        except openmm.OpenMMException as error:
            notes.append(f"The parameters of force {number} ({force.getName()}) were not checked: {error}.")
            continue
        _require_finite_attributes(ET.fromstring(text), f"force {number} ({force.getName()})")
    return tuple(notes)


def _require_finite_attributes(root: ET.Element, where: str) -> None:
    for group in root.iter():
        for position, element in enumerate(group, start=1):
            for key, value in element.items():
                if key != "name" and value.lower() in _NOT_FINITE:
                    raise InputError(f"{where}: parameter {key!r} of {element.tag} {position} is {value}; make the system again with "
                                     f"finite parameters")  # fmt: skip
    for key, value in root.items():
        if key != "name" and value.lower() in _NOT_FINITE:
            raise InputError(f"{where}: {key!r} is {value}; make the system again with finite parameters")


def constraints_of(system: openmm.System) -> list[tuple[int, int, float]]:
    """Distance constraints as ``(i, j, length in nm)`` with i < j."""
    rows = (system.getConstraintParameters(k) for k in range(system.getNumConstraints()))
    return [(min(i, j), max(i, j), length.value_in_unit(unit.nanometer)) for i, j, length in rows]


def share_constraints(a: openmm.System, b: openmm.System) -> bool:
    """Whether two systems constrain the same distances to the same lengths, to 1e-6 nm."""
    one, other = (np.array(sorted(constraints_of(system))) for system in (a, b))
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=_SAME_LENGTH_NM)


def require_flow_over_all_atoms(loaded: LoadedSystem) -> None:
    """Every atom must move freely, except along X–H bonds, whose constrained lengths internal coordinates keep.

    Raises:
        TopologyError: For virtual sites, frozen atoms, and constraints that are not bonds to hydrogen; the message names the remedy.
    """
    system, atoms = loaded.system, list(loaded.topology.atoms())
    sites = [i for i in range(len(atoms)) if system.isVirtualSite(i)]
    if sites:
        raise TopologyError(f"{len(sites)} particles are virtual sites (first: {atom_name(atoms[sites[0]])}), whose positions follow from "
                            f"other atoms; make the system with a model without extra particles")  # fmt: skip
    frozen = [i for i in range(len(atoms)) if system.getParticleMass(i).value_in_unit(unit.dalton) == 0]
    if frozen:
        raise TopologyError(f"{len(frozen)} atoms have mass 0 (first: {atom_name(atoms[frozen[0]])}), so MD never moves them but a flow "
                            f"would; give them their masses")  # fmt: skip
    bonds = {(min(a.index, b.index), max(a.index, b.index)) for a, b in loaded.topology.bonds()}
    for i, j, _ in constraints_of(system):
        pair = f"{atom_name(atoms[i])} and {atom_name(atoms[j])}"
        if (i, j) not in bonds:
            raise TopologyError(f"the distance between {pair} is constrained but they are not bonded (rigid water, HAngles); make the "
                                f"system with constraints=None or constraints=HBonds, and rigidWater=False")  # fmt: skip
        if not {"H", "D"} & {symbol(atoms[i]), symbol(atoms[j])}:
            raise TopologyError(f"the bond between {pair} is constrained and has no hydrogen (constraints=AllBonds); make the system with "
                                f"constraints=None or constraints=HBonds")  # fmt: skip


def require_unconstrained(loaded: LoadedSystem) -> None:
    """No constraint at all, as a flow over Cartesian coordinates needs.

    Raises:
        TopologyError: If there is a constraint, a virtual site or a frozen atom.
    """
    require_flow_over_all_atoms(loaded)
    n = loaded.system.getNumConstraints()
    if n:
        raise TopologyError(f"a flow over all Cartesian coordinates cannot keep {n} constrained bond lengths; make the system with "
                            f"constraints=None, or use internal coordinates, which keep bonds to hydrogen")  # fmt: skip


def require_free(loaded: LoadedSystem, chosen: np.ndarray) -> None:
    """Atoms that a map moves must be free; the others may be anything.

    Raises:
        TopologyError: If one is in a constraint, a virtual site or frozen; the message names the remedy.
    """
    system, atoms, moved = loaded.system, list(loaded.topology.atoms()), {int(atom) for atom in chosen}
    bound = {atom for i, j, _ in constraints_of(system) for atom in (i, j)}
    for what, held in (
        ("in a constraint", bound),
        ("a virtual site", {atom for atom in moved if system.isVirtualSite(atom)}),
        ("of mass 0", {atom for atom in moved if system.getParticleMass(atom).value_in_unit(unit.dalton) == 0}),
    ):
        if held & moved:
            first = atom_name(atoms[min(held & moved)])
            raise TopologyError(f"the map would move {first}, which is {what}: rigid water and the like may be carried only. Make the "
                                f"system with constraints=None for what is mapped, or map another molecule")  # fmt: skip


def symbol(atom: app.topology.Atom) -> str:
    """Chemical symbol, or ``X`` for a particle that is no atom."""
    return "X" if atom.element is None else atom.element.symbol


def atom_name(atom: app.topology.Atom) -> str:
    """A label for people, such as ``ALA2-CA``."""
    return f"{atom.residue.name}{atom.residue.id}-{atom.name}"
