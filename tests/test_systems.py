"""The stored systems are what their script makes, and what they claim to be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit

CAPPED = ("capped_valine", "capped_serine", "capped_phenylalanine", "capped_proline")
ALANINE = tuple(f"alanine_dipeptide_{name}" for name in ("vacuum", "implicit", "amber99sbildn_obc", "amber14_vacuum"))


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


MAKE = module("systems/make_systems.py")


def stored(name: str) -> tuple[app.Topology, np.ndarray, openmm.System]:
    folder = Path("systems") / name
    pdb = app.PDBFile(str(folder / "topology.pdb"))
    positions = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return pdb.topology, positions, openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())


def atoms(topology: app.Topology) -> dict[tuple[int, str], int]:
    return {(atom.residue.index, atom.name): atom.index for atom in topology.atoms()}


def check_l_chirality(topology: app.Topology, x: np.ndarray) -> None:
    """N, C and CB seen from CA have a positive triple product in an L amino acid."""
    ca, n, c, cb = (x[atoms(topology)[1, name]] for name in ("CA", "N", "C", "CB"))
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 1e-3


def _minutes(name: str) -> bool:
    """Whether making it again takes minutes: minimising a box of water on the Reference platform."""
    return name.startswith("penta_alanine")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if _minutes(name) else []) for name in MAKE.systems()])
def test_stored_folders_are_what_the_script_makes(name: str) -> None:
    topology, x, system = stored(name)
    new_topology, new_x, new_system = MAKE.systems()[name][2]()
    assert [atom.name for atom in topology.atoms()] == [atom.name for atom in new_topology.atoms()]
    np.testing.assert_allclose(x, new_x, atol=2e-3)
    assert MAKE.potential_energy(system, x) == pytest.approx(MAKE.potential_energy(new_system, x), rel=1e-9)
    energy = float((Path("systems") / name / "README.md").read_text().split("stored positions: ")[1].split()[0])
    assert MAKE.potential_energy(system, x) == pytest.approx(energy, abs=2e-3)


@pytest.mark.parametrize(("name", "peptide"), [("amber14", "amber14-all.xml"), ("amber99sbildn", "amber99sbildn.xml")])
def test_boxes_of_water_hold_the_stated_energy(name: str, peptide: str) -> None:
    topology, x, system = stored(f"penta_alanine_{name}_water")
    remade = MAKE.in_water(topology, app.ForceField(peptide, "amber14/tip3p.xml"))
    energy = float((Path("systems") / f"penta_alanine_{name}_water" / "README.md").read_text().split("stored positions: ")[1].split()[0])
    assert MAKE.potential_energy(system, x) == pytest.approx(energy, abs=2e-3)
    assert MAKE.potential_energy(remade, x) == pytest.approx(energy, abs=2e-3)


def test_every_folder_is_made_and_no_file_is_large() -> None:
    folders = {path.name for path in Path("systems").iterdir() if (path / "system.xml").exists()}
    assert folders == set(MAKE.systems())
    assert all(path.stat().st_size < 1_000_000 for path in Path("systems").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", [*ALANINE, *CAPPED])
def test_molecules_are_whole_l_trans_and_unconstrained(name: str) -> None:
    topology, x, system = stored(name)
    check_l_chirality(topology, x)
    with pytest.raises(AssertionError):
        check_l_chirality(topology, x * np.array([1, 1, -1]))
    assert system.getNumConstraints() == 0
    assert all(not force.usesPeriodicBoundaryConditions() for force in system.getForces())
    reached = {0}
    for _ in range(topology.getNumAtoms()):
        reached |= {atom.index for bond in topology.bonds() for atom in bond if {bond[0].index, bond[1].index} & reached}
    assert len(reached) == system.getNumParticles() == topology.getNumAtoms()
    at = atoms(topology)
    peptide = [[at[0, "CH3"], at[0, "C"], at[1, "N"], at[1, "CA"]], [at[1, "CA"], at[1, "C"], at[2, "N"], at[2, "C"]]]
    omega = mdtraj.compute_dihedrals(mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(topology)), peptide)
    assert (np.abs(omega) > np.radians(170)).all()


def test_proline_has_its_ring() -> None:
    topology, x, _ = stored("capped_proline")
    at = atoms(topology)
    assert topology.getNumBonds() == topology.getNumAtoms()
    assert np.linalg.norm(x[at[1, "N"]] - x[at[1, "CD"]]) == pytest.approx(0.146, abs=0.005)


REFERENCE = module("benchmarks/reference_free_energy.py")


def test_the_umbrella_is_the_one_mbar_is_told_about() -> None:
    _, x, system = stored("alanine_dipeptide_implicit")
    grid = -np.cos(np.linspace(-np.pi, np.pi, 65))[:, None] * np.ones(65)  # W = −cos ψ, rows are ψ
    sampled = REFERENCE.biased_system(REFERENCE.sampled_system(system), grid)
    context = openmm.Context(sampled, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for wanted, centre in ((-3.0, 3.0), (0.5, 1.0), (1.2, -2.5)):
        turned = REFERENCE.rotated(x, REFERENCE.PHI, wanted)
        assert REFERENCE.torsion(turned, REFERENCE.PHI) == pytest.approx(wanted)
        context.setPositions(turned)
        context.setParameter("phi0", centre)
        energy = context.getState(energy=True, groups={1}).getPotentialEnergy()._value / REFERENCE.KT
        assert REFERENCE.bias(np.array(wanted), np.array(centre)) == pytest.approx(energy, rel=1e-5)
        flat = context.getState(energy=True, groups={2}).getPotentialEnergy()._value
        assert flat == pytest.approx(-np.cos(REFERENCE.torsion(turned, REFERENCE.PSI)), abs=1e-4)


def test_the_sampled_implicit_system_is_close_to_the_target() -> None:
    """OBC2 in place of OBC1, the same surface term: energies differ by a few kT, not by a force-field term."""
    _, x, system = stored("alanine_dipeptide_implicit")
    difference = MAKE.potential_energy(REFERENCE.sampled_system(system), x) - MAKE.potential_energy(system, x)
    assert abs(difference) < 3 * REFERENCE.KT


def check_rotated() -> None:
    """Turning φ by any angle keeps all bonds, the L configuration and trans peptide bonds."""
    topology, x, _ = stored("alanine_dipeptide_vacuum")
    pairs = np.array([[bond[0].index, bond[1].index] for bond in topology.bonds()])
    for wanted in np.linspace(-3, 3, 7):
        turned = REFERENCE.rotated(x, REFERENCE.PHI, wanted)
        np.testing.assert_allclose(
            np.linalg.norm(np.diff(turned[pairs], axis=1), axis=-1), np.linalg.norm(np.diff(x[pairs], axis=1), axis=-1)
        )
        assert REFERENCE.is_l_and_trans(turned)
        for a, b in ((9, 10), (9, 14), (10, 14)):  # the substituents of CA
            assert np.linalg.norm(turned[a] - turned[b]) == pytest.approx(np.linalg.norm(x[a] - x[b]))


def test_windows_start_from_the_same_molecule(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rotated()
    monkeypatch.setitem(REFERENCE.DOWNSTREAM, REFERENCE.PHI, range(10, 22))  # HA left behind, which inverts CA once minimised
    with pytest.raises(AssertionError):
        check_rotated()


def test_the_mirror_image_is_not_taken_for_the_molecule() -> None:
    _, x, _ = stored("alanine_dipeptide_vacuum")
    assert REFERENCE.is_l_and_trans(x)
    assert not REFERENCE.is_l_and_trans(x * np.array([1, 1, -1]))


def test_stored_references_meet_their_error_goal() -> None:
    results = json.loads(Path("benchmarks/results/reference_free_energy.json").read_text())
    for result in results.values():
        assert result["stderr_kT"] < 0.1
        assert abs(result["from_psi_150_kT"] - result["from_psi_minus_40_kT"]) < 6 * result["stderr_kT"]
        assert len(result["profile"]["f_kT"]) == 64
