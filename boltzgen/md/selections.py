"""Atoms by mdtraj's selection language."""

from __future__ import annotations

import mdtraj
from openmm import app

from boltzgen.errors import ConfigError


def select_atoms(topology: app.Topology | mdtraj.Topology, selection: str) -> tuple[int, ...]:
    """Atoms that a selection finds, ascending.

    Args:
        topology: Where they are looked for.
        selection: Such as ``name CA and resid 1 to 8``.

    Raises:
        ConfigError: If mdtraj cannot read the selection, or it matches no atom.
    """
    atoms = topology if isinstance(topology, mdtraj.Topology) else mdtraj.Topology.from_openmm(topology)
    try:
        found = tuple(int(atom) for atom in atoms.select(selection))
    except Exception as error:  # mdtraj's parser raises whatever the first wrong word leads to
        raise ConfigError(f"mdtraj cannot read the selection {selection!r}: {error}") from None
    if not found:
        raise ConfigError(f"the selection {selection!r} matches none of the {atoms.n_atoms} atoms; resid counts from 0, resSeq as in the "
                          f"file")  # fmt: skip
    return found


def select_one_atom(topology: app.Topology | mdtraj.Topology, selection: str) -> int:
    """The one atom that a selection finds.

    Raises:
        ConfigError: As :func:`select_atoms`, and if it matches more than one; the message says how many.
    """
    found = select_atoms(topology, selection)
    if len(found) > 1:
        raise ConfigError(f"expected a selection of one atom, but {selection!r} matches {len(found)}: {_some(found)}")
    return found[0]


def _some(atoms: tuple[int, ...]) -> str:
    return ", ".join(map(str, atoms[:6])) + (", ..." if len(atoms) > 6 else "")
