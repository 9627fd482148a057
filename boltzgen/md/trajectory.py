"""Trajectories: what simulation or a user's file yields, and how it is split into data to train on and data to evaluate with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np

from boltzgen.core import Role
from boltzgen.errors import EnergyError, InputError
from boltzgen.estimators.timeseries import decorrelate, statistical_inefficiency
from boltzgen.files import written

#: Covalent radii in nm (Cordero et al., Dalton Trans. 2832 (2008)); other elements count as 0.15.
_COVALENT_RADII = {"H": 0.031, "C": 0.076, "N": 0.071, "O": 0.066, "F": 0.057, "Si": 0.111, "P": 0.107, "S": 0.105, "Cl": 0.102, "Br": 0.12}

Torsion = tuple[int, int, int, int]


@dataclass(frozen=True)
class Trajectory:
    """Frames at one temperature; rows are ordered by chain, then by time.

    Attributes:
        x: Configurations ``[n, atoms, 3]`` in nm, float64 (float32 if read from a file).
        u: Reduced potentials ``[n]`` in kT, float64.
        block: Time block of every frame within its chain ``[n]``, int64.
        chain: Independent chain, or set of replicas, of every frame ``[n]``, int64.
        temperature_kelvin: Temperature in kelvin.
        statistical_inefficiency: Frames worth one independent frame, of the slowest observable (≥ 1).
        n_force_evaluations: Force and energy evaluations spent, those of minimisation not counted.
        hot: The other temperatures of a ladder, ascending.
        notes: What a reader must know, one sentence each.
        role: ``train`` for the part of a split that models learn from: estimators refuse what rests on it.
    """

    x: np.ndarray
    u: np.ndarray
    block: np.ndarray
    chain: np.ndarray
    temperature_kelvin: float
    statistical_inefficiency: float
    n_force_evaluations: int
    hot: tuple[Trajectory, ...] = ()
    notes: tuple[str, ...] = ()
    role: Role = "evaluate"

    def __len__(self) -> int:
        return len(self.u)

    def rows(self, index: np.ndarray) -> Trajectory:
        """The frames ``index``; hot trajectories stay as they are."""
        return replace(self, x=self.x[index], u=self.u[index], block=self.block[index], chain=self.chain[index])


def torsion_angles(x: np.ndarray, torsions: Sequence[Torsion]) -> np.ndarray:
    """Torsions in (−π, π] of configurations ``[n, atoms, 3]``, as ``[n, t]``."""
    a, b, c, d = (x[:, [t[k] for t in torsions]].astype(np.float64) for k in range(4))
    first, axis, last = b - a, c - b, d - c
    n1, n2 = np.cross(first, axis), np.cross(axis, last)
    return np.arctan2((first * n2).sum(-1) * np.linalg.norm(axis, axis=-1), (n1 * n2).sum(-1))


def slowest_inefficiency(x: np.ndarray, u: np.ndarray, *, chain: np.ndarray, torsions: Sequence[Torsion]) -> float:
    """Largest statistical inefficiency, in frames, of the energy and of cos and sin of the torsions, chains of equal length together."""
    n_chains = len(np.unique(chain))
    observables = [u]
    if torsions:
        angles = torsion_angles(x, torsions)
        observables += [*np.cos(angles).T, *np.sin(angles).T]
    return max(statistical_inefficiency(o.reshape(n_chains, -1)) for o in observables)


def read_trajectory(
    paths: Sequence[Path], topology: Any, *, temperature_kelvin: float, energies: Callable[[np.ndarray], np.ndarray]
) -> Trajectory:
    """A user's trajectory, its atoms in the order of the topology and its molecules whole.

    PDB files carry names and are brought into the topology's order; XTC, DCD and NetCDF carry none, so that only their atom count and
    bond lengths can be checked.

    Args:
        paths: One file per independent chain: XTC, DCD, NetCDF or PDB.
        topology: ``openmm.app.Topology`` or ``mdtraj.Topology`` of the system.
        temperature_kelvin: Temperature at which the frames were sampled.
        energies: Maps configurations ``[n, atoms, 3]`` (nm, float64) to reduced potentials ``[n]`` at that temperature.

    Returns:
        All frames; one chain per file, ten time blocks each.

    Raises:
        InputError: If a file is missing, unreadable or empty, or holds another molecule.
        EnergyError: If a frame has no finite energy; the message names the frame and the file.
    """
    if not paths:
        raise InputError("expected at least one trajectory file, got none; name an XTC, DCD, NetCDF or PDB file")
    expected = topology if isinstance(topology, mdtraj.Topology) else mdtraj.Topology.from_openmm(topology)
    pieces = [read_frames(Path(path), expected) for path in paths]
    u = []
    for path, x in zip(paths, pieces, strict=True):
        values = np.asarray(energies(x.astype(np.float64)), dtype=np.float64)
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise EnergyError(f"frame {row} of {path} has the energy {values[row]}; expected a finite one: is it a frame of this system?")
        u.append(values)
    rounded = any(Path(path).suffix.lower() in {".xtc", ".pdb"} for path in paths)
    notes = ("coordinates were rounded to about 0.001 nm by the file format; energies carry that rounding",) if rounded else ()
    return replace(of_frames(pieces, u, topology=expected, temperature_kelvin=temperature_kelvin), notes=notes)


def of_frames(pieces: Sequence[np.ndarray], u: Sequence[np.ndarray], *, topology: Any, temperature_kelvin: float) -> Trajectory:
    """Frames of independent chains in the order of time, with ten time blocks each and their statistical inefficiency.

    Args:
        pieces: Configurations ``[n, atoms, 3]`` in nm of every chain.
        u: Their reduced potentials ``[n]`` in kT.
        topology: ``openmm.app.Topology`` or ``mdtraj.Topology``, for torsions.
        temperature_kelvin: Temperature at which the frames were sampled.
    """
    torsions = _heavy_torsions(topology if isinstance(topology, mdtraj.Topology) else mdtraj.Topology.from_openmm(topology))
    inefficiency = max(slowest_inefficiency(x, v, chain=np.zeros(len(v)), torsions=torsions) for x, v in zip(pieces, u, strict=True))
    return Trajectory(
        x=np.concatenate(pieces),
        u=np.concatenate(u),
        block=np.concatenate([time_blocks(len(v), 10) for v in u]),
        chain=np.repeat(np.arange(len(u)), [len(v) for v in u]),
        temperature_kelvin=temperature_kelvin,
        statistical_inefficiency=inefficiency,
        n_force_evaluations=sum(len(v) for v in u),
    )


def write_xtc(path: Path, x: np.ndarray, *, topology: Any) -> None:
    """Write frames to an XTC file, which keeps 0.001 nm: for looking at and for slow coordinates, not for energies.

    Args:
        path: File to write, replaced whole.
        x: Configurations ``[n, atoms, 3]`` in nm.
        topology: OpenMM topology, for the atom count.

    Raises:
        OutputError: If it cannot be written.
    """
    with written(path, remedy="free some space") as partial:
        mdtraj.Trajectory(x.astype(np.float32), mdtraj.Topology.from_openmm(topology)).save_xtc(str(partial))


def split_blocks(
    trajectory: Trajectory,
    *,
    n_blocks: int = 10,
    evaluate_fraction: float = 0.2,
    decorrelated: bool = True,
    evaluate_first: bool = False,
) -> tuple[Trajectory, Trajectory]:
    """Split every chain by time: its first blocks to train on, its last ones to evaluate with, or the other way round.

    A gap of one statistical inefficiency (of the slowest temperature) is dropped from the training part, next to the other one. Hot
    trajectories are split at the same times, since exchanges carry configurations between temperatures.

    Args:
        trajectory: Frames ordered by chain, then time.
        n_blocks: Time blocks per chain.
        evaluate_fraction: Fraction of the blocks kept for evaluation, rounded to whole blocks, at least one.
        decorrelated: Whether of the latter only every g-th frame is kept, g the statistical inefficiency: independent frames.
        evaluate_first: Whether the first blocks are kept for evaluation instead of the last.

    Returns:
        The trajectory to train on and the one to evaluate with. A note says so where the data are too short for a full gap.

    Raises:
        InputError: If the fraction is not inside (0, 1) or a chain has fewer frames than blocks.
    """
    if not 0 < evaluate_fraction < 1 or n_blocks < 2:
        raise InputError(f"expected a fraction inside (0, 1) and at least 2 blocks, got {evaluate_fraction} and {n_blocks}")
    n_evaluate = min(max(1, round(n_blocks * evaluate_fraction)), n_blocks - 1)
    slowest = ceil(max(t.statistical_inefficiency for t in (trajectory, *trajectory.hot)))
    shortest = int(np.unique(trajectory.chain, return_counts=True)[1].min())
    if shortest < n_blocks:
        raise InputError(
            f"expected at least {n_blocks} frames per chain, one per block, got {shortest}; simulate longer or save more often"
        )
    notes = trajectory.notes
    gap = min(slowest, shortest // n_blocks)
    if gap < slowest:
        notes += (
            f"the data are short: {slowest} frames count as one, but only {gap} separate training from evaluation, "
            "so the two are not fully independent",
        )
    shares = n_blocks, n_evaluate, gap
    parts = [_split(t, *shares, decorrelated=decorrelated, evaluate_first=evaluate_first) for t in (trajectory, *trajectory.hot)]
    train, evaluate = (replace(part[0], hot=part[1:], notes=notes) for part in zip(*parts, strict=True))
    return replace(train, role="train"), evaluate


def time_blocks(n: int, n_blocks: int) -> np.ndarray:
    """Time block of each of ``n`` consecutive frames, ``[n]``, int64."""
    return np.arange(n) * n_blocks // n


def _split(
    trajectory: Trajectory, n_blocks: int, n_evaluate: int, gap: int, *, decorrelated: bool, evaluate_first: bool
) -> tuple[Trajectory, Trajectory]:
    """One temperature: training rows and evaluation rows, blocks renumbered."""
    train, evaluate, block = [], [], np.empty_like(trajectory.block)
    for chain in np.unique(trajectory.chain):
        rows = np.flatnonzero(trajectory.chain == chain)
        block[rows] = time_blocks(len(rows), n_blocks)
        cut = int(np.searchsorted(block[rows], n_evaluate if evaluate_first else n_blocks - n_evaluate))
        train.append(rows[cut + gap :] if evaluate_first else rows[: max(cut - gap, 0)])
        held_out = rows[:cut] if evaluate_first else rows[cut:]
        inefficiency = trajectory.statistical_inefficiency
        evaluate.append(held_out[decorrelate(trajectory.u[held_out], inefficiency=inefficiency)] if decorrelated else held_out)
    renumbered = replace(trajectory, block=block)
    kept = renumbered.rows(np.concatenate(evaluate))
    return renumbered.rows(np.concatenate(train)), replace(kept, statistical_inefficiency=1.0) if decorrelated else kept


def read_frames(path: Path, topology: Any) -> np.ndarray:
    """Configurations ``[n, atoms, 3]`` in nm of one file, float32, in the topology's order, molecules whole.

    Args:
        path: XTC, DCD, NetCDF or PDB.
        topology: ``openmm.app.Topology`` or ``mdtraj.Topology`` of the system.

    Raises:
        InputError: If the file is missing, unreadable or empty, or holds another molecule.
    """
    expected = topology if isinstance(topology, mdtraj.Topology) else mdtraj.Topology.from_openmm(topology)
    if not path.is_file():
        raise InputError(f"there is no trajectory file {path}")
    try:
        if path.suffix.lower() == ".pdb":
            found = mdtraj.load_pdb(str(path))
            if found.n_atoms == expected.n_atoms:
                order, lengths, angles = _order(found.topology, expected, path), found.unitcell_lengths, found.unitcell_angles
                found = mdtraj.Trajectory(found.xyz[:, order], expected, unitcell_lengths=lengths, unitcell_angles=angles)
        else:
            with mdtraj.open(str(path)) as handle:
                _require_atoms(handle.read(1)[0].shape[1], expected, path)
            found = mdtraj.load(str(path), top=expected)
    except (OSError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise InputError(f"cannot read {path} as a trajectory ({error}); expected XTC, DCD, NetCDF or PDB") from error
    _require_atoms(found.n_atoms, expected, path)
    if found.n_frames == 0 or not np.isfinite(found.xyz).all():
        raise InputError(f"{path} has {'no frames' if found.n_frames == 0 else 'coordinates that are not numbers'}; write it again")
    if found.unitcell_lengths is not None and expected.n_bonds:
        found = found.make_molecules_whole(inplace=False)
    _require_bond_lengths(found.xyz, expected, path)
    return found.xyz


def _require_atoms(n_atoms: int, expected: mdtraj.Topology, path: Path) -> None:
    if n_atoms != expected.n_atoms:
        raise InputError(
            f"{path} holds {n_atoms} atoms, the topology {expected.n_atoms}: it is a trajectory of another molecule, or was written "
            "with only some of the atoms; give the trajectory of this system"
        )


def _order(found: mdtraj.Topology, expected: mdtraj.Topology, path: Path) -> np.ndarray:
    """Rows of the file in the order of the topology, matched by residue, atom name and element."""

    def keys(topology: mdtraj.Topology) -> list[tuple[int, str, str]]:
        return [(atom.residue.index, atom.name, atom.element.symbol) for atom in topology.atoms]

    position = {key: index for index, key in enumerate(keys(found))}
    missing = [key for key in keys(expected) if key not in position]
    if missing:
        residue, name, element = missing[0]
        raise InputError(
            f"{path} has no atom {name} ({element}) in residue {residue + 1}, which the topology has: it is a trajectory of another "
            "molecule or uses other atom names; give the trajectory of this system"
        )
    return np.array([position[key] for key in keys(expected)])


def _require_bond_lengths(xyz: np.ndarray, expected: mdtraj.Topology, path: Path) -> None:
    """Refuse frames whose typical bond lengths are chemically impossible for the topology's bonds."""
    for a, b in expected.bonds:
        length = float(np.median(np.linalg.norm(xyz[:, a.index] - xyz[:, b.index], axis=-1)))
        usual = _COVALENT_RADII.get(a.element.symbol, 0.15) + _COVALENT_RADII.get(b.element.symbol, 0.15)
        if not 0.6 * usual < length < 1.5 * usual:
            raise InputError(
                f"in {path} the bond {a}–{b} is {length:.3f} nm long, expected about {usual:.3f} nm: it is a trajectory of another "
                "molecule, has another atom order or unit, or is broken over the periodic boundary; write it whole, in the topology's order"
            )


def _heavy_torsions(topology: mdtraj.Topology) -> list[Torsion]:
    """One torsion of heavy atoms about every bond that has one."""
    heavy = {atom.index for atom in topology.atoms if atom.element.symbol != "H"}
    near: dict[int, list[int]] = {index: [] for index in heavy}
    for a, b in topology.bonds:
        if a.index in heavy and b.index in heavy:
            near[a.index].append(b.index)
            near[b.index].append(a.index)
    found = []
    for b, neighbours in near.items():
        for c in (c for c in neighbours if c > b):
            ends = [(a, d) for a in near[b] for d in near[c] if a != c and d != b and a != d]
            found += [(ends[0][0], b, c, ends[0][1])] if ends else []
    return found
