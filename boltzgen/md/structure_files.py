"""Topologies and coordinates from the file formats that OpenMM reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Structure:
    """What one file says.

    Attributes:
        topology: Atoms and bonds.
        positions: ``[n, 3]`` in nm, where the file has them.
        box: ``[3, 3]`` in nm, where the file has one.
        create_system: Makes the system without cutoff and constraints, where the file holds a force field.
        notes: What was left out.
    """

    topology: app.Topology
    positions: np.ndarray | None
    box: np.ndarray | None
    create_system: Callable[[], openmm.System] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coordinates:
    """Positions ``[n, 3]`` in nm and, where the file has one, the box ``[3, 3]`` in nm."""

    positions: np.ndarray
    box: np.ndarray | None


def read_structure(path: Path) -> Structure:
    """Read a topology: PDB, mmCIF, Amber prmtop or GROMACS top.

    Raises:
        InputError: If the format is not known or the file cannot be read.
    """
    reader = _TOPOLOGIES.get(path.suffix.lower())
    if reader is None:
        hint = "; give the .top file as topology and the .gro file as coordinates" if path.suffix.lower() == ".gro" else ""
        raise InputError(f"{path}: expected a topology ({', '.join(_TOPOLOGIES)}), got {path.suffix or 'no suffix'!r}{hint}")
    return _guarded(reader, path)


def read_coordinates(path: Path) -> Coordinates:
    """Read positions and box: Amber inpcrd, GROMACS gro, PDB or mmCIF.

    Raises:
        InputError: If the format is not known or the file cannot be read.
    """
    reader = _COORDINATES.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected coordinates ({', '.join(_COORDINATES)}), got {path.suffix or 'no suffix'!r}")
    return _guarded(reader, path)


def _guarded(reader: Callable[[Path], T], path: Path) -> T:
    if not path.is_file():
        raise InputError(f"cannot read {path}: there is no such file")
    try:
        return reader(path)
    except InputError:
        raise
    except Exception as error:  # OpenMM's loaders raise whatever the first broken line leads to
        raise InputError(f"{path}: OpenMM cannot read it as {path.suffix} ({type(error).__name__}: {error})") from error


def _read_pdb(path: Path) -> Structure:
    return _of_models(app.PDBFile(str(path)))


def _read_mmcif(path: Path) -> Structure:
    return _of_models(app.PDBxFile(str(path)))


def _of_models(file: app.PDBFile | app.PDBxFile) -> Structure:
    positions = file.getPositions(asNumpy=True, frame=0).value_in_unit(unit.nanometer)
    n_models = file.getNumFrames()
    notes = (f"The first of {n_models} models was used.",) if n_models > 1 else ()
    return Structure(file.topology, np.array(positions, dtype=np.float64), _box(file.topology.getPeriodicBoxVectors()), notes=notes)


def _read_prmtop(path: Path) -> Structure:
    file = app.AmberPrmtopFile(str(path))
    create = lambda: file.createSystem(nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False)  # noqa: E731
    return Structure(file.topology, None, _box(file.topology.getPeriodicBoxVectors()), create)


def _read_top(path: Path) -> Structure:
    """A ``.top`` file is Amber's where it begins with %VERSION, else GROMACS's."""
    with open(path) as file:
        if file.readline().startswith("%VERSION"):
            return _read_prmtop(path)
    top = app.GromacsTopFile(str(path))
    create = lambda: top.createSystem(nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False)  # noqa: E731
    return Structure(top.topology, None, None, create)


def _read_inpcrd(path: Path) -> Coordinates:
    file = app.AmberInpcrdFile(str(path))
    return Coordinates(np.array(file.positions.value_in_unit(unit.nanometer), dtype=np.float64), _box(file.boxVectors))


def _read_gro(path: Path) -> Coordinates:
    file = app.GromacsGroFile(str(path))
    positions = np.array(file.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
    box = _box(file.getPeriodicBoxVectors())
    return Coordinates(positions, box if box is not None and box.any() else None)


def _coordinates_of_structure(reader: Callable[[Path], Structure]) -> Callable[[Path], Coordinates]:
    def read(path: Path) -> Coordinates:
        structure = reader(path)
        if structure.positions is None:
            raise InputError(f"{path} holds no coordinates")
        return Coordinates(structure.positions, structure.box)

    return read


def _box(vectors: unit.Quantity | None) -> np.ndarray | None:
    return None if vectors is None else np.array(vectors.value_in_unit(unit.nanometer), dtype=np.float64)


_TOPOLOGIES: dict[str, Callable[[Path], Structure]] = {
    ".pdb": _read_pdb, ".ent": _read_pdb, ".cif": _read_mmcif, ".mmcif": _read_mmcif, ".pdbx": _read_mmcif,
    ".prmtop": _read_prmtop, ".parm7": _read_prmtop, ".top": _read_top,
}  # fmt: skip

_COORDINATES: dict[str, Callable[[Path], Coordinates]] = {
    ".inpcrd": _read_inpcrd, ".rst7": _read_inpcrd, ".crd": _read_inpcrd, ".gro": _read_gro,
    ".pdb": _coordinates_of_structure(_read_pdb), ".cif": _coordinates_of_structure(_read_mmcif),
}  # fmt: skip
