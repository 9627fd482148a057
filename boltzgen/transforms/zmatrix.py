"""Z-matrices: which bond, angle and torsion place every atom of a molecule, found from its bond graph.

The bond graph is reduced to a spanning tree that starts at a bonded chain of three central heavy atoms. Every atom hangs on
its parent j, with the angle to the grandparent k. The first child of j carries the torsion of the bond j–k (a proper
dihedral); every further child is placed relative to that first child (an improper dihedral), so that one torsion turns all of
them together and the others hardly fluctuate (Parsons et al., J. Comput. Chem. 26, 1063 (2005), for the geometry).

An atom that closes a ring is bonded to its parent j and to a second placed atom m. Its angle is measured from m instead of the
grandparent, at–j–m, and its torsion turns it about the axis j–m: puckering then leaves the closing bond as it is, which
otherwise would be a strongly curved function of several soft torsions. Both neighbours count as children of each other there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Molecule
from boltzgen.errors import ShapeError, TopologyError

#: Angles closer than this to 0 or 180 degrees cannot carry a torsion.
LINEAR_DEGREES = 5.0
#: Share of configurations in which an angle may be that straight.
LINEAR_SHARE = 0.05
#: Largest deviation of a constrained bond from its length, in nm.
CONSTRAINT_TOLERANCE_NM = 1e-3


@dataclass(frozen=True)
class ZMatrix:
    """Which atoms place which atom; the rows are in an order in which every reference is placed before it is used.

    Attributes:
        rows: ``[n, 4]`` int64: atom, bonded-to j, angle reference k, torsion reference l; −1 where absent (first three rows).
        improper: ``[n]`` bool: not a proper dihedral around a bond j–k: l is a sibling of the atom on j, or the atom closes a ring.
        chiral: ``[n]`` bool: improper row at a four-coordinate centre j: the sign of its torsion tells the sector (mirror
            image or labelling of hydrogens).
        rotor_fold: ``[n]`` int64: 3 for the proper row that turns three equal terminal hydrogens (CH3, NH3+); otherwise 1.
        fixed_bond: ``[n]`` float64: constrained length in nm of the bond atom–j, NaN where free.
    """

    rows: np.ndarray
    improper: np.ndarray
    chiral: np.ndarray
    rotor_fold: np.ndarray
    fixed_bond: np.ndarray

    @property
    def n_atoms(self) -> int:
        return len(self.rows)


def build_zmatrix(molecule: Molecule) -> ZMatrix:
    """Z-matrix of one connected molecule.

    A bond that closes a ring is no coordinate of its own: its length follows from the angle at the parent.
    Heavy atoms come before hydrogens, so that the torsions of the backbone are proper rows.

    Args:
        molecule: The bond graph, with the constrained bonds.

    Returns:
        The Z-matrix, its rows in the order of placement.

    Raises:
        TopologyError: If there are fewer than three atoms, the bond graph is not connected, or a constraint is not a bond of
            the Z-matrix.
    """
    n = molecule.n_atoms
    if n < 3:
        raise TopologyError(f"internal coordinates need a molecule of at least 3 atoms, got {n}; use Cartesian coordinates")
    graph = _graph(molecule)
    _require_connected(graph, molecule)
    heavy = [element not in ("H", "D") for element in molecule.elements]
    backbone = _backbone(graph, molecule.elements)
    rows, improper, closing = _grow(graph, heavy, backbone)
    hydrogens = [not heavy[a] and len(graph[a]) == 1 for a in range(n)]
    table = np.array(rows, dtype=np.int64)
    chiral = np.array([flag and row[0] not in closing and len(graph[row[1]]) == 4 for row, flag in zip(rows, improper, strict=True)])
    rotor = [_is_rotor(row, flag, graph, hydrogens) for row, flag in zip(rows, improper, strict=True)]
    return ZMatrix(rows=table, improper=np.array(improper), chiral=chiral, rotor_fold=np.where(rotor, 3, 1).astype(np.int64),
                   fixed_bond=_fixed_bonds(table, molecule))  # fmt: skip


def sector_signs(zmatrix: ZMatrix, q: Tensor) -> Tensor:
    """Signs of the improper torsions that tell mirror images and hydrogen labellings apart.

    Args:
        zmatrix: The Z-matrix.
        q: Internal coordinates ``[b, n_internal]``; the torsions are their last n − 3 columns.

    Returns:
        ``[b, n_chiral]`` of −1 and +1, float64.
    """
    torsions = q[:, q.shape[1] - (zmatrix.n_atoms - 3) :]
    signed = torch.sin(torsions[:, torch.from_numpy(zmatrix.chiral[3:])])
    return torch.where(signed < 0, -1.0, 1.0).to(torch.float64)


def check_geometry(zmatrix: ZMatrix, x: Tensor) -> None:
    """Refuse coordinates for which the Z-matrix is singular.

    Args:
        zmatrix: The Z-matrix.
        x: Configurations ``[b, n, 3]`` in nm.

    Raises:
        ShapeError: If ``x`` has another shape.
        TopologyError: If two bonded atoms coincide, three reference atoms are nearly collinear, or a constrained bond has
            another length.
    """
    if x.ndim != 3 or tuple(x.shape[1:]) != (zmatrix.n_atoms, 3):
        raise ShapeError(f"expected coordinates [b, {zmatrix.n_atoms}, 3], got {list(x.shape)}")
    x = x.detach().to(torch.float64)
    rows = torch.from_numpy(zmatrix.rows)
    lengths = (x[:, rows[1:, 0]] - x[:, rows[1:, 1]]).norm(dim=-1)
    if not bool((lengths > 1e-6).all()):
        atom, j = rows[1 + int((~(lengths > 1e-6)).any(0).nonzero()[0]), :2].tolist()
        raise TopologyError(f"bonded atoms {atom} and {j} coincide or have no finite coordinates; check the structure")
    fixed = torch.from_numpy(zmatrix.fixed_bond)[1:]
    off = (lengths - fixed).abs() > CONSTRAINT_TOLERANCE_NM
    if bool(off.any()):
        row = int(off.any(0).nonzero()[0])
        atom, j = rows[1 + row, :2].tolist()
        measured = float(lengths[off[:, row], row][0])
        raise TopologyError(f"bond {atom}–{j} is constrained to {float(fixed[row]):.5f} nm but measures {measured:.5f} nm; "
                            "use coordinates that obey the constraints, or a system without them")  # fmt: skip
    _refuse_linear(torch.cat([rows[2:, :3], rows[3:, 1:]]), x)


def _refuse_linear(triples: Tensor, x: Tensor) -> None:
    """Raise if an angle over ``triples`` ``[m, 3]`` is closer than LINEAR_DEGREES to 0 or 180 degrees in more than a few of the rows.

    In a soft chain an angle is straight now and then, where its density, which has the factor sin θ, vanishes.
    """
    a, b, c = (x[:, column] for column in triples.unbind(1))
    cosine = torch.nn.functional.cosine_similarity(a - b, c - b, dim=-1)
    linear = ~(cosine.abs() < float(np.cos(np.deg2rad(LINEAR_DEGREES))))
    often = linear.double().mean(dim=0) > LINEAR_SHARE
    if bool(often.any()):
        column = int(often.nonzero()[0])
        degrees = float(torch.rad2deg(torch.arccos(cosine[linear[:, column], column][0].clamp(-1, 1))))
        atoms = "–".join(str(int(atom)) for atom in triples[column])
        raise TopologyError(f"the angle {atoms} is {degrees:.1f} degrees; a torsion over collinear atoms (alkyne, nitrile) is not defined "
                            "and internal coordinates cannot describe this molecule: use Cartesian coordinates")  # fmt: skip


def _graph(molecule: Molecule) -> list[list[int]]:
    """Neighbours of every atom, ascending."""
    graph: list[list[int]] = [[] for _ in range(molecule.n_atoms)]
    for a, b in np.unique(np.sort(molecule.bonds, axis=1), axis=0) if len(molecule.bonds) else []:
        if a == b or a < 0 or b >= molecule.n_atoms:
            raise TopologyError(f"bond {a}–{b} is not between two different atoms of 0 … {molecule.n_atoms - 1}")
        graph[a].append(int(b))
        graph[b].append(int(a))
    return [sorted(neighbours) for neighbours in graph]


def _distances(graph: list[list[int]], start: int, *, without: int = -1) -> dict[int, int]:
    """Bonds between ``start`` and every atom reachable without passing ``without``."""
    distance = {start: 0}
    queue = deque([start])
    while queue:
        atom = queue.popleft()
        for other in graph[atom]:
            if other != without and other not in distance:
                distance[other] = distance[atom] + 1
                queue.append(other)
    return distance


def _require_connected(graph: list[list[int]], molecule: Molecule) -> None:
    reached = _distances(graph, 0)
    if len(reached) < len(graph):
        lost = next(a for a in range(len(graph)) if a not in reached)
        name = f" ({molecule.names[lost]})" if lost < len(molecule.names) else ""
        raise TopologyError(f"the bond graph is not connected: {len(reached)} of {len(graph)} atoms hang together and atom {lost}{name} "
                            "is not among them; add the missing bonds (CONECT records) to the topology, or keep one molecule")  # fmt: skip


def _backbone(graph: list[list[int]], elements: tuple[str, ...]) -> set[int]:
    """Atoms N, Cα and C of peptides: Cα is bonded to a nitrogen and to a carbonyl carbon; caps' C and N belong to it."""
    carbonyl = {a for a, e in enumerate(elements) if e == "C" and any(elements[b] == "O" and len(graph[b]) == 1 for b in graph[a])}
    alpha = {a for a, e in enumerate(elements)
             if e == "C" and any(elements[b] == "N" for b in graph[a]) and any(b in carbonyl for b in graph[a])} - carbonyl  # fmt: skip
    nitrogen = {a for a, e in enumerate(elements) if e == "N" and any(b in carbonyl or b in alpha for b in graph[a])}
    return carbonyl | alpha | nitrogen if alpha else set()


