"""Two states of one molecule from files to report: a flexible triatomic molecule whose difference is known by quadrature."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import openmm
import pytest
from click.testing import CliRunner
from openmm import app, unit
from openmmtools import alchemy, states
from scipy.integrate import quad

from boltzgen.cli import commands
from boltzgen.config import Joining, TfepConfig, load_config, make_config
from boltzgen.errors import ConfigError, EnergyError, InputError, Interrupted, TopologyError
from boltzgen.units import thermal_energy
from boltzgen.workflows import tfep
from boltzgen.workflows.jobs import draw_more, make_report, require_usable
from boltzgen.workflows.run_folder import RunFolder
from boltzgen.workflows.states import join_states
from boltzgen.workflows.tfep import run_tfep
from tests.assertions import assert_z

#: Lengths in nm, angles in rad, force constants in kJ/mol/nm² and kJ/mol/rad² of both states.
A = {"length": 0.100, "stretch": 60_000.0, "angle": 1.90, "bend": 300.0}
B = {"length": 0.108, "stretch": 40_000.0, "angle": 1.75, "bend": 500.0}


def exact(kelvin_a: float = 300.0, kelvin_b: float = 300.0) -> float:
    """−ln(Z_B/Z_A), Z = (∫ b² e^{−u} db)² ∫ sin θ e^{−u} dθ up to what both states share."""

    def log_z(state: dict[str, float], kelvin: float) -> float:
        kt = thermal_energy(kelvin)
        bond, _ = quad(
            lambda b: b**2 * np.exp(-0.5 * state["stretch"] * (b - state["length"]) ** 2 / kt), 0.05, 0.16, points=[state["length"]]
        )
        angle, _ = quad(
            lambda t: np.sin(t) * np.exp(-0.5 * state["bend"] * (t - state["angle"]) ** 2 / kt), 0.0, np.pi, points=[state["angle"]]
        )
        return float(2 * np.log(bond) + np.log(angle))

    return log_z(A, kelvin_a) - log_z(B, kelvin_b)


def system(state: dict[str, float], *, constrained: bool = False, n_atoms: int = 3, barostat: bool = False) -> openmm.System:
    made, bonds, angles = openmm.System(), openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for mass in (16.0, 1.0, 1.0, 1.0)[:n_atoms]:
        made.addParticle(mass)
    for hydrogen in (1, 2):
        if constrained:
            made.addConstraint(0, hydrogen, state["length"])
        else:
            bonds.addBond(0, hydrogen, state["length"], state["stretch"])
    angles.addAngle(1, 0, 2, state["angle"], state["bend"])
    made.addForce(bonds)
    made.addForce(angles)
    if barostat:
        made.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    return made


def scaled() -> openmm.System:
    """State A for scale = 0, state B for scale = 1: one system with a global parameter."""
    made = openmm.System()
    for mass in (16.0, 1.0, 1.0):
        made.addParticle(mass)
    between = {key: f"({A[key]!r}+scale*{B[key] - A[key]!r})" for key in A}
    bonds = openmm.CustomBondForce(f"0.5*{between['stretch']}*(r-{between['length']})^2")
    angles = openmm.CustomAngleForce(f"0.5*{between['bend']}*(theta-{between['angle']})^2")
    for force, atoms in ((bonds, [(0, 1), (0, 2)]), (angles, [(1, 0, 2)])):
        force.addGlobalParameter("scale", 0.5)
        for members in atoms:
            force.addBond(*members, []) if force is bonds else force.addAngle(*members, [])
        made.addForce(force)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[0], atoms[2])
    positions = np.array([[0, 0, 0], [0.1, 0, 0], [-0.03, 0.095, 0]]) * unit.nanometer
    with (folder / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, positions, file)
    states = {
        "a": system(A), "b": system(B), "scaled": scaled(), "rigid": system(A, constrained=True), "rigid_b": system(B, constrained=True),
        "four": system(A, n_atoms=4), "barostat": system(A, barostat=True),
    }  # fmt: skip
    for name, made in states.items():
        (folder / f"{name}.xml").write_text(openmm.XmlSerializer.serialize(made))
    return folder


def config(files: Path, *, a: dict | None = None, b: dict | None = None, **changes: dict) -> TfepConfig:
    values: dict = {
        "task": "tfep", "topology": str(files / "topology.pdb"),
        "a": {"system": str(files / "a.xml")} | (a or {}), "b": {"system": str(files / "b.xml")} | (b or {}),
        "platform": {"name": "Reference"},
        "data": {"source": "langevin", "steps_per_replica": 40_000, "save_interval": 10, "timestep": "0.5 femtosecond",
                 "exchange_interval": 10, "friction": "20/picosecond"},
        "map": {"stiff_layers": 1, "hidden": [8]},
        "training": {"steps": 60, "batch_size": 32, "learning_rate": 5e-3, "ema_decay": 0.9},
        "evaluation": {"n_bootstrap": 50},
    }  # fmt: skip
    made = make_config({key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in values.items()})
    assert isinstance(made, TfepConfig)
    return made


def run(path: Path, settings: TfepConfig, *, resume: bool = False) -> dict:
    with RunFolder.create(path, resume=resume) as folder:
        return run_tfep(settings, folder, progress=False).to_dict()


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "water"
    run(path, config(files))
    return path


def named(results: dict) -> dict[str, dict]:
    return {estimate["name"]: estimate for estimate in results["estimates"]}


def test_the_difference_is_that_of_quadrature(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["task"] == "tfep"
    assert results["verdict"] == "reliable", results["verdict_reasons"]
    estimates, truth = named(results), exact()
    found, plain = estimates["F_B - F_A"], estimates["F_B - F_A, without a map, all data"]
    for name in ("F_B - F_A", "F_B - F_A, from A alone", "F_B - F_A, from B alone"):
        assert_z(estimates[name]["value"], truth, estimates[name]["stderr"])
    assert_z(plain["value"], truth, plain["stderr"])
    assert plain["stderr"] > 3 * found["stderr"]  # with twice the data
    lower, upper = estimates["F_B - F_A, lower bound"], estimates["F_B - F_A, upper bound"]
    assert lower["value"] - 4 * lower["stderr"] < truth < upper["value"] + 4 * upper["stderr"]
    assert upper["value"] - lower["value"] < 0.5
    diagnostics = results["diagnostics"]
    assert diagnostics["overlap"] > 0.8 > diagnostics["without_map"]["overlap"]
    assert 50 <= diagnostics["carriers_forward"] <= diagnostics["n_forward"] / 5  # units of five correlation times
    assert all(diagnostics["energy_evaluations"][part] > 0 for part in ("data", "training", "evaluation"))
    with pytest.raises(AssertionError):
        assert_z(found["value"], truth + np.log(B["length"] / A["length"]) * 4, found["stderr"])  # the Jacobian of the bonds forgotten


def test_a_run_leaves_works_and_a_report(finished: Path) -> None:
    for name in ("works", "overlap", "bounds", "convergence"):
        assert (finished / f"{name}.png").stat().st_size > 5000
    page = (finished / "report.html").read_text()
    assert "Bounds" in page
    assert "Overlap of the two states" in page
    with (finished / "works.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["map"] for row in rows} == {"learned", "none"}
    assert {row["direction"] for row in rows} == {"forward", "reverse"}
    assert make_report(RunFolder.read(finished)).exists()
    with pytest.raises(InputError, match="no samples to draw"):
        draw_more(RunFolder.read(finished), 10)


@pytest.mark.parametrize("kind", ["affine", "identity"])
def test_maps_without_training(files: Path, tmp_path: Path, kind: str) -> None:
    results = run(tmp_path / "run", config(files, map={"kind": kind}))
    found = named(results)["F_B - F_A"]
    assert_z(found["value"], exact(), found["stderr"])
    assert results["diagnostics"]["energy_evaluations"]["training"] == 0
    assert not (tmp_path / "run" / "bounds.png").exists()
    if kind == "identity":
        assert abs(found["value"] - named(results)["F_B - F_A, without a map, all data"]["value"]) < 1.0


def test_a_continuous_map_by_flow_matching_and_works(files: Path, tmp_path: Path) -> None:
    """Both stages, resumed without training again; its works are those of the steps, to rounding."""
    chosen = {"kind": "continuous", "field_width": 8, "n_radial": 4, "pair_scales": True}
    training = {"steps": 4, "batch_size": 32, "learning_rate": 1e-3, "solver_steps": 2, "matching": {"steps": 60, "batch_size": 64}}
    data, evaluation = {"steps_per_replica": 12_000, "save_interval": 40, "exchange_interval": 40}, {"solver_steps": 2}
    settings = config(files, map=chosen, training=training, data=data, evaluation=evaluation)
    results = run(tmp_path / "run", settings)
    estimates, diagnostics = named(results), results["diagnostics"]
    found, plain = estimates["F_B - F_A"], estimates["F_B - F_A, without a map, all data"]
    assert_z(found["value"], exact(), found["stderr"])
    assert diagnostics["overlap"] > diagnostics["without_map"]["overlap"]
    assert found["stderr"] < plain["stderr"]
    assert 0 < diagnostics["log_det_error"] < 1e-6
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "training.jsonl").read_text().splitlines()]
    assert set(stages) == {"matching", "map"}
    assert any("mirror image" in note for note in results["notes"])
    (tmp_path / "run" / "results.json").unlink()
    assert named(run(tmp_path / "run", settings, resume=True))["F_B - F_A"]["value"] == found["value"]


def test_a_continuous_map_is_of_one_free_molecule(files: Path, tmp_path: Path) -> None:
    chosen = {"kind": "continuous"}
    require_usable(config(files, map=chosen))
    rigid = {"system": str(files / "rigid.xml")}
    with pytest.raises(TopologyError, match="constraints=None"):
        require_usable(config(files, a=rigid, b=rigid, map=chosen))
    with pytest.raises(InputError, match="this system is periodic: make both systems without periodic boundaries"):
        require_usable(config(dissolved(tmp_path), map=chosen))
    topology, positions = app.Topology(), np.array([[0.0, 0, 0], [0.3, 0, 0], [0, 0.3, 0]]) * unit.nanometer
    for _ in range(3):
        topology.addAtom("AR", app.Element.getBySymbol("Ar"), topology.addResidue("AR", topology.addChain()))
    with (tmp_path / "atoms.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, positions, file)
    free = openmm.System()
    for _ in range(3):
        free.addParticle(40.0)
    (tmp_path / "free.xml").write_text(openmm.XmlSerializer.serialize(free))
    ends = {"system": str(tmp_path / "free.xml")}
    (tmp_path / "topology.pdb").write_text((tmp_path / "atoms.pdb").read_text())
    with pytest.raises(InputError, match="all atoms of one molecule, and the topology has 3"):
        require_usable(config(tmp_path, a=ends, b=ends, map=chosen))


def test_states_of_one_system_by_parameters_and_temperature(files: Path, tmp_path: Path) -> None:
    one = str(files / "scaled.xml")
    settings = config(
        files, a={"system": one, "parameters": {"scale": 0.0}}, b={"system": one, "parameters": {"scale": 1.0}, "temperature": "400 kelvin"}
    )
    found = named(run(tmp_path / "run", settings))["F_B - F_A"]
    assert_z(found["value"], exact(300.0, 400.0), found["stderr"])
    assert abs(exact(300.0, 400.0) - exact()) > 0.3


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    files: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once:
        def __enter__(self):  # type: ignore[no-untyped-def]
            left = iter([False] * 20 + [True])
            return lambda: next(left)

        def __exit__(self, *_: object) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(tfep, "stop_on_signal", Once)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", config(files))
    run(tmp_path / "run", config(files), resume=True)
    assert (tmp_path / "run" / "works.csv").read_text() == (finished / "works.csv").read_text()


def test_states_that_cannot_be_joined_are_refused(files: Path) -> None:
    require_usable(config(files))
    rigid, other = ({"system": str(files / f"{name}.xml")} for name in ("rigid", "rigid_b"))
    with pytest.raises(InputError, match="same constraints"):
        require_usable(config(files, a=rigid))
    with pytest.raises(InputError, match="same constraints"):
        require_usable(config(files, a=rigid, b=other, map={"kind": "identity"}))
    with pytest.raises(InputError, match="constraints=None"):
        require_usable(config(files, a=rigid, b=rigid))
    require_usable(config(files, a=rigid, b=rigid, map={"kind": "identity"}))
    with pytest.raises(InputError, match="4 particles"):
        require_usable(config(files, a={"system": str(files / "four.xml")}))
    with pytest.raises(InputError, match="no global parameter lambda: it has none"):
        require_usable(config(files, a={"parameters": {"lambda": 1.0}}))
    with pytest.raises(InputError, match="no global parameter lambda: it has scale"):
        require_usable(config(files, a={"system": str(files / "scaled.xml"), "parameters": {"lambda": 1.0}}))


def test_a_barostat_is_left_out_and_said_so(files: Path, tmp_path: Path) -> None:
    data = {"steps_per_replica": 4000}
    results = run(tmp_path / "run", config(files, a={"system": str(files / "barostat.xml")}, data=data, map={"kind": "identity"}))
    assert any("MonteCarloBarostat was left out" in note for note in results["notes"])


def test_configurations_that_cannot_work_are_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="even number"):
        config(files, evaluation={"n_shares": 5})
    with pytest.raises(ConfigError, match="state a: source: trajectory needs files"):
        config(files, data={"source": "trajectory"})
    with pytest.raises(ConfigError, match="need a direction"):
        config(files, training={"forward_weight": 0.0, "reverse_weight": 0.0})
    with pytest.raises(ConfigError, match=r"map\.layers: unknown key"):
        config(files, map={"layers": 3})


def test_the_command_is_for_two_states_only(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "generator.yaml"
    path.write_text(f"topology: {files / 'topology.pdb'}\nsystem: {files / 'a.xml'}\n")
    refused = CliRunner().invoke(commands, ["tfep", str(path)])
    assert refused.exit_code == 2
    assert "is of task generator, not tfep" in refused.output
    printed = CliRunner().invoke(commands, ["config", "tfep"])
    (tmp_path / "tfep.yaml").write_text(printed.output)
    assert isinstance(load_config(tmp_path / "tfep.yaml"), TfepConfig)


def test_several_maps_make_one_estimate(files: Path, finished: Path, tmp_path: Path) -> None:
    """The last maps of training, on the same frames, after a run that used one; one of them, alone, gives the run's own works again."""
    path = tmp_path / "several"
    shutil.copytree(finished, path)
    one = named(json.loads((finished / "results.json").read_text()))["F_B - F_A"]
    results = run(path, config(files, evaluation={"maps": 3}), resume=True)
    found = named(results)["F_B - F_A"]
    assert results["diagnostics"]["n_maps"] == 3
    assert_z(found["value"], exact(), found["stderr"])
    assert found["value"] != one["value"]
    assert results["diagnostics"]["n_forward"] == 3 * json.loads((finished / "results.json").read_text())["diagnostics"]["n_forward"]
    assert found["stderr"] > 0.5 * one["stderr"]  # maps are no data
    again = run(path, config(files), resume=True)
    assert named(again)["F_B - F_A"]["value"] == one["value"]


