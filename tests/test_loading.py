"""Files and objects are checked against each other; every refusal says what to do."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmmtools import testsystems

from boltzgen.errors import InputError, TopologyError
from boltzgen.md.checks import require_flow_over_all_atoms, require_unconstrained
from boltzgen.md.loading import load, load_objects


def _dipeptide(constraints: object = None) -> testsystems.AlanineDipeptideVacuum:
    return testsystems.AlanineDipeptideVacuum(constraints=constraints)


def _files(folder: Path, topology: app.Topology, system: openmm.System, positions: unit.Quantity) -> tuple[Path, Path]:
    pdb, xml = folder / "topology.pdb", folder / "system.xml"
    with open(pdb, "w") as file:
        app.PDBFile.writeFile(topology, positions, file)
    xml.write_text(openmm.XmlSerializer.serialize(system))
    return pdb, xml


def _water_box() -> testsystems.WaterBox:
    return testsystems.WaterBox(box_edge=1.9 * unit.nanometer, cutoff=0.9 * unit.nanometer, constrained=False)


def test_load_pdb_and_xml(tmp_path: Path) -> None:
    made = _dipeptide()
    pdb, xml = _files(tmp_path, made.topology, made.system, made.positions)
    loaded = load(pdb, xml)
    assert loaded.positions.shape == (22, 3)
    assert loaded.positions.dtype == np.float64
    np.testing.assert_allclose(loaded.positions, made.positions.value_in_unit(unit.nanometer), atol=1e-4)
    assert loaded.box is None
    assert {name.split()[0] for name in loaded.sha256} == {"topology", "system"}
    assert not any(isinstance(force, openmm.CMMotionRemover) for force in loaded.system.getForces())
    assert any("CMMotionRemover was left out" in note for note in loaded.notes)
    molecule = loaded.molecule
    assert molecule.n_atoms == 22
    assert len(molecule.bonds) == 21
    assert "ALA2-CA" in molecule.names
    assert len(molecule.constraints) == 0


def test_load_mmcif_gives_the_same(tmp_path: Path) -> None:
    made = _dipeptide()
    pdb, xml = _files(tmp_path, made.topology, made.system, made.positions)
    with open(tmp_path / "topology.cif", "w") as file:
        app.PDBxFile.writeFile(made.topology, made.positions, file)
    a, b = load(pdb, xml), load(tmp_path / "topology.cif", xml)
    assert a.molecule.names == b.molecule.names
    np.testing.assert_allclose(a.positions, b.positions, atol=2e-4)


def test_state_and_coordinates_replace_positions(tmp_path: Path) -> None:
    made = _dipeptide()
    pdb, xml = _files(tmp_path, made.topology, made.system, made.positions)
    moved = made.positions + 0.123456789 * unit.nanometer
    context = openmm.Context(made.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(moved)
    state = tmp_path / "state.xml"
    state.write_text(openmm.XmlSerializer.serialize(context.getState(positions=True)))
    loaded = load(pdb, xml, state=state)
    np.testing.assert_allclose(loaded.positions, moved.value_in_unit(unit.nanometer), atol=1e-12)
    assert "state state.xml" in loaded.sha256
    state.write_text(openmm.XmlSerializer.serialize(context.getState(energy=True)))
    with pytest.raises(InputError, match="holds no positions; save it with getPositions=True"):
        load(pdb, xml, state=state)


def test_amber_and_gromacs_files(tmp_path: Path) -> None:
    folder = Path(testsystems.get_data_filename("data/alanine-dipeptide-gbsa"))
    prmtop, inpcrd = folder / "alanine-dipeptide.prmtop", folder / "alanine-dipeptide.crd"
    loaded = load(prmtop, coordinates=inpcrd)
    assert loaded.molecule.n_atoms == 22
    assert any("No system file was given" in note for note in loaded.notes)
    with pytest.raises(InputError, match="holds no coordinates"):
        load(prmtop)
    top = tmp_path / "argon.top"
    top.write_text(
        "[ defaults ]\n1 2 yes 0.5 0.8333\n[ atomtypes ]\nAr Ar 18 39.95 0.0 A 0.34 0.99\n[ moleculetype ]\nAR 0\n[ atoms ]\n"
        "1 Ar 1 AR Ar 1 0.0 39.95\n[ system ]\nargon\n[ molecules ]\nAR 2\n"
    )
    gro = tmp_path / "argon.gro"
    rows = [
        "argon",
        "2",
        "    1AR     Ar    1   0.000   0.000   0.000",
        "    2AR     Ar    2   0.400   0.000   0.000",
        "   0.0   0.0   0.0",
    ]
    gro.write_text("\n".join(rows) + "\n")
    assert load(top, coordinates=gro).positions[1, 0] == pytest.approx(0.4)
    with pytest.raises(InputError, match=r"give the .top file as topology and the .gro file as coordinates"):
        load(gro)


def test_wrong_atom_count(tmp_path: Path) -> None:
    made = _dipeptide()
    pdb, xml = _files(tmp_path, made.topology, made.system, made.positions)
    system = copy.deepcopy(made.system)
    system.addParticle(1.0)
    with pytest.raises(InputError, match="the topology has 22 atoms and the system 23 particles"):
        load_objects(made.topology, system, made.positions)
    with pytest.raises(InputError, match=r"expected positions \[22, 3\] in nm, got \[21, 3\]"):
        load_objects(made.topology, made.system, made.positions[:21])
    with pytest.raises(InputError, match=r"no force field; give the system.xml"):
        load(pdb)
    with pytest.raises(InputError, match="there is no such file"):
        load(tmp_path / "nothing.pdb", xml)
    (tmp_path / "bad.pdb").write_text("ATOM      1  N   ALA A   1      xx\n")
    with pytest.raises(InputError, match="OpenMM cannot read it"):
        load(tmp_path / "bad.pdb", xml)
    with pytest.raises(InputError, match="expected a topology"):
        load(tmp_path / "molecule.xyz", xml)


def _break_mass(system: openmm.System) -> None:
    system.setParticleMass(3, float("nan"))


def _break_bond(system: openmm.System) -> None:
    force = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    i, j, length, _ = force.getBondParameters(1)
    force.setBondParameters(1, i, j, length, float("nan"))


def _break_charge(system: openmm.System) -> None:
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    force.setParticleParameters(0, float("inf"), 0.1, 0.1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_break_mass, "particle 4 has mass nan"),
        (_break_bond, "parameter 'k' of Bond 2 is NaN"),
        (_break_charge, "parameter 'q' of Particle 1 is Inf"),
    ],
)
def test_parameters_that_are_not_finite(spoil, message: str) -> None:
    made = _dipeptide()
    system = copy.deepcopy(made.system)
    spoil(system)
    with pytest.raises(InputError, match=message):
        load_objects(made.topology, system, made.positions)


def test_positions_that_are_not_finite() -> None:
    made = _dipeptide()
    x = np.array(made.positions.value_in_unit(unit.nanometer))
    x[5, 1] = np.nan
    with pytest.raises(InputError, match="the coordinates of atom 6 are not finite"):
        load_objects(made.topology, made.system, x)


def test_missing_box(tmp_path: Path) -> None:
    made = _water_box()
    bare = app.Topology()
    residue = bare.addResidue("AR", bare.addChain())
    for _ in range(2):
        bare.addAtom("Ar", app.element.argon, residue)
    system = openmm.System()
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.9)
    for _ in range(2):
        system.addParticle(39.95)
        force.addParticle(0.0, 0.34, 1.0)
    system.addForce(force)
    x = np.array([[0.0, 0, 0], [0.4, 0, 0]])
    with pytest.raises(InputError, match="periodic but no file has box vectors; add a CRYST1 record"):
        load_objects(bare, system, x)
    bare.setPeriodicBoxVectors(3.0 * np.eye(3))
    np.testing.assert_array_equal(load_objects(bare, system, x).box, 3.0 * np.eye(3))
    loaded = load_objects(made.topology, made.system, made.positions)
    assert loaded.box is not None
    pdb, xml = _files(tmp_path, made.topology, made.system, made.positions)
    np.testing.assert_array_equal(load(pdb, xml).box, loaded.box)  # the digits that the PDB cuts off come from the system


def test_barostat_is_left_out_and_said_so() -> None:
    made = _water_box()
    system = copy.deepcopy(made.system)
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    system.addForce(openmm.AndersenThermostat(300.0, 1.0))
    loaded = load_objects(made.topology, system, made.positions)
    assert any("MonteCarloBarostat was left out: the system is run at the volume of its box" in note for note in loaded.notes)
    assert any("AndersenThermostat was left out" in note for note in loaded.notes)
    names = {type(force).__name__ for force in loaded.system.getForces()}
    assert not names & {"MonteCarloBarostat", "AndersenThermostat", "CMMotionRemover"}
    assert any(isinstance(force, openmm.MonteCarloBarostat) for force in system.getForces())  # the user's own is untouched


def test_disconnected_molecule_names_the_fragments() -> None:
    made = _water_box()
    loaded = load_objects(made.topology, made.system, made.positions)
    with pytest.raises(TopologyError, match=r"needs? one connected molecule, got \d+ parts: HOH1-O to HOH1-H2 \(3 atoms\); HOH2-O"):
        _ = loaded.molecule


def _without_bonds(topology: app.Topology) -> app.Topology:
    bare = app.Topology()
    for chain in topology.chains():
        new_chain = bare.addChain(chain.id)
        for residue in chain.residues():
            new_residue = bare.addResidue(residue.name, new_chain, residue.id)
            for atom in residue.atoms():
                bare.addAtom(atom.name, atom.element, new_residue)
    return bare


def _bonds(topology: app.Topology) -> set[frozenset[int]]:
    return {frozenset((a.index, b.index)) for a, b in topology.bonds()}


@pytest.mark.parametrize("constraints", [None, app.HBonds])
def test_missing_bonds_come_from_the_force_field(constraints: object) -> None:
    made = _dipeptide(constraints)
    loaded = load_objects(_without_bonds(made.topology), made.system, made.positions)
    assert _bonds(loaded.topology) == _bonds(made.topology)
    assert any("21 bonds missing from the topology were taken from the force field" in note for note in loaded.notes)


def test_missing_bonds_without_a_force_field_bond_are_explained() -> None:
    made = _dipeptide()
    system = openmm.System()
    for _ in range(22):
        system.addParticle(1.0)
    loaded = load_objects(_without_bonds(made.topology), system, made.positions)
    assert any("22 atoms have no bond" in note and "CONECT" in note for note in loaded.notes)
    with pytest.raises(TopologyError, match="CONECT records"):
        _ = loaded.molecule


def test_hydrogen_constraints_are_kept_by_internal_coordinates_only() -> None:
    made = _dipeptide(app.HBonds)
    loaded = load_objects(made.topology, made.system, made.positions)
    require_flow_over_all_atoms(loaded)
    molecule = loaded.molecule
    assert len(molecule.constraints) == 12
    assert np.all(np.abs(molecule.constraint_lengths - 0.105) < 0.015)
    with pytest.raises(TopologyError, match=r"12 constrained bond lengths.*constraints=None, or use internal coordinates"):
        require_unconstrained(loaded)
    free = _dipeptide()
    require_unconstrained(load_objects(free.topology, free.system, free.positions))


def test_other_constraints_are_refused() -> None:
    made = _dipeptide(app.AllBonds)
    with pytest.raises(TopologyError, match=r"constrained and has no hydrogen \(constraints=AllBonds\).*constraints=HBonds"):
        require_flow_over_all_atoms(load_objects(made.topology, made.system, made.positions))
    angle = _dipeptide(app.HBonds)
    system = copy.deepcopy(angle.system)
    system.addConstraint(0, 2, 0.18)  # two hydrogens of one methyl
    loaded = load_objects(angle.topology, system, angle.positions)
    with pytest.raises(TopologyError, match=r"not bonded .*rigidWater=False"):
        require_flow_over_all_atoms(loaded)
    with pytest.raises(TopologyError, match="constrained but they are not bonded"):
        _ = loaded.molecule


def test_virtual_sites_and_frozen_atoms_are_refused() -> None:
    made = _dipeptide()
    system = copy.deepcopy(made.system)
    system.setParticleMass(21, 0.0)
    with pytest.raises(TopologyError, match=r"1 atoms have mass 0 \(first: NME3-"):
        require_flow_over_all_atoms(load_objects(made.topology, system, made.positions))
    system.setVirtualSite(21, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(TopologyError, match=r"1 particles are virtual sites .*without extra particles"):
        require_flow_over_all_atoms(load_objects(made.topology, system, made.positions))


def test_system_that_cannot_be_copied_is_explained() -> None:
    made = _dipeptide()
    system = copy.deepcopy(made.system)
    system.addForce(openmm.PythonForce(lambda state: (0.0, None)))
    with pytest.raises(InputError, match="PythonForce at the top level of a module"):
        load_objects(made.topology, system, made.positions)


def test_atoms_in_another_order_are_noticed() -> None:
    made = _dipeptide()
    assert not any("same order" in note for note in load_objects(made.topology, made.system, made.positions).notes)
    shuffled = app.Topology()
    chain = shuffled.addChain()
    atoms = list(reversed(list(made.topology.atoms())))
    copies = [shuffled.addAtom(atom.name, atom.element, shuffled.addResidue(atom.residue.name, chain)) for atom in atoms]
    for a, b in made.topology.bonds():
        shuffled.addBond(copies[21 - a.index], copies[21 - b.index])
    notes = load_objects(shuffled, made.system, made.positions).notes
    assert any("bonds of the topology have no harmonic bond" in note and "same order" in note for note in notes)


def test_context_parameters_of_a_state_are_not_dropped_in_silence(tmp_path: Path) -> None:
    made = _dipeptide()
    system = copy.deepcopy(made.system)
    bias = openmm.CustomExternalForce("k*x^2")
    bias.addGlobalParameter("k", 0.0)
    system.addForce(bias)
    pdb, xml = _files(tmp_path, made.topology, system, made.positions)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(made.positions)
    path = tmp_path / "state.xml"
    path.write_text(openmm.XmlSerializer.serialize(context.getState(positions=True, parameters=True)))
    assert any("context parameters of state.xml (k) were not used" in note for note in load(pdb, xml, state=path).notes)


@pytest.mark.parametrize("constraints", [None, app.HBonds, app.HAngles])
def test_rigid_water_triangle_is_no_bond(constraints: object) -> None:
    water = testsystems.WaterBox(box_edge=1.9 * unit.nanometer, cutoff=0.9 * unit.nanometer, constrained=constraints is not None)
    loaded = load_objects(water.topology, water.system, water.positions)
    assert loaded.topology.getNumBonds() == water.topology.getNumBonds()
