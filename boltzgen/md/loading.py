"""Loading a molecule: topology, system and coordinates from files or from OpenMM objects, checked against each other."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.core import Molecule
from boltzgen.errors import InputError, TopologyError
from boltzgen.md.bonds import compare_bonds, complete_bonds, connected_parts
from boltzgen.md.checks import atom_name, constraints_of, require_finite_parameters, require_same_particles, symbol
from boltzgen.md.structure_files import Structure, read_coordinates, read_structure
from boltzgen.md.system_xml import read_state, read_system

#: Box edge in nm of a System that was never given one.
_OPENMM_DEFAULT_BOX = 2.0 * np.eye(3)

_BAROSTATS = (
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.RPMDMonteCarloBarostat,
)
_COUPLING_PARAMETERS = ("MonteCarlo", "MembraneMonteCarlo", "AnisotropicMonteCarlo", "FlexibleMonteCarlo", "Andersen")


@dataclass(frozen=True)
class LoadedSystem:
    """A molecule and its energy, as the rest of the package takes them.

    Attributes:
        topology: Atoms, residues and bonds.
        system: The energy; barostats, thermostats and centre-of-mass removers are left out.
        positions: ``[n, 3]`` in nm, float64.
        box: Box vectors ``[3, 3]`` in nm where the system is periodic, else None.
        notes: What was left out or completed, one sentence each.
        sha256: Hash of every input file, by what it is for and its name.
    """

    topology: app.Topology
    system: openmm.System
    positions: np.ndarray
    box: np.ndarray | None
    notes: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[np.ndarray]:
        """Atoms of every molecule, ascending, in the order of their first atoms."""
        return connected_parts(self.topology.getNumAtoms(), ((a.index, b.index) for a, b in self.topology.bonds()))

    @property
    def is_one_molecule(self) -> bool:
        """Whether bonds connect all atoms."""
        return len(self.parts) == 1

    @property
    def molecule(self) -> Molecule:
        """The bond graph as plain data.

        Raises:
            TopologyError: If the atoms are not one connected molecule, or a constraint is not along a bond.
        """
        return self.molecule_of(np.arange(self.topology.getNumAtoms()))

    def molecule_of(self, chosen: np.ndarray) -> Molecule:
        """The bond graph of some atoms, ascending, as plain data; they count from 0 in it.

        Raises:
            TopologyError: If they are not one connected molecule, or a constraint is not along a bond.
        """
        number = {int(atom): k for k, atom in enumerate(chosen)}
        atoms = [atom for atom in self.topology.atoms() if atom.index in number]
        names = tuple(atom_name(atom) for atom in atoms)
        pairs = ((number[a.index], number[b.index]) for a, b in self.topology.bonds() if a.index in number and b.index in number)
        bonds = sorted({(min(pair), max(pair)) for pair in pairs})
        _require_connected(names, bonds)
        constraints = [(number[i], number[j], length) for i, j, length in constraints_of(self.system) if i in number and j in number]
        bonded = set(bonds)
        for i, j, _ in constraints:
            if (i, j) not in bonded:
                raise TopologyError(f"the distance between {names[i]} and {names[j]} is constrained but they are not bonded; make the "
                                    f"system with constraints=None or constraints=HBonds, and rigidWater=False")  # fmt: skip
        masses = [self.system.getParticleMass(atom.index).value_in_unit(unit.dalton) for atom in atoms]
        return Molecule(
            elements=tuple(symbol(atom) for atom in atoms),
            bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
            masses=np.array(masses),
            names=names,
            constraints=np.array([(i, j) for i, j, _ in constraints], dtype=np.int64).reshape(-1, 2),
            constraint_lengths=np.array([length for *_, length in constraints]),
        )


def load(
    topology: Path, system: Path | None = None, *, state: Path | None = None, coordinates: Path | None = None, trust: bool = False
) -> LoadedSystem:
    """Load a molecule from files.

    Args:
        topology: PDB, mmCIF, Amber prmtop or GROMACS top.
        system: System XML. May be left out for Amber and GROMACS topologies of molecules without a box.
        state: State XML whose positions (and box) are used.
        coordinates: Amber inpcrd, GROMACS gro, PDB or mmCIF whose positions (and box) are used.
        trust: Read a system XML that may run code (see :func:`boltzgen.md.system_xml.read_system`).

    Returns:
        The checked system. Positions are those of ``state``, else ``coordinates``, else ``topology``.

    Raises:
        InputError: If a file cannot be read or the files do not belong together.
        UnsafeFileError: If an XML file could run code and is not trusted.
    """
    structure = read_structure(Path(topology))
    notes = list(structure.notes)
    positions, box = structure.positions, structure.box
    if coordinates is not None:
        found = read_coordinates(Path(coordinates))
        positions, box = found.positions, box if found.box is None else found.box
    if system is not None:
        built = read_system(Path(system), trust=trust)
    else:
        built = _system_of(structure, Path(topology), box)
        notes.append("No system file was given: all interactions without cutoff, in vacuum, without constraints.")
    if state is not None:
        positions, box, ignored = _from_state(read_state(Path(state), trust=trust), Path(state))
        notes += ignored
    if positions is None:
        raise InputError(f"{topology} holds no coordinates; give them as well (coordinates=..., such as an inpcrd, gro or PDB file)")
    used = {"topology": topology, "system": system, "state": state, "coordinates": coordinates}
    hashes = {f"{role} {Path(path).name}": file_hash(Path(path)) for role, path in used.items() if path is not None}
    return _checked(structure.topology, built, positions, box=box, notes=notes, sha256=hashes)


def load_objects(topology: app.Topology, system: openmm.System, positions: Any) -> LoadedSystem:
    """The same checks for OpenMM objects.

    Args:
        topology: OpenMM topology.
        system: OpenMM system; it is copied.
        positions: ``[n, 3]``, an ``openmm.unit`` quantity or numbers in nm.

    Returns:
        The checked system.

    Raises:
        InputError: If they do not belong together.
    """
    if unit.is_quantity(positions):
        positions = positions.value_in_unit(unit.nanometer)
    vectors = topology.getPeriodicBoxVectors()
    box = None if vectors is None else _nm(vectors)
    return _checked(copy.deepcopy(topology), system, np.array(positions, dtype=np.float64), box=box, notes=[], sha256={})


def load_state(state: Any, topology: app.Topology, positions: np.ndarray) -> tuple[LoadedSystem, float]:
    """The same checks for an openmmtools ``ThermodynamicState``; its temperature in kelvin as well.

    A state at constant pressure is taken at the volume of its box.

    Raises:
        InputError: If they do not belong together.
    """
    system = state.get_system(remove_thermostat=True, remove_barostat=True)
    return load_objects(topology, system, positions), float(state.temperature.value_in_unit(unit.kelvin))


def positions_of(samples: Any) -> np.ndarray:
    """Configurations ``[n, atoms, 3]`` in nm, float64, of openmmtools ``SamplerState`` objects, quantities or numbers in nm.

    Raises:
        InputError: If they have another shape.
    """
    if not isinstance(samples, np.ndarray):
        samples = [getattr(sample, "positions", sample) for sample in samples]
        samples = [sample.value_in_unit(unit.nanometer) if unit.is_quantity(sample) else sample for sample in samples]
    x = np.array(samples, dtype=np.float64)
    if x.ndim != 3 or x.shape[2] != 3 or not len(x):
        raise InputError(f"expected samples [n, atoms, 3], got {list(x.shape)}")
    return x


def with_parameters(loaded: LoadedSystem, parameters: Mapping[str, float]) -> LoadedSystem:
    """The same molecule with other values of global parameters of its forces.

    Args:
        loaded: The molecule.
        parameters: Name → value, in OpenMM's units.

    Raises:
        InputError: If no force has a parameter of that name; names those that there are.
    """
    if not parameters:
        return loaded
    system = copy.deepcopy(loaded.system)
    known: set[str] = set()
    forces = list(system.getForces())
    for force in forces:
        if isinstance(force, openmm.CustomCVForce):
            forces += [force.getCollectiveVariable(k) for k in range(force.getNumCollectiveVariables())]
        for k in range(force.getNumGlobalParameters() if hasattr(force, "getNumGlobalParameters") else 0):
            name = force.getGlobalParameterName(k)
            known.add(name)
            if name in parameters:
                force.setGlobalParameterDefaultValue(k, float(parameters[name]))
    unknown = sorted(set(parameters) - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise InputError(f"the system has no global parameter {', '.join(unknown)}: {has}")
    return replace(loaded, system=system)


def without_couplings(system: openmm.System) -> tuple[openmm.System, tuple[str, ...]]:
    """A copy of a system without barostats, thermostats and centre-of-mass removers, and what was left out.

    Raises:
        InputError: If the system cannot be copied.
    """
    try:
        kept = copy.deepcopy(system)
    except openmm.OpenMMException as error:
        raise InputError(
            f"the system cannot be copied: {error} Define the function of a PythonForce at the top level of a module"
        ) from error
    notes = []
    for index in reversed(range(kept.getNumForces())):
        force = kept.getForce(index)
        name = type(force).__name__
        if isinstance(force, _BAROSTATS):
            notes.append(f"The {name} was left out: the system is run at the volume of its box, not at constant pressure.")
        elif isinstance(force, openmm.AndersenThermostat):
            notes.append(f"The {name} was left out: the temperature is that of the configuration.")
        elif isinstance(force, openmm.CMMotionRemover):
            notes.append(f"The {name} was left out: it does not act on configurations.")
        else:
            continue
        kept.removeForce(index)
    return kept, tuple(reversed(notes))


def _checked(
    topology: app.Topology,
    system: openmm.System,
    positions: np.ndarray,
    *,
    box: np.ndarray | None,
    notes: list[str],
    sha256: dict[str, str],
) -> LoadedSystem:
    require_same_particles(topology, system, positions)
    system, left_out = without_couplings(system)
    unchecked = require_finite_parameters(system)
    box, box_notes = _box_of(system, box)
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*box)
    notes = [*notes, *left_out, *unchecked, *box_notes, *complete_bonds(topology, system), *compare_bonds(topology, system)]
    return LoadedSystem(topology=topology, system=system, positions=positions, box=box, notes=tuple(notes), sha256=sha256)


def _box_of(system: openmm.System, box: np.ndarray | None) -> tuple[np.ndarray | None, list[str]]:
    """The box of a periodic system: that of the coordinates, unless it is the system's own with fewer digits."""
    if not system.usesPeriodicBoundaryConditions():
        return None, []
    own = _nm(system.getDefaultPeriodicBoxVectors())
    if box is None:
        if np.array_equal(own, _OPENMM_DEFAULT_BOX):
            raise InputError("the system is periodic but no file has box vectors; add a CRYST1 record to the PDB, give a state.xml, or "
                             "call system.setDefaultPeriodicBoxVectors before the system is written")  # fmt: skip
        return own, []
    if not np.isfinite(box).all() or np.linalg.det(box) <= 0:
        raise InputError(f"the box vectors {box.tolist()} nm do not span a volume; give a box with three positive edges")
    if np.allclose(own, box, rtol=0, atol=6e-4):
        return own, []
    if np.array_equal(own, _OPENMM_DEFAULT_BOX):
        return box, []
    edges = " x ".join(f"{edge:.4f}" for edge in np.diag(box))
    return box, [f"The box that comes with the coordinates ({edges} nm) was used; the system file has another."]