def solution(folder: Path, *, n: int = 6, edge: float = 1.2) -> Path:
    """A sphere that repels n particles in a periodic box, which do not feel each other; its size is the global parameter ``size``."""
    topology, made, positions = app.Topology(), openmm.System(), [[0.0, 0.0, 0.0]]
    bonds = openmm.CustomBondForce("step(q-0.5)*(8*(q^2-q)+2); q=(size/r)^6")  # purely repulsive, 2 kJ/mol at r = size
    bonds.addGlobalParameter("size", 0.3)
    bonds.setUsesPeriodicBoundaryConditions(True)
    chain = topology.addChain()
    for index in range(n + 1):
        topology.addAtom("AR", app.Element.getBySymbol("Ar"), topology.addResidue("AR", chain))
        made.addParticle(40.0)
        if index:
            bonds.addBond(0, index, [])
            positions.append([0.5, 0.1 * index, 0.3])
    made.addForce(bonds)
    made.setDefaultPeriodicBoxVectors(*(edge * np.eye(3)))
    topology.setPeriodicBoxVectors(edge * np.eye(3) * unit.nanometer)
    with (folder / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, np.array(positions) * unit.nanometer, file)
    (folder / "solution.xml").write_text(openmm.XmlSerializer.serialize(made))
    return folder


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [({"kind": "radial", "radial_bins": 8}, 80), ({"kind": "solvent", "n_central": 6, "n_radial": 3, "n_times": 1, "outer": 1.0}, 60)],
)
def test_a_solute_grows_in_a_periodic_box(tmp_path: Path, chosen: dict[str, object], steps: int) -> None:
    """An ideal gas around a sphere, from files to report, against quadrature."""
    edge, sizes, n = 1.2, (0.3, 0.42), 6
    system = {"system": str(solution(tmp_path, n=n, edge=edge) / "solution.xml")}
    a, b = ({**system, "parameters": {"size": size}} for size in sizes)
    settings = config(
        tmp_path, a=a, b=b, map=chosen,
        data={"steps_per_replica": 150_000, "save_interval": 100, "exchange_interval": 100, "timestep": "8 femtosecond",
              "friction": "5/picosecond"},
        training={"steps": steps, "batch_size": 64, "learning_rate": 2e-2, "ema_decay": 0.9, "solver_steps": 2},
    )  # fmt: skip
    results = run(tmp_path / "run", settings)

    def log_z(size: float) -> float:
        def lost(r: float) -> float:
            q = (size / r) ** 6
            return 4 * np.pi * r**2 * -np.expm1(-(8 * (q**2 - q) + 2) / thermal_energy(300.0))

        return float(n * np.log(edge**3 - quad(lost, 1e-3, 2 ** (1 / 6) * size)[0]))

    truth, estimates = log_z(sizes[0]) - log_z(sizes[1]), named(results)
    found, plain = estimates["F_B - F_A"], estimates["F_B - F_A, without a map, all data"]
    assert_z(found["value"], truth, found["stderr"])
    assert_z(plain["value"], truth, plain["stderr"])
    assert found["stderr"] < 0.1
    gap, wide = (
        estimates[f"F_B - F_A, upper bound{end}"]["value"] - estimates[f"F_B - F_A, lower bound{end}"]["value"]
        for end in ("", ", without a map")
    )
    assert 0 < gap < 0.5 * wide
    assert not any("mirror image" in note or "CONECT" in note for note in results["notes"])
    assert results["diagnostics"]["log_det_error"] <= 5e-3
    with pytest.raises(TopologyError, match="molecule of at least 3 atoms, got 1"):
        run(tmp_path / "coupling", config(tmp_path, a=a, b=b, data={"steps_per_replica": 200}))


