"""States that are basins of one system: walls, and a difference that quadrature knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from scipy.integrate import quad

from boltzgen.config import TfepConfig, make_config
from boltzgen.cvs import Angle, Dihedral, Distance
from boltzgen.errors import ConfigError, InputError
from boltzgen.md.loading import load
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.walls import Wall, with_walls
from boltzgen.units import thermal_energy
from boltzgen.workflows.run_folder import RunFolder
from boltzgen.workflows.tfep import require_usable, run_tfep
from tests.assertions import assert_z
from tests.registry import noise

#: Energy of the torsion in kJ/mol: minima near ±90 degrees, that at +90 higher; a barrier of 20.
TORSION = "10*(1+cos(2*theta))+2.5*sin(theta)"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of four atoms with stiff bonds and angles."""
    folder, topology, system = tmp_path_factory.mktemp("chain"), app.Topology(), openmm.System()
    residue = topology.addResidue("HOO", topology.addChain())
    atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("H1", "O1", "O2", "H2")]
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.CustomTorsionForce(TORSION)
    for k, atom in enumerate(atoms):
        system.addParticle(16.0)
        if k:
            topology.addBond(atoms[k - 1], atom)
            bonds.addBond(k - 1, k, 0.15, 50_000.0)
    for k in (0, 1):
        angles.addAngle(k, k + 1, k + 2, 1.8, 400.0)
    torsions.addTorsion(0, 1, 2, 3, [])
    for force in (bonds, angles, torsions):
        system.addForce(force)
    positions = np.array([[0.03, 0.146, 0.0], [0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.18, 0.0, 0.146]])
    with (folder / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    return folder


def config(files: Path, **changes: object) -> TfepConfig:
    values: dict = {
        "task": "tfep", "topology": str(files / "topology.pdb"), "platform": {"name": "Reference"},
        "a": {"system": str(files / "system.xml"), "basin": {"torsion": ["-180 degree", "0 degree"]}},
        "b": {"system": str(files / "system.xml"), "basin": {"torsion": ["0 degree", "180 degree"]}},
        "collective_variables": {"torsion": {"kind": "dihedral", "atoms": [0, 1, 2, 3]}},
        "data": {"source": "langevin", "steps_per_replica": 60_000, "save_interval": 20, "timestep": "1 femtosecond",
                 "exchange_interval": 20, "friction": "20/picosecond"},
        "map": {"stiff_layers": 1, "hidden": [8]},
        "training": {"steps": 60, "batch_size": 32, "learning_rate": 5e-3, "ema_decay": 0.9},
        "evaluation": {"n_bootstrap": 50},
    }  # fmt: skip
    made = make_config({**values, **changes})
    assert isinstance(made, TfepConfig)
    return made


def test_the_difference_of_two_basins_is_that_of_quadrature(files: Path, tmp_path: Path) -> None:
    """A barrier of 8 kT that no simulation crosses; no configuration of one basin lies in the other, and the map turns it there."""
    with RunFolder.create(tmp_path / "run") as folder:
        results = run_tfep(config(files), folder, progress=False).to_dict()
    kt = thermal_energy(300.0)

    def z(low: float, high: float) -> float:
        return float(quad(lambda t: np.exp(-(10 * (1 + np.cos(2 * t)) + 2.5 * np.sin(t)) / kt), low, high)[0])

    exact = np.log(z(-np.pi, 0.0) / z(0.0, np.pi))
    assert exact > 1.5
    estimates = {estimate["name"]: estimate for estimate in results["estimates"]}
    found = estimates["F_B - F_A"]
    assert_z(found["value"], exact, found["stderr"])
    assert found["stderr"] < 0.1
    assert results["verdict"] == "reliable", results["reasons"]
    assert results["diagnostics"]["without_map"]["overlap"] == 0.0
    assert "states with a basin are confined to it: their Z is that of the basin" in results["notes"]
    assert not any("without a map" in name for name in estimates)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    with np.load(tmp_path / "run" / "b" / "trajectory.npz") as data:
        torsion = Dihedral("torsion", (0, 1, 2, 3))(torch.from_numpy(data["x0"]))
    assert float((torsion > 0).double().mean()) > 0.99  # it started in the other one


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("distance", 0.30, 0.36), ("angle", 1.7, 2.0), ("dihedral", -0.5, 1.0), ("dihedral", 2.5, -2.0)]
)
def test_walls_are_nothing_inside_and_steep_outside(files: Path, kind: str, low: float, high: float) -> None:
    atoms = {"distance": (0, 3), "angle": (0, 1, 2), "dihedral": (0, 1, 2, 3)}[kind]
    loaded = load(files / "topology.pdb", files / "system.xml")
    x = torch.from_numpy(loaded.positions) + noise(400, 4, 3, scale=0.06)
    plain, walled = (
        OpenMMTarget.from_loaded(one, temperature_kelvin=300.0).reduced_potential(x)
        for one in (loaded, with_walls(loaded, [Wall(atoms, low, high)]))
    )
    wall = (walled - plain) * thermal_energy(300.0)
    q, turn = {"distance": Distance, "angle": Angle, "dihedral": Dihedral}[kind]("q", atoms)(x), 2 * torch.pi
    inside = ((q > low) & (q < high)) if low < high else ((q > low) | (q < high))
    assert 20 < int(inside.sum()) < 380
    d = torch.minimum((low - q) % turn, (q - high) % turn) if kind == "dihedral" else torch.maximum(low - q, q - high)
    expected = torch.where(inside, 0.0, 500.0 * d**2 / (d + 0.05))
    torch.testing.assert_close(wall, expected, atol=1e-5, rtol=1e-5)


def test_walls_of_a_kind_add_up(files: Path) -> None:
    loaded = load(files / "topology.pdb", files / "system.xml")
    x = torch.from_numpy(loaded.positions) + noise(100, 4, 3, scale=0.06)
    walls = [Wall((0, 1, 2, 3), -0.5, 1.0), Wall((3, 2, 1, 0), 2.5, -2.0), Wall((0, 3), 0.30, 0.36), Wall((1, 2), 0.1, 0.12)]

    def u(*some: Wall) -> torch.Tensor:
        return OpenMMTarget.from_loaded(with_walls(loaded, some), temperature_kelvin=300.0).reduced_potential(x)

    bare = u()
    torch.testing.assert_close(u(*walls) - bare, sum(u(wall) - bare for wall in walls), atol=1e-5, rtol=1e-6)


def test_basins_that_cannot_be_are_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="psi"):
        require_usable(config(files, a={"system": str(files / "system.xml"), "basin": {"psi": ["0 radian", "1 radian"]}}))
    with pytest.raises(InputError, match="two, three or four atoms"):
        with_walls(load(files / "topology.pdb", files / "system.xml"), [Wall((0,), 0.0, 1.0)])
