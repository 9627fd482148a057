"""The Z-matrix: structure, sectors and refusals."""

from __future__ import annotations

import mdtraj
import numpy as np
import pytest
import torch

from boltzgen.core import Molecule
from boltzgen.errors import ShapeError, TopologyError
from boltzgen.md.loading import load
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import build_zmatrix, check_geometry, sector_signs
from tests import molecules

CAPPED = ["capped_valine", "capped_serine", "capped_phenylalanine", "capped_proline", "alanine_dipeptide_vacuum"]
MOLECULES = {
    **{name: (lambda name=name: molecules.read(name)[0]) for name in CAPPED},
    "water": molecules.water,
    "ethane": molecules.ethane,
    "methanol": molecules.methanol,
    "neopentane": molecules.neopentane,
    "cyclopropane": molecules.cyclopropane,
}


@pytest.mark.parametrize("name", MOLECULES)
def test_every_atom_is_placed_once_on_bonds_after_its_references(name: str) -> None:
    molecule = MOLECULES[name]()
    zmatrix = build_zmatrix(molecule)
    assert sorted(zmatrix.rows[:, 0]) == list(range(molecule.n_atoms))
    placed: set[int] = set()
    for i, (atom, *references) in enumerate(zmatrix.rows.tolist()):
        used = [r for r in references if r >= 0]
        assert len(used) == min(i, 3)
        assert set(used) <= placed
        assert len({atom, *used}) == len(used) + 1
        if i:
            assert used[0] in molecule.neighbours(atom)
        closes_ring = i > 2 and used[1] in molecule.neighbours(atom)
        if i > 1 and not closes_ring:
            assert used[1] in molecule.neighbours(used[0])
        if i > 2 and not closes_ring:
            assert used[2] in molecule.neighbours(used[0] if zmatrix.improper[i] else used[1])
        placed.add(atom)


@pytest.mark.parametrize("name", MOLECULES)
def test_one_proper_torsion_per_rotated_bond(name: str) -> None:
    zmatrix = build_zmatrix(MOLECULES[name]())
    proper = [frozenset(row[1:3]) for row, improper in zip(zmatrix.rows[3:].tolist(), zmatrix.improper[3:], strict=True) if not improper]
    assert len(proper) == len(set(proper))


@pytest.mark.parametrize("name", CAPPED)
def test_backbone_torsions_are_rows(name: str) -> None:
    molecule, _ = molecules.read(name)
    rows = {tuple(row) for row in build_zmatrix(molecule).rows[3:].tolist()}
    trajectory = mdtraj.load(molecules.SYSTEMS / name / "topology.pdb")
    for indices, _ in (mdtraj.compute_phi(trajectory), mdtraj.compute_psi(trajectory), mdtraj.compute_omega(trajectory)):
        for quadruple in indices.tolist():
            assert tuple(quadruple) in rows or tuple(quadruple[::-1]) in rows


def test_alanine_dipeptide_rows_and_sectors() -> None:
    molecule, _ = molecules.read("alanine_dipeptide_vacuum")
    zmatrix = build_zmatrix(molecule)
    rows = {tuple(row): i for i, row in enumerate(zmatrix.rows.tolist())}
    phi, psi = rows[(4, 6, 8, 14)], rows[(16, 14, 8, 6)]
    assert not zmatrix.improper[[phi, psi]].any()
    assert (zmatrix.rotor_fold == 3).sum() == 3
    assert {int(j) for j in zmatrix.rows[zmatrix.rotor_fold == 3, 1]} == {1, 10, 18}
    assert {int(j) for j in zmatrix.rows[zmatrix.chiral, 1]} == {1, 8, 10, 18}
    assert zmatrix.chiral.sum() == 8  # two signs per centre, of which one is free: 2 mirror images x 2^3 methyl labellings


def test_sector_signs_tell_mirror_images_and_labellings_apart() -> None:
    molecule, x = molecules.read("alanine_dipeptide_vacuum")
    zmatrix = build_zmatrix(molecule)
    transform = InternalCoordinates(zmatrix)
    swapped = x.clone()
    swapped[:, [11, 12]] = x[:, [12, 11]]
    cycled = x.clone()
    cycled[:, [11, 12, 13]] = x[:, [12, 13, 11]]
    signs = sector_signs(zmatrix, transform.inverse(torch.cat([x, -x, swapped, cycled]))[0])
    assert signs.shape == (4, 8)
    assert torch.equal(signs[0], -signs[1])
    beta = torch.from_numpy(zmatrix.rows[zmatrix.chiral, 1] == 10)
    assert torch.equal(signs[2][beta], -signs[0][beta])
    assert torch.equal(signs[2][~beta], signs[0][~beta])
    assert torch.equal(signs[0], signs[3])  # a cyclic permutation is a rotation of the rotor, not another sector


def test_symmetric_rotors_of_small_molecules() -> None:
    assert (build_zmatrix(molecules.methanol()).rotor_fold == 3).sum() == 1
    assert (build_zmatrix(molecules.neopentane()).rotor_fold == 3).sum() == 4
    assert (build_zmatrix(molecules.water()).rotor_fold == 1).all()