def dissolved(folder: Path) -> Path:
    """The triatomic molecule of both states in a periodic box with two rigid pairs; its angle feels how far the nearest pair is."""
    topology, positions = app.Topology(), []
    chain = topology.addChain()
    for start in (0.0, 0.4):
        pair = topology.addResidue("PAR", chain)
        first, second = (topology.addAtom(name, app.Element.getBySymbol("Ar"), pair) for name in ("A1", "A2"))
        topology.addBond(first, second)
        positions += [[start, 0.8, 0.8], [start + 0.2, 0.8, 0.8]]
    residue = topology.addResidue("HOH", chain)
    atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[0], atoms[2])
    positions += [[0.5, 0.3, 0.3], [0.6, 0.3, 0.3], [0.47, 0.395, 0.3]]
    topology.setPeriodicBoxVectors(1.5 * np.eye(3) * unit.nanometer)
    with (folder / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, np.array(positions) * unit.nanometer, file)
    for name, state in (("a", A), ("b", B)):
        made, bonds, angles = openmm.System(), openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        for mass in (40.0, 40.0, 40.0, 40.0, 16.0, 1.0, 1.0):
            made.addParticle(mass)
        for i, j in ((0, 1), (2, 3)):
            made.addConstraint(i, j, 0.2)
        for hydrogen in (5, 6):
            bonds.addBond(4, hydrogen, state["length"], state["stretch"])
        angles.addAngle(5, 4, 6, state["angle"], state["bend"])
        repulsion = openmm.CustomBondForce("step(0.4-r)*500*(0.4-r)^2")
        repulsion.setUsesPeriodicBoundaryConditions(True)
        for particle in range(4):
            repulsion.addBond(4, particle, [])
        for force in (bonds, angles, repulsion):
            made.addForce(force)
        made.setDefaultPeriodicBoxVectors(*(1.5 * np.eye(3)))
        (folder / f"{name}.xml").write_text(openmm.XmlSerializer.serialize(made))
    return folder