def _preference(atom: int, centre: int, graph: list[list[int]], heavy: list[bool], backbone: set[int]) -> tuple[bool, bool, int, int]:
    """Sort key of the children of ``centre``: backbone, then heavy atoms, then the larger branch."""
    branch = _distances(graph, atom, without=centre)
    return atom not in backbone, not heavy[atom], -sum(heavy[a] for a in branch), atom


def _root(graph: list[list[int]], heavy: list[bool], backbone: set[int]) -> tuple[int, int, int]:
    """The bonded chain that starts the Z-matrix: the most central atom between its two preferred neighbours."""

    def centrality(atom: int) -> tuple[int, int, int, int, int]:
        bonded_heavy = sum(heavy[b] for b in graph[atom])
        on_backbone = sum(b in backbone for b in graph[atom]) if atom in backbone else 0
        hydrogens = len(graph[atom]) - bonded_heavy
        return -min(bonded_heavy, 2), -min(on_backbone, 2), max(_distances(graph, atom).values()), hydrogens, atom

    centre = min((a for a in range(len(graph)) if len(graph[a]) >= 2), key=centrality)
    first, third = sorted(graph[centre], key=lambda a: _preference(a, centre, graph, heavy, backbone))[:2]
    return first, centre, third


def _grow(graph: list[list[int]], heavy: list[bool], backbone: set[int]) -> tuple[list[tuple[int, int, int, int]], list[bool], set[int]]:
    """Rows, improper flags and ring-closing atoms of the spanning tree: breadth first over heavy atoms, then over all."""
    first, second, third = _root(graph, heavy, backbone)
    rows = [(first, -1, -1, -1), (second, first, -1, -1), (third, second, first, -1)]
    improper = [False, False, False]
    parent = {first: second, second: first, third: second}
    first_child = {second: third}
    closing: set[int] = set()
    for allowed in (heavy, [True] * len(graph)):
        queue = deque(row[0] for row in rows)
        while queue:
            j = queue.popleft()
            children = [a for a in graph[j] if allowed[a] and a not in parent]
            for atom in sorted(children, key=lambda a: _preference(a, j, graph, heavy, backbone)):
                k = parent[j]
                sibling = first_child.get(j)
                opposite = third if j == first else parent[k]
                partner = next((m for m in graph[atom] if m in parent and m not in (j, k)), None)
                if partner is None:
                    rows.append((atom, j, k, opposite if sibling is None else sibling))
                else:
                    rows.append((atom, j, partner, k))
                    closing.add(atom)
                    first_child[atom] = partner
                    first_child.setdefault(partner, atom)
                improper.append(sibling is not None or partner is not None)
                first_child.setdefault(j, atom)
                parent[atom] = j
                queue.append(atom)
    return rows, improper, closing


