"""Walls that keep a simulation inside a range of a coordinate, and are nothing inside it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import openmm

from boltzgen.errors import InputError
from boltzgen.md.loading import LoadedSystem

#: Slope of a wall far outside, in kJ/mol per rad or nm, and how far outside it takes half of it.
_SLOPE, _WIDTH = 500.0, 0.05

#: d is how far q lies outside [low, high].
_ENERGY = f"{_SLOPE!r}*d*d/(d+{_WIDTH!r}); "
_OUTSIDE = "d=max(0, max(low-{q}, {q}-high))"
#: The same for angles, by the way around the circle to the nearer end.
_AROUND = (
    "d=select(step(half-abs(from_middle)), 0, abs(from_middle)-half); "
    "from_middle=theta-middle-two_pi*floor((theta-middle)/two_pi+0.5); two_pi=6.283185307179586"
)


@dataclass(frozen=True)
class Wall:
    """A range of a distance, angle or dihedral.

    Attributes:
        atoms: Two, three or four atoms.
        low: Lower limit in nm or rad.
        high: Upper limit; a dihedral whose upper limit is the smaller one passes through π.
    """

    atoms: tuple[int, ...]
    low: float
    high: float


def with_walls(loaded: LoadedSystem, walls: Sequence[Wall]) -> LoadedSystem:
    """The same system with walls around ranges of coordinates: u + w, with w = 0 inside and s d²/(d + δ) at a distance d outside.

    Inside, its density is that of the system: frames there are samples of the system restricted to the ranges.

    Raises:
        InputError: If a wall has another number of atoms.
    """
    system = copy.deepcopy(loaded.system)
    for n_atoms in sorted({len(wall.atoms) for wall in walls}):
        system.addForce(_force([wall for wall in walls if len(wall.atoms) == n_atoms]))
    digest = hashlib.sha256(json.dumps([[wall.atoms, wall.low, wall.high] for wall in walls]).encode()).hexdigest()
    return replace(loaded, system=system, sha256=loaded.sha256 | {"walls": digest})


def _force(walls: Sequence[Wall]) -> openmm.Force:
    """One force for all walls of equally many atoms: each force costs time of its own."""
    kind = len(walls[0].atoms)
    if kind == 4:
        torsions = openmm.CustomTorsionForce(_ENERGY + _AROUND)
        for name in ("middle", "half"):
            torsions.addPerTorsionParameter(name)
        for wall in walls:
            around = (wall.high - wall.low) % (2 * np.pi)
            torsions.addTorsion(*wall.atoms, [wall.low + 0.5 * around, 0.5 * around])
        return torsions
    if kind == 3:
        force = openmm.CustomAngleForce(_ENERGY + _OUTSIDE.format(q="theta"))
        add, parameter = force.addAngle, force.addPerAngleParameter
    elif kind == 2:
        force = openmm.CustomBondForce(_ENERGY + _OUTSIDE.format(q="r"))
        add, parameter = force.addBond, force.addPerBondParameter
    else:
        raise InputError(f"expected a wall of two, three or four atoms, got {list(walls[0].atoms)}")
    for name in ("low", "high"):
        parameter(name)
    for wall in walls:
        add(*wall.atoms, [wall.low, wall.high])
    return force