def test_a_solute_is_mapped_and_its_rigid_solvent_carried(tmp_path: Path) -> None:
    """The solvent repels the oxygen only, so that the difference is that of the molecule alone."""
    files = dissolved(tmp_path)
    settings = config(files, map={"molecule": 2}, data={"steps_per_replica": 30_000})
    results = run(tmp_path / "run", settings)
    estimates = named(results)
    found, plain = estimates["F_B - F_A"], estimates["F_B - F_A, without a map, all data"]
    assert_z(found["value"], exact(), found["stderr"])
    assert plain["stderr"] > 2 * found["stderr"]
    with pytest.raises(TopologyError, match=r"would move PAR1-A1, which is in a constraint: rigid water and the like may be carried"):
        require_usable(config(files, map={"molecule": 0}))
    with pytest.raises(TopologyError, match="in a constraint"):
        require_usable(config(files, map={"kind": "radial"}))
    with pytest.raises(InputError, match=r"map\.molecule: expected a molecule from 0 to 2, got 3"):
        require_usable(config(files, map={"molecule": 3}))


def test_a_map_depends_on_the_rigid_solvent_that_it_carries(files: Path, tmp_path: Path) -> None:
    """From files to report, and again from its checkpoint; the solvent says nothing here, and the map must not be wrong for that."""
    solvent, several = dissolved(tmp_path), {"molecule": 2, "surroundings": True, "kind": "affine", "n_around": 4}
    settings = config(solvent, map=several, data={"steps_per_replica": 20_000}, training={"steps": 30})
    results = run(tmp_path / "run", settings)
    found = named(results)["F_B - F_A"]
    assert_z(found["value"], exact(), found["stderr"])
    assert results["diagnostics"]["energy_evaluations"]["training"] > 0
    assert results["diagnostics"]["log_det_error"] == 0
    works = (tmp_path / "run" / "works.csv").read_text()
    run(tmp_path / "run", settings, resume=True)
    assert (tmp_path / "run" / "works.csv").read_text() == works
    with pytest.raises(InputError, match=r"map\.surroundings: the topology is one molecule"):
        require_usable(config(files, map={"surroundings": True}))
    with pytest.raises(ConfigError, match="kind radial carries no atoms"):
        config(solvent, map={"kind": "radial", "surroundings": True})


