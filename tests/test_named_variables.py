"""Collective variables from configurations: kinds, selections, files, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
import torch
import yaml
from openmm import app, unit

from boltzgen.config import MoleculeConfig, config_text, make_config
from boltzgen.cvs import RMSD, Angle, Combination, Coordination, Cosine, Dihedral, Distance, RadiusOfGyration, Sine
from boltzgen.errors import BoltzgenError, ConfigError, InputError, UnsafeFileError
from boltzgen.md.cv_forces import restraint_forces
from boltzgen.md.force_variable import ForceVariable
from boltzgen.md.loading import LoadedSystem, load
from boltzgen.md.named_variables import build_cvs, variable_hashes

FOLDER = Path(__file__).parents[1] / "systems/alanine_dipeptide_vacuum"
BOX = np.diag([2.0, 2.1, 2.2])
PHI = {"kind": "dihedral", "atoms": [4, 6, 8, 14]}
TWO = {"kind": "distance", "atoms": [0, 1]}


@pytest.fixture(scope="module")
def loaded() -> LoadedSystem:
    return load(FOLDER / "topology.pdb", FOLDER / "system.xml")


def config_of(variables: dict[str, Any], **others: Any) -> MoleculeConfig:
    config = make_config({"topology": "a.pdb", "system": "a.xml", "collective_variables": variables} | others)
    assert isinstance(config, MoleculeConfig)
    return config


def built(loaded: LoadedSystem, **values: Any) -> Any:
    (cv,) = build_cvs(config_of({"q": values}).collective_variables, loaded)
    return cv


def periodic(loaded: LoadedSystem) -> LoadedSystem:
    return LoadedSystem(loaded.topology, loaded.system, loaded.positions, BOX)


def test_the_old_form_goes_on_working(loaded: LoadedSystem) -> None:
    cvs = build_cvs(config_of({"phi": PHI, "r": {"kind": "distance", "atoms": [1, 5]}}).collective_variables, loaded)
    assert [(type(cv), cv.name, cv.atoms) for cv in cvs] == [(Dihedral, "phi", (4, 6, 8, 14)), (Distance, "r", (1, 5))]


def test_selections_keep_their_order(loaded: LoadedSystem) -> None:
    by_name = ["resname ACE and name C", "resname ALA and name N", "resname ALA and name CA", "resname ALA and name C"]
    assert built(loaded, kind="dihedral", select=by_name).atoms == (4, 6, 8, 14)
    assert built(loaded, kind="dihedral", select=by_name[::-1]).atoms == (14, 8, 6, 4)
    assert isinstance(built(loaded, kind="angle", select=by_name[:3]), Angle)


def test_groups_are_what_mdtraj_selects(loaded: LoadedSystem) -> None:
    heavy = tuple(mdtraj.load(str(FOLDER / "topology.pdb")).topology.select("element != H"))
    gyration = built(loaded, kind="radius_of_gyration", selection="element != H", mass_weighted=True)
    assert isinstance(gyration, RadiusOfGyration)
    assert gyration.atoms == heavy
    assert gyration.masses.min() > 12.0
    assert built(loaded, kind="radius_of_gyration", selection="element != H").masses is None
    assert built(loaded, kind="end_to_end", selection="element != H").atoms == (heavy[0], heavy[-1])
    rmsd = built(loaded, kind="rmsd", selection="element != H")
    assert isinstance(rmsd, RMSD)
    assert rmsd(torch.from_numpy(loaded.positions)[None]).item() < 1e-7


def test_a_reference_is_read_from_its_file(loaded: LoadedSystem, tmp_path: Path) -> None:
    moved = loaded.positions * 1.1
    with open(tmp_path / "native.pdb", "w") as file:
        app.PDBFile.writeFile(loaded.topology, moved * unit.nanometer, file)
    config = {"kind": "rmsd", "atoms": [4, 6, 8, 14], "reference": str(tmp_path / "native.pdb")}
    expected = RMSD("rmsd", (4, 6, 8, 14), reference=moved)(torch.from_numpy(loaded.positions)[None])
    assert built(loaded, **config)(torch.from_numpy(loaded.positions)[None]).item() == pytest.approx(expected.item(), abs=1e-4)
    assert list(variable_hashes(config_of({"q": config}).collective_variables)) == ["variable q native.pdb"]


def test_coordination_and_nearest_images(loaded: LoadedSystem) -> None:
    cv = built(periodic(loaded), kind="coordination", first="element O", second=[1, 2], r0="3 angstrom", n=4, m=10, minimum_image=True)
    assert isinstance(cv, Coordination)
    assert (cv.r0, cv.n, cv.m) == (pytest.approx(0.3), 4, 10)
    assert cv.pairs == ((5, 1), (5, 2), (15, 1), (15, 2))
    np.testing.assert_array_equal(cv.box, BOX)
    assert len(built(loaded, kind="coordination", first=[1, 2, 3], r0="3 angstrom").pairs) == 3


def test_combinations_hold_their_terms(loaded: LoadedSystem) -> None:
    terms = [{"of": PHI, "function": "cos", "weight": 0.5}, {"of": PHI, "function": "sin", "weight": -2.0}, {"of": TWO}]
    cv = built(loaded, kind="combination", terms=terms, offset=0.25)
    phi, d = Dihedral("phi", (4, 6, 8, 14)), Distance("d", (0, 1))
    expected = Combination("slow", [Cosine(phi), Sine(phi), d], [0.5, -2.0, 1.0], offset=0.25)
    x = torch.from_numpy(loaded.positions)[None]
    torch.testing.assert_close(cv(x), expected(x))


def write_force(force: openmm.Force, folder: Path) -> dict[str, Any]:
    (folder / "cv.xml").write_text(openmm.XmlSerializer.serialize(force))
    return {"kind": "force", "file": str(folder / "cv.xml"), "value_unit": "radian", "period": 2 * math.pi}


def test_a_users_force_comes_from_its_file(loaded: LoadedSystem, tmp_path: Path) -> None:
    torsion, force = openmm.CustomTorsionForce("theta"), openmm.CustomCVForce("t")
    torsion.addTorsion(4, 6, 8, 14)
    force.addCollectiveVariable("t", torsion)
    cv = built(loaded, **write_force(force, tmp_path))
    x = torch.from_numpy(loaded.positions + 0.02 * np.random.default_rng(1).normal(size=(3, 22, 3)))  # not exactly trans, where ±π meet
    assert isinstance(cv, ForceVariable)
    assert (cv.unit, cv.period) == ("rad", 2 * math.pi)
    torch.testing.assert_close(cv(x), Dihedral("phi", (4, 6, 8, 14))(x))


def _zero(state: openmm.State) -> tuple[float, None]:
    return 0.0, None


def test_a_force_that_runs_code_needs_trust(loaded: LoadedSystem, tmp_path: Path) -> None:
    """Also where it hides inside another."""
    outer = openmm.CustomCVForce("a")
    outer.addCollectiveVariable("a", openmm.PythonForce(_zero))
    configs = config_of({"q": write_force(outer, tmp_path)}).collective_variables
    with pytest.raises(UnsafeFileError, match=r"collective_variables\.q: .*contains a PythonForce"):
        build_cvs(configs, loaded)


def test_a_file_of_something_else_is_refused(loaded: LoadedSystem, tmp_path: Path) -> None:
    (tmp_path / "cv.xml").write_text(openmm.XmlSerializer.serialize(openmm.System()))
    with pytest.raises(InputError, match="expected an OpenMM Force, got <System"):
        built(loaded, kind="force", file=str(tmp_path / "cv.xml"))


def test_named_variables_become_restraints(loaded: LoadedSystem) -> None:
    """The whole way: YAML, variables, forces in a context of the system."""
    text = config_text(config_of({"phi": PHI, "rg": {"kind": "radius_of_gyration", "selection": "element != H"}, "d": TWO}))
    config = make_config(yaml.safe_load(text))
    assert isinstance(config, MoleculeConfig)
    cvs = build_cvs(config.collective_variables, loaded)
    system = openmm.XmlSerializer.clone(loaded.system)
    for force in restraint_forces(cvs, group=5):
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(loaded.positions)
    for k, value in enumerate(cvs(torch.from_numpy(loaded.positions)[None])[0].tolist()):
        context.setParameter(f"boltzgen_center_{k}", value)
        context.setParameter(f"boltzgen_stiffness_{k}", 100.0)
    assert context.getState(energy=True, groups={5}).getPotentialEnergy()._value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dihedral", "atoms": [4, 6, 8, 140]}, r"q: expected atoms from 0 to 21, got \[4, 6, 8, 140\]"),
        ({"kind": "coordination", "first": [1], "second": [22], "r0": "1 nanometer"}, r"q: expected atoms from 0 to 21, got \[22\]"),
        ({"kind": "rmsd", "selection": "name ZN"}, "q: the selection 'name ZN' matches none of the 22 atoms"),
        ({"kind": "rmsd", "selection": "element O"}, "q: rmsd needs at least 3 atoms, but 'element O' matches 2"),
        ({"kind": "rmsd", "selection": "nme CA"}, "q: mdtraj cannot read the selection 'nme CA'"),
        ({"kind": "distance", "select": ["index 0", "element O"]}, "q: expected a selection of one atom, but 'element O' matches 2: 5, 15"),
        ({"kind": "distance", "select": ["index 0", "index 0"]}, r"q: expected selections of different atoms.*match \[0, 0\]"),
        (TWO | {"minimum_image": True}, "q: minimum_image: the system is not periodic"),
        ({"kind": "coordination", "first": "element O", "second": [5], "r0": "1 nanometer"}, r"q: .*share the atoms \[5\]"),
        ({"kind": "combination", "terms": [{"of": {"kind": "distance", "atoms": [0, 99]}}]}, "q: expected atoms from 0 to 21"),
        ({"kind": "rmsd", "atoms": [0, 1, 2], "reference": "nothing.pdb"}, "q: cannot read nothing.pdb"),
    ],
)
def test_what_does_not_fit_the_system_is_refused(loaded: LoadedSystem, values: dict[str, Any], message: str) -> None:
    with pytest.raises(BoltzgenError, match=message):
        built(loaded, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dihedrl", "atoms": [0]}, r"q\.kind: expected one of distance, angle, .*, got 'dihedrl'"),
        ({"atoms": [0, 1]}, r"q\.kind: expected one of distance, .*, got 'nothing'"),
        (PHI | {"select": ["a"] * 4}, "q: expected atoms or select, got both"),
        ({"kind": "angle", "select": ["a"]}, "q: expected 3 selections for a angle, one for each atom, got 1"),
        ({"kind": "rmsd", "atoms": [0, 1]}, r"q: expected 3 or more different atoms for rmsd, or a selection, got \[0, 1\]"),
        ({"kind": "coordination", "first": [0, 1], "r0": "1 nanometer", "n": 12}, "q: expected exponents n < m, got n = 12, m = 12"),
        ({"kind": "coordination", "first": [0, 1], "r0": 0.3}, r"q\.r0: expected a value with its unit"),
        ({"kind": "coordination", "first": [0, 1], "second": [1], "r0": "1 nanometer"}, r"q: both groups hold the atoms \[1\]"),
        ({"kind": "combination", "terms": []}, r"q\.terms: expected one term or more"),
        ({"kind": "combination", "terms": [{"of": PHI}]}, r"q\.terms\.0: the dihedral is periodic, so that"),
        ({"kind": "combination", "terms": [{"of": TWO, "function": "cos"}]}, r"q\.terms\.0: expected an angle for function: cos"),
        ({"kind": "combination", "terms": [{"of": PHI | {"atom": 1}}]}, r"q\.terms\.0\.of\.atom: unknown key; did you mean 'atoms'"),
    ],
)
def test_mistakes_in_the_configuration_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of({"q": values})


def test_basins_are_ranges_in_the_unit_of_their_variable() -> None:
    contacts = {"kind": "coordination", "first": [0, 1], "r0": "1 nanometer"}
    config = config_of({"c": contacts}, basins={"bound": {"c": ["0.5 dimensionless", "4 dimensionless"]}})
    assert config.basin_ranges == {"bound": {"c": (0.5, 4.0)}}
    with pytest.raises(ConfigError, match=r"basins\.bound\.c: expected a quantity in dimensionless, got '0\.5 nanometer'"):
        config_of({"c": contacts}, basins={"bound": {"c": ["0.5 nanometer", "4 nanometer"]}})
    with pytest.raises(ConfigError, match=r"expected a range \[low, high\] of the coordination"):
        config_of({"c": contacts}, basins={"bound": {"c": ["4 dimensionless", "1 dimensionless"]}})