@pytest.mark.parametrize(("name", "closing"), [("capped_proline", {"CG"}), ("capped_phenylalanine", {"CZ"})])
def test_the_atom_that_closes_a_ring_hangs_between_its_two_neighbours(name: str, closing: set[str]) -> None:
    loaded = load(molecules.SYSTEMS / name / "topology.pdb", molecules.SYSTEMS / name / "system.xml")
    molecule, x = loaded.molecule, loaded.positions
    assert len(molecule.bonds) == molecule.n_atoms  # one ring
    zmatrix = build_zmatrix(molecule)
    found = [i for i, (atom, _, k, _) in enumerate(zmatrix.rows.tolist()) if i > 2 and k in molecule.neighbours(atom)]
    assert {molecule.names[zmatrix.rows[i, 0]].rpartition("-")[2] for i in found} == closing
    assert zmatrix.improper[found].all()
    assert not zmatrix.chiral[found].any()
    coordinates = InternalCoordinates(zmatrix)
    q, _ = coordinates.inverse(torch.as_tensor(x, dtype=torch.float64)[None])
    turned = q.repeat(5, 1)
    column = coordinates.torsion_columns[found[0] - 3]
    turned[:, column] += torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)  # puckering
    y, _ = coordinates(turned)
    atom, _, partner, _ = zmatrix.rows[found[0]].tolist()
    lengths = (y[:, atom] - y[:, partner]).norm(dim=-1)
    assert torch.allclose(lengths, lengths[:1].expand(5), atol=1e-12)


def test_constrained_bonds_are_found() -> None:
    molecule, _ = molecules.read("alanine_dipeptide_vacuum", constrain_hydrogens=True)
    zmatrix = build_zmatrix(molecule)
    hydrogen = np.array([molecule.elements[a] == "H" for a in zmatrix.rows[:, 0]])
    assert np.array_equal(~np.isnan(zmatrix.fixed_bond), hydrogen)


def test_refusals_name_the_problem() -> None:
    with pytest.raises(TopologyError, match="at least 3 atoms, got 2"):
        build_zmatrix(molecules.graph("HH", [(0, 1)]))
    with pytest.raises(TopologyError, match=r"not connected: 3 of 5 .* atom 3 \(C3\)"):
        build_zmatrix(molecules.graph("CCCCC", [(0, 1), (1, 2), (3, 4)]))
    with pytest.raises(TopologyError, match="not connected"):
        build_zmatrix(molecules.graph("OHH", []))
    with pytest.raises(TopologyError, match="not between two different atoms"):
        build_zmatrix(molecules.graph("OHH", [(0, 1), (0, 7)]))
    ring = molecules.graph("CCC", [(0, 1), (1, 2), (2, 0)], constraints={(1, 2): 0.15, (0, 2): 0.15, (0, 1): 0.15})
    with pytest.raises(TopologyError, match="not a bond of the Z-matrix"):
        build_zmatrix(ring)
    rigid_water = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(1, 2): 0.15})
    with pytest.raises(TopologyError, match="constraints=HBonds"):
        build_zmatrix(rigid_water)
    with pytest.raises(TopologyError, match="expected a positive one"):
        build_zmatrix(molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): 0.0}))


def test_geometries_that_internal_coordinates_cannot_hold_are_refused() -> None:
    molecule: Molecule = molecules.graph("CCNH", [(0, 1), (1, 2), (0, 3)])
    zmatrix = build_zmatrix(molecule)
    bent = torch.tensor([[[0.0, 0, 0], [0.15, 0, 0], [0.2, 0.1, 0], [-0.05, 0.05, 0.05]]], dtype=torch.float64)
    check_geometry(zmatrix, bent)
    linear = bent.clone()
    linear[0, 2] = torch.tensor([0.27, 0.001, 0.0])
    with pytest.raises(TopologyError, match=r"2–1–0 is 179\.5 degrees.*nitrile"):
        check_geometry(zmatrix, torch.cat([bent, linear]))
    check_geometry(zmatrix, torch.cat([*[bent] * 40, linear]))  # a soft angle may be straight now and then
    coinciding = bent.clone()
    coinciding[0, 3] = coinciding[0, 0]
    with pytest.raises(TopologyError, match="atoms 3 and 0 coincide"):
        check_geometry(zmatrix, coinciding)
    with pytest.raises(ShapeError, match=r"\[b, 4, 3\]"):
        check_geometry(zmatrix, bent[:, :3])
    rigid = build_zmatrix(molecules.graph("CCNH", [(0, 1), (1, 2), (0, 3)], constraints={(0, 3): 0.11}))
    with pytest.raises(TopologyError, match=r"constrained to 0\.11000 nm but measures 0\.08660"):
        check_geometry(rigid, bent)


@pytest.mark.parametrize("name", CAPPED)
def test_prepared_structures_pass(name: str) -> None:
    molecule, x = molecules.read(name)
    check_geometry(build_zmatrix(molecule), x)