def test_openmmtools_states_are_joined(files: Path, finished: Path) -> None:
    """Thermodynamic and sampler states instead of files; the frames of the run serve as samples."""
    topology = app.PDBFile(str(files / "topology.pdb")).topology
    thermodynamic, samples = [], []
    for name in ("a", "b"):
        made = openmm.XmlSerializer.deserialize((files / f"{name}.xml").read_text())
        thermodynamic.append(states.ThermodynamicState(made, temperature=300 * unit.kelvin))
        with np.load(finished / name / "trajectory.npz") as data:
            samples.append([states.SamplerState(x * unit.nanometer) for x in data["x0"][:4000:2]])
    settings = Joining(
        map={"stiff_layers": 1, "hidden": [8]}, training={"steps": 40, "batch_size": 32, "learning_rate": 5e-3, "ema_decay": 0.9}
    )
    found = join_states(*thermodynamic, samples_a=samples[0], samples_b=samples[1], topology=topology, settings=settings, progress=False)
    difference, plain = found.estimates[0], next(e for e in found.estimates if e.name.endswith("without a map, all data"))
    assert_z(float(difference.value), exact(), float(difference.stderr))
    assert float(difference.stderr) < 0.6 * float(plain.stderr)
    without = Joining.model_validate({"map": {"kind": "identity"}})
    bare = join_states(*thermodynamic, samples_a=samples[0], samples_b=samples[1], topology=topology, settings=without, progress=False)
    assert_z(float(bare.estimates[0].value), exact(), float(bare.estimates[0].stderr))
    with pytest.raises(InputError, match=r"expected samples \[n, atoms, 3\]"):
        join_states(*thermodynamic, samples_a=samples[0][0].positions, samples_b=samples[1], topology=topology)
    with pytest.raises(EnergyError, match="sample 0 of state b has the energy inf"):
        join_states(*thermodynamic, samples_a=samples[0], samples_b=[np.zeros((3, 3))] * 50, topology=topology)


