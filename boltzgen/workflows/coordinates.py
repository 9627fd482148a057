"""Which coordinates and basins a run looks at: the user's, or the backbone's by default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from boltzgen.config import SystemConfig
from boltzgen.core import Molecule
from boltzgen.cvs import CollectiveVariables, Dihedral
from boltzgen.errors import ConfigError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.named_variables import build_cvs
from boltzgen.paths import Periods
from boltzgen.transforms.zmatrix import build_zmatrix

Ranges = dict[str, tuple[float, float]]

#: Atom names along a backbone dihedral, and what it is called.
_BACKBONE: dict[tuple[str, ...], str] = {("C", "N", "CA", "C"): "phi", ("N", "CA", "C", "N"): "psi"}
#: At most this many torsions are looked at where the user names none and there is no backbone.
_MOST_TORSIONS = 4
#: The basin compared with the rest by default, rad.
_DEFAULT_BASIN = ("phi_positive", (0.0, 2.0))


def collective_variables(config: SystemConfig, loaded: LoadedSystem) -> CollectiveVariables:
    """The configured coordinates; else those of :func:`found_variables`, of one molecule.

    Raises:
        ConfigError: If a coordinate names an atom that there is not, or a selection matches another number of atoms than needed.
        InputError: If a file of a coordinate cannot be read or does not fit the system.
        TopologyError: If none is configured and the atoms are not one molecule (states of a difference: there are none then).
    """
    if config.collective_variables:
        return build_cvs(config.collective_variables, loaded, trust=config.trust_files)
    if config.task == "tfep" and not loaded.is_one_molecule:
        return CollectiveVariables(())
    return found_variables(loaded.molecule)


def found_variables(molecule: Molecule) -> CollectiveVariables:
    """φ and ψ of every residue; else torsions about bonds between heavy atoms."""
    short = [name.rpartition("-")[2] for name in molecule.names]
    found: dict[str, list[tuple[int, ...]]] = {"phi": [], "psi": []}
    for atoms in _dihedrals(molecule):
        for path in (atoms, atoms[::-1]):
            kind = _BACKBONE.get(tuple(short[a] for a in path))
            if kind and path not in found[kind]:
                found[kind].append(path)
    if found["phi"] or found["psi"]:
        return CollectiveVariables(
            Dihedral(kind if len(paths) == 1 else f"{kind}{k + 1}", path) for kind, paths in found.items() for k, path in enumerate(paths)
        )
    zmatrix = build_zmatrix(molecule)
    rows = [
        row
        for row, improper, fold in zip(zmatrix.rows.tolist(), zmatrix.improper, zmatrix.rotor_fold, strict=True)
        if row[3] >= 0 and not improper and fold == 1
    ]
    heavy = [row for row in rows if all(molecule.elements[atom] != "H" for atom in row)]
    return CollectiveVariables(Dihedral("torsion_" + "_".join(map(str, row)), row) for row in (heavy or rows)[:_MOST_TORSIONS])


def basins(config: SystemConfig, variables: CollectiveVariables) -> dict[str, Ranges]:
    """The configured basins; else φ in (0, 2) rad where there is one φ.

    Raises:
        ConfigError: If a basin is a range of a coordinate that was not found.
    """
    if config.basins:
        known = [variable.name for variable in variables]
        for basin, ranges in config.basins.items():
            for name in ranges:
                if name not in known:
                    found = ", ".join(known) or "none"
                    raise ConfigError(
                        f"basins.{basin}: expected a coordinate of this molecule (found: {found}), got {name!r}; "
                        "define it under collective_variables"
                    )
        return config.basin_ranges
    name, limits = _DEFAULT_BASIN
    return {name: {"phi": limits}} if any(v.name == "phi" for v in variables) else {}


def inside(ranges: Ranges, values: np.ndarray, variables: CollectiveVariables) -> Tensor:
    """Rows ``[n]`` whose values ``[n, k]`` lie in a basin; see :func:`within`."""
    return torch.from_numpy(within(ranges, values, variables.names, variables.periods))


def within(ranges: Ranges, values: np.ndarray, names: Sequence[str], periods: Periods) -> np.ndarray:
    """Which rows lie in a basin: low ≤ ξ < high of every variable it names, on a circle from low on to high.

    Values and limits on a circle may be in any turn. A value that is NaN is in no basin.

    Args:
        ranges: Variable → (low, high); on a circle low may be the larger one.
        values: ``[n, k]``.
        names: Of the k variables.
        periods: Of the k variables, None where there is none.

    Returns:
        bool ``[n]``.
    """
    rows = np.ones(len(values), dtype=bool)
    for name, (low, high) in ranges.items():
        column, period = values[:, names.index(name)], periods[names.index(name)]
        if period is None:
            rows &= (column >= low) & (column < high)
        elif high - low < period:
            rows &= np.remainder(column - low, period) < np.remainder(high - low, period)
        else:
            rows &= np.isfinite(column)
    return rows


def _dihedrals(molecule: Molecule) -> list[tuple[int, int, int, int]]:
    """All proper dihedrals of heavy atoms, each in one direction."""
    heavy = [element != "H" for element in molecule.elements]
    neighbours = {atom: [b for b in molecule.neighbours(atom) if heavy[b]] for atom in range(molecule.n_atoms) if heavy[atom]}
    return [
        (a, j, k, b)
        for j in neighbours
        for k in neighbours[j]
        if j < k
        for a in neighbours[j]
        for b in neighbours[k]
        if a != k and b not in (j, a)
    ]