def _from_state(state: openmm.State, path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Positions and box of a state, and a note where it holds context parameters."""
    try:
        positions = np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
    except openmm.OpenMMException as error:
        raise InputError(f"{path}: holds no positions; save it with getPositions=True") from error
    has_parameters = bool(state.getDataTypes() & openmm.State.Parameters)
    names = [name for name in (state.getParameters() if has_parameters else {}) if not name.startswith(_COUPLING_PARAMETERS)]
    notes = [f"The context parameters of {path.name} ({', '.join(names)}) were not used, but the defaults of the system."] if names else []
    return positions, _nm(state.getPeriodicBoxVectors()), notes


def _system_of(structure: Structure, path: Path, box: np.ndarray | None) -> openmm.System:
    create: Callable[[], openmm.System] | None = structure.create_system
    if create is None:
        raise InputError(f"{path} has no force field; give the system.xml as well")
    if box is not None:
        raise InputError(f"{path} is periodic: cutoffs and long-range terms must be chosen by you; give a system.xml made with the "
                         f"nonbonded method that you want")  # fmt: skip
    return create()


def _require_connected(names: tuple[str, ...], bonds: Iterable[tuple[int, int]]) -> None:
    parts = connected_parts(len(names), bonds)
    if len(parts) == 1:
        return
    listed = "; ".join(f"{names[part[0]]} to {names[part[-1]]} ({len(part)} atoms)" for part in parts[:4])
    more = f"; and {len(parts) - 4} more" if len(parts) > 4 else ""
    raise TopologyError(f"internal coordinates need one connected molecule, got {len(parts)} parts: {listed}{more}. Remove solvent and "
                        f"ions, or add the missing bonds (CONECT records of a PDB)")  # fmt: skip


def _nm(vectors: Any) -> np.ndarray:
    return np.array([vector.value_in_unit(unit.nanometer) for vector in vectors], dtype=np.float64)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