def _is_rotor(row: tuple[int, int, int, int], improper: bool, graph: list[list[int]], hydrogen: list[bool]) -> bool:
    """Whether a proper row turns exactly three equal terminal hydrogens."""
    atom, j, _, reference = row
    return not improper and reference >= 0 and hydrogen[atom] and len(graph[j]) == 4 and sum(hydrogen[a] for a in graph[j]) == 3


def _fixed_bonds(rows: np.ndarray, molecule: Molecule) -> np.ndarray:
    """Constrained length of every row's bond in nm, NaN where free."""
    fixed = np.full(len(rows), np.nan)
    row_of = {frozenset((int(atom), int(j))): i for i, (atom, j) in enumerate(rows[:, :2]) if j >= 0}
    for (a, b), length in zip(molecule.constraints, molecule.constraint_lengths, strict=True):
        row = row_of.get(frozenset((int(a), int(b))))
        if row is None:
            raise TopologyError(f"the constraint between atoms {a} and {b} is not a bond of the Z-matrix (it closes a ring or fixes an "
                                "angle); prepare the system with constraints=HBonds or without constraints")  # fmt: skip
        if not length > 0:
            raise TopologyError(f"the constraint between atoms {a} and {b} has the length {length} nm; expected a positive one")
        fixed[row] = length
    return fixed