def test_states_of_an_alchemical_factory_are_joined(tmp_path: Path) -> None:
    """Charges of a pair that are scaled away: energies are openmmtools' own, the difference that of quadrature."""
    spring, length, charge = 5000.0, 0.3, 0.2
    made, bonds, nonbonded = openmm.System(), openmm.HarmonicBondForce(), openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
    for sign in (1, -1, 0):
        made.addParticle(20.0)
        nonbonded.addParticle(sign * charge, 0.1, 0.0)
    for pair in ((0, 1), (1, 2)):
        bonds.addBond(*pair, length, spring)
    angles = openmm.HarmonicAngleForce()
    angles.addAngle(0, 1, 2, 1.9, 300.0)
    for force in (bonds, angles, nonbonded):
        made.addForce(force)
    factory = alchemy.AbsoluteAlchemicalFactory()
    region = alchemy.AlchemicalRegion(alchemical_atoms=[0], annihilate_electrostatics=True)
    alchemical = factory.create_alchemical_system(made, region)
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [topology.addAtom(name, app.Element.getBySymbol("C"), residue) for name in ("C1", "C2", "C3")]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[1], atoms[2])
    start = np.array([[0, 0, 0], [length, 0, 0], [length + 0.1, 0.28, 0]])
    with (tmp_path / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, start * unit.nanometer, file)
    (tmp_path / "a.xml").write_text(openmm.XmlSerializer.serialize(alchemical))
    (tmp_path / "b.xml").write_text(openmm.XmlSerializer.serialize(alchemical))
    kt, coulomb = thermal_energy(300.0), 138.935456

    def log_z(scale: float) -> float:
        def weight(b: float) -> float:
            return b**2 * np.exp(-(0.5 * spring * (b - length) ** 2 - scale * coulomb * charge**2 / b) / kt)

        return float(np.log(quad(weight, 0.1, 0.5, points=[length])[0]))

    ends = ({"parameters": {"lambda_electrostatics": 1.0}}, {"parameters": {"lambda_electrostatics": 0.2}})
    settings = config(tmp_path, a=ends[0], b=ends[1], data={"timestep": "2 femtosecond", "steps_per_replica": 8_000})
    found = named(run(tmp_path / "run", settings))["F_B - F_A"]
    assert_z(found["value"], log_z(1.0) - log_z(0.2), found["stderr"])
    thermodynamic = states.ThermodynamicState(alchemical, temperature=300 * unit.kelvin)
    compound = []
    for value in (1.0, 0.2):
        state = alchemy.AlchemicalState.from_system(alchemical)
        state.lambda_electrostatics = value
        compound.append(states.CompoundThermodynamicState(copy.deepcopy(thermodynamic), composable_states=[state]))
    samples = []
    for name in ("a", "b"):
        with np.load(tmp_path / "run" / name / "trajectory.npz") as data:
            samples.append(data["x0"][::2].astype(float))
    bare = join_states(
        *compound, samples_a=samples[0], samples_b=samples[1], topology=topology, progress=False,
        settings=Joining.model_validate({"map": {"kind": "identity"}}),
    ).estimates[0]  # fmt: skip
    assert_z(float(bare.value), log_z(1.0) - log_z(0.2), float(bare.stderr))
