"""The main job from files to files: complete, exact, resumable, honest when it is poor, and clear about bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from click.testing import CliRunner, Result
from openmm import app
from safetensors.torch import load_file

from boltzgen.cli import commands
from boltzgen.config import GeneratorConfig, load_config, make_config
from boltzgen.errors import CheckpointError, ConfigError, InputError, Interrupted, OutputError
from boltzgen.md.loading import load
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.simulate import DynamicsSettings, langevin
from boltzgen.md.trajectory import Trajectory
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.workflows import generator, molecule
from boltzgen.workflows.data import coverage_warnings, onto_constraints
from boltzgen.workflows.generator import draw_samples, run_generator
from boltzgen.workflows.interrupts import StopRequest
from boltzgen.workflows.molecule import load_problem, require_usable
from boltzgen.workflows.run_folder import Results, RunFolder

ROOT = Path(__file__).parents[1]
VACUUM = ROOT / "systems/alanine_dipeptide_vacuum"
PHI = (4, 6, 8, 14)

TINY: dict[str, Any] = {
    "topology": str(VACUUM / "topology.pdb"),
    "system": str(VACUUM / "system.xml"),
    "platform": {"name": "Reference", "contexts": 1},
    "data": {"steps_per_replica": 3000, "save_interval": 100, "chains": 2},
    "flow": {"torsion_layers": 2, "stiff_layers": 1, "hidden": [16], "compile": False},
    "training": {
        "forward_kl_steps": 6,
        "reverse_kl_steps": 6,
        "batch_size": 32,
        "checkpoint_every": 4,
        "population_rounds": 2,
        "population_steps": 2,
        "population_samples": 100,
        "population_batch_size": 32,
    },
    "evaluation": {"n_samples": 200, "batch_size": 50, "n_bootstrap": 20},
}


def tiny(**changes: Any) -> GeneratorConfig:
    """The tiny configuration with some sections changed."""
    values = dict(TINY)
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return make_config(values)


def run(config: GeneratorConfig, path: Path, *, resume: bool = False) -> Results:
    """The job without its pictures, which cost most of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(molecule, "build_report", lambda *_: None)
        return run_with_pictures(config, path, resume=resume)


def run_with_pictures(config: GeneratorConfig, path: Path, *, resume: bool = False) -> Results:
    with RunFolder.create(path, resume=resume) as folder:
        folder.settle_config(config)
        return run_generator(config, folder, progress=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny batches: threads only wait for each other


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run that the tests share."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "tiny"
    run_with_pictures(tiny(), path)
    return path


def content(path: Path) -> dict[str, Any]:
    return json.loads((path / "results.json").read_text())


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_the_folder_is_complete(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    expected = {"config.yaml", "results.json", "results.csv", "report.html", "run.log", "checkpoints", "samples.xtc", "chain.xtc",
                "weights.npz", "data.npz", "flow.safetensors", "training.jsonl"}  # fmt: skip
    pictures = {"ramachandran.png", "energies.png", "weights.png", "training.png", "profile_phi.png", "profile_psi.png"}
    assert expected | pictures <= names
    assert not [name for name in names if name.endswith(".partial")]
    log = (finished / "run.log").read_text()
    for words in ("22 atoms; energies on Reference", "frames to train on", "likelihood: 6 steps", "verdict:"):
        assert words in log


def test_results_follow_the_schema(finished: Path) -> None:
    found = content(finished)
    assert found["schema"] == 1
    assert found["task"] == "generator"
    for estimate in found["estimates"]:
        assert {"name", "value", "stderr", "unit", "n_effective"} <= set(estimate)
    names = [estimate["name"] for estimate in found["estimates"]]
    assert {"F(phi_positive) - F(rest)", "F(phi_positive) - F(rest), MD alone", "ln Z", "ln Z, lower bound", "ln Z, upper bound"} <= set(
        names
    )
    diagnostics = found["diagnostics"]
    for name in ("ess_raw", "ess_clipped", "clip_fraction", "forward_ess", "acceptance", "ess_batch_median"):
        assert 0 <= diagnostics[name] <= 1
    assert diagnostics["n_samples"] == 200
    assert len(diagnostics["ess_batches"]) == 4
    spent = diagnostics["energy_evaluations"]
    assert spent["evaluation"] == 200
    assert spent["data"] > 2 * 4 * 3000
    assert spent["training"] >= 6 * 32
    assert {"loading", "data", "training", "evaluation"} <= set(found["wall_seconds"])
    origin = found["provenance"]
    assert origin["platform"] == "Reference"
    assert set(origin["sha256"]) == {"topology topology.pdb", "system system.xml"}
    rows = list(csv.DictReader((finished / "results.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == names
    assert all(row["seed"] == "1" and "openmm=" in row["versions"] and row["ess_raw"] for row in rows)


def test_a_poor_run_does_not_look_healthy(finished: Path) -> None:
    found = content(finished)
    assert found["verdict"] in ("low overlap", "missing modes", "not converged")
    assert found["verdict_reasons"]
    weak = [
        e for e in found["estimates"] if e["value"] is not None and e["name"].startswith(("F(", "ln Z", "mean")) and e["n_effective"] < 100
    ]
    assert weak
    assert all("effective samples" in e["note"] for e in weak)


def test_the_report_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert not re.search(r"url\(|@import|<script|https?://", page)
    assert page.count("data:image/png;base64,") == 6
    assert f"<h2>{content(finished)['verdict']}</h2>" in page


def test_trajectories_and_weights_belong_together(finished: Path) -> None:
    weights, topology = arrays(finished / "weights.npz"), str(VACUUM / "topology.pdb")
    samples = mdtraj.load(str(finished / "samples.xtc"), top=topology)
    assert samples.n_frames == len(weights["log_w"]) == 200
    np.testing.assert_allclose(weights["log_w"], -weights["u"] - weights["log_q"])
    phi = mdtraj.compute_dihedrals(samples, [PHI])[:, 0]
    assert weights["cv_names"].tolist() == ["phi", "psi"]
    turned = np.angle(np.exp(1j * (phi - weights["cvs"][:, 0])))
    assert np.abs(turned).max() < 0.05  # the rounding of XTC
    chain = mdtraj.load(str(finished / "chain.xtc"), top=topology)
    assert 100 < chain.n_frames <= 200
    distances = np.abs(chain.xyz[:, None] - samples.xyz[None]).max(axis=(2, 3)).min(axis=1)
    assert distances.max() == 0  # every state of the chain is one of the samples


def consistent(path: Path, *, drop_log_det: bool = False) -> None:
    """Weights of drawn samples are −u − log q of the flow that the folder holds."""
    written = draw_samples(RunFolder.read(path), load_config(path / "config.yaml"), 7, progress=False)
    weights = arrays(written.with_suffix(".npz"))
    problem = load_problem(tiny(), RunFolder.read(path))
    pieces = generator._rebuild(tiny(), problem.loaded, RunFolder.read(path))
    state = load_file(path / "flow.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in pieces.flow.state_dict().items())
    seed = int(np.random.SeedSequence([1, int(written.stem[-3:]) + 1]).generate_state(1)[0])
    x, _ = pieces.flow.sample(7, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        z, log_det = pieces.flow.transform.inverse(x)
        log_q = pieces.flow.base.log_prob(z) + (0 if drop_log_det else log_det)
        u = problem.target.reduced_potential(x)
    frames = mdtraj.load(str(written), top=str(VACUUM / "topology.pdb"))
    assert np.abs(frames.xyz - x.detach().numpy()).max() < 1e-3
    np.testing.assert_allclose(weights["u"], u.numpy(), rtol=1e-9)
    np.testing.assert_allclose(weights["log_w"], (-u - log_q).numpy(), rtol=1e-6)


def test_more_samples_are_new_and_weighted_with_the_stored_flow(finished: Path) -> None:
    before = arrays(finished / "weights.npz")["u"]
    consistent(finished)
    with pytest.raises(AssertionError):
        consistent(finished, drop_log_det=True)
    first, second = (arrays(finished / f"samples-{k:03d}.npz")["u"] for k in (1, 2))
    assert len(np.unique(np.concatenate([before, first, second]))) == 200 + 7 + 7
    (finished / "samples-001.npz").unlink()
    kept = (finished / "samples-002.npz").read_bytes()
    assert draw_samples(RunFolder.read(finished), load_config(finished / "config.yaml"), 2, progress=False).name == "samples-003.xtc"
    assert (finished / "samples-002.npz").read_bytes() == kept


def test_samples_of_a_changed_system_are_refused(finished: Path, tmp_path: Path) -> None:
    copied = tmp_path / "system.xml"
    text = (finished / "config.yaml").read_text()
    copied.write_text((VACUUM / "system.xml").read_text() + "\n<!-- changed -->\n")
    (finished / "config.yaml").write_text(text.replace(str(VACUUM / "system.xml"), str(copied)))
    try:
        with pytest.raises(CheckpointError, match=r"system.xml changed since the run"):
            draw_samples(RunFolder.read(finished), load_config(finished / "config.yaml"), 2, progress=False)
    finally:
        (finished / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    ("step", "place"), [(9, "energies after step 3 of 6"), (13, "populations-1 after step 1 of 2"), (15, "populations-2 after step 1 of 2")]
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    step: int, place: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"n": 0}

    def stop(_: StopRequest) -> bool:
        asked["n"] += 1
        return asked["n"] == step  # between checkpoints

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__call__", stop)
        with pytest.raises(Interrupted, match=f"stopped in {place}"):
            run(tiny(), tmp_path / "run")
    assert not (tmp_path / "run/results.json").exists()
    assert f"Interrupted: stopped in {place}" in (tmp_path / "run/run.log").read_text()
    run(tiny(), tmp_path / "run", resume=True)
    assert (tmp_path / "run/flow.safetensors").read_bytes() == (finished / "flow.safetensors").read_bytes()
    ours, theirs = content(tmp_path / "run"), content(finished)
    spent, spent_once = (found["diagnostics"].pop("energy_evaluations") for found in (ours, theirs))
    for name, value in theirs["diagnostics"].items():
        assert ours["diagnostics"][name] == pytest.approx(value, rel=1e-9)
    assert len(ours["estimates"]) == len(theirs["estimates"])
    for mine, other in zip(ours["estimates"], theirs["estimates"], strict=True):
        assert mine["name"] == other["name"]
        for key in ("value", "stderr"):
            assert (mine[key] is None) == (other[key] is None)
            assert mine[key] is None or mine[key] == pytest.approx(other[key], rel=1e-9)
    assert spent["training"] >= spent_once["training"]  # what the first part spent is counted, and repeated work too


def test_resuming_needs_the_same_system_and_whole_files(finished: Path, tmp_path: Path) -> None:
    system = tmp_path / "system.xml"
    system.write_text((VACUUM / "system.xml").read_text())
    config = tiny(system=str(system), training={"forward_kl_steps": 0, "reverse_kl_steps": 0, "batch_size": 8})
    folder = RunFolder.create(tmp_path / "run")
    folder.settle_config(config)
    (folder.path / "trajectory.npz").write_bytes((finished / "trajectory.npz").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"trajectory.npz are corrupt"):
        run_generator(config, folder, progress=False)
    (folder.path / "trajectory.npz").write_bytes((finished / "trajectory.npz").read_bytes())
    system.write_text(system.read_text().replace("nonbondedCutoff", "nonbondedCutoff", 1) + "\n")
    with pytest.raises(CheckpointError, match="belong to another system or configuration"):
        run_generator(config, folder, progress=False)
    folder.close()


def test_a_corrupt_checkpoint_is_named(finished: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.settle_config(tiny())
    (folder.path / "trajectory.npz").write_bytes((finished / "trajectory.npz").read_bytes())
    (stage,) = (finished / "checkpoints/energies").iterdir()
    copied = folder.checkpoints / "likelihood" / stage.name
    copied.mkdir(parents=True)
    for path in stage.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    weights = copied / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3] + b"abc")
    with pytest.raises(CheckpointError, match=r"weights.safetensors is corrupt"):
        run_generator(tiny(), folder, progress=False)
    folder.close()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def as_yaml(path: Path, config: GeneratorConfig) -> Path:
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


@pytest.mark.parametrize(
    ("stage", "number", "code"), [("data", signal.SIGTERM, 143), ("likelihood", signal.SIGTERM, 143), ("likelihood", signal.SIGINT, 130)]
)
def test_a_signal_stops_cleanly_and_says_how_to_go_on(stage: str, number: int, code: int, tmp_path: Path) -> None:
    steps = 10_000_000 if stage == "data" else 2000
    config = tiny(data={"steps_per_replica": steps}, training={"forward_kl_steps": 100_000})
    out = tmp_path / "out"
    program = [sys.executable, "-c", "from boltzgen.cli import main; main()"]
    arguments = [*program, "run", str(as_yaml(tmp_path / "long.yaml", config)), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    sign = out / ("run.log" if stage == "data" else "domains.json")
    started = time.monotonic()
    while not (sign.exists() and (stage != "data" or "energies on" in sign.read_text())) and time.monotonic() - started < 60:
        time.sleep(0.1)
    time.sleep(2.0)
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors
    assert f"go on with: boltzgen run {tmp_path / 'long.yaml'} --out {out} --resume" in errors
    assert "stopped: " in errors
    assert "Traceback" not in errors
    assert not (out / "results.json").exists()
    assert bool(list((out / "checkpoints").glob("likelihood/step-*"))) == (stage == "likelihood")


def test_a_finished_run_is_neither_repeated_nor_overwritten(finished: Path, tmp_path: Path) -> None:
    before = {
        path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.is_file() and path.suffix in (".json", ".npz", ".xtc")
    }
    config = as_yaml(tmp_path / "tiny.yaml", tiny())
    refused = invoke("run", config, "--out", finished)
    assert refused.exit_code == 2
    assert "holds another run (finished)" in refused.stderr
    resumed = invoke("run", config, "--out", finished, "--resume")
    assert resumed.exit_code == 0
    assert "already finished" in resumed.stdout
    assert before == {name: (finished / name).stat().st_mtime_ns for name in before}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "/nowhere/nosuch.pdb"}, "there is no such file"),
        ({"platform": {"name": "Foo"}}, "platform 'Foo' is unknown; available here:"),
        (
            {"data": {"source": "trajectory", "files": [str(ROOT / "systems/capped_valine/topology.pdb")]}},
            "holds 28 atoms, the topology 22",
        ),
    ],
)
def test_bad_input_neither_makes_a_folder_nor_deletes_a_run(changes: dict[str, Any], message: str, finished: Path, tmp_path: Path) -> None:
    config = as_yaml(tmp_path / "wrong.yaml", tiny(**changes))
    for out, options in ((tmp_path / "out", ()), (finished, ("--overwrite",))):
        done = invoke("run", config, "--out", out, *options)
        assert done.exit_code == 2
        assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert (finished / "results.json").exists()


def test_a_place_that_cannot_be_written_fails_before_any_md(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "collect", lambda *_, **__: pytest.fail("the data were made first"))
    with pytest.raises(OutputError, match="cannot write to /proc/run"):
        run(tiny(), Path("/proc/run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collective_variables": {"phi": {"kind": "dihedral", "atoms": [4, 6, 8, 140]}}}, r"phi: expected atoms from 0 to 21, got \[4, 6"),
        ({"basins": {"a": {"chi": ["0 radian", "1 radian"]}}}, r"a coordinate of this molecule \(found: phi, psi\), got 'chi'"),
        ({"data": {"source": "trajectory", "files": ["/nowhere/a.xtc"]}}, "there is no trajectory file /nowhere/a.xtc"),
        ({"system": str(ROOT / "systems/capped_proline/system.xml")}, "the topology has 22 atoms and the system 26 particles"),
    ],
)  # fmt: skip
def test_inputs_are_checked_before_anything_is_done(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        require_usable(tiny(**changes))
    require_usable(tiny())


def test_a_trajectory_of_another_molecule_is_refused(tmp_path: Path) -> None:
    mdtraj.load(str(ROOT / "systems/capped_valine/topology.pdb")).save_xtc(str(tmp_path / "other.xtc"))
    config = tiny(data={"source": "trajectory", "files": [str(tmp_path / "other.xtc")]})
    with pytest.raises(InputError, match="holds 28 atoms, the topology 22: it is a trajectory of another molecule"):
        run(config, tmp_path / "run")


def test_a_users_trajectory_of_one_basin_is_not_trusted(finished: Path, tmp_path: Path) -> None:
    stored = arrays(finished / "trajectory.npz")
    topology = mdtraj.load(str(VACUUM / "topology.pdb")).topology
    mdtraj.Trajectory(stored["x0"], topology).save_dcd(str(tmp_path / "user.dcd"))
    config = tiny(data={"source": "trajectory", "files": [str(tmp_path / "user.dcd")]})
    results = run(config, tmp_path / "run")
    assert results.verdict != "reliable"
    data = arrays(tmp_path / "run/trajectory.npz")
    np.testing.assert_allclose(data["u0"], stored["u0"], atol=0.02)  # single precision of the file
    assert int(data["n_hot"]) == 1
    assert data["scalars1"][0] == 600.0


def with_phi(values: np.ndarray, *, temperature_kelvin: float) -> Trajectory:
    """Four atoms in a chain, turned about the middle bond."""
    x = np.zeros((len(values), 4, 3))
    x[:, 0], x[:, 2] = [0.1, 0, 0], [0, 0, 0.1]
    x[:, 3] = np.stack([0.1 * np.cos(values), 0.1 * np.sin(values), np.full(len(values), 0.1)], axis=1)
    rows = np.zeros(len(values), dtype=np.int64)
    return Trajectory(x=x, u=np.zeros(len(values)), block=rows, chain=rows, temperature_kelvin=temperature_kelvin,
                      statistical_inefficiency=1.0, n_force_evaluations=0)  # fmt: skip


def test_a_basin_that_only_hot_data_visit_is_missed() -> None:
    rng = np.random.default_rng(0)
    cold = with_phi(rng.normal(-1.5, 0.3, 4000), temperature_kelvin=300.0)
    both = np.where(rng.random(4000) < 0.2, rng.normal(1.05, 0.1, 4000), rng.normal(-1.5, 0.4, 4000))
    hot = with_phi(both, temperature_kelvin=600.0)
    torsions = {"phi": (0, 1, 2, 3)}
    sentences = coverage_warnings(replace(cold, hot=(hot,)), torsions=torsions)
    assert sentences
    assert any("phi between 0 and 60 degrees" in s or "phi between 60 and 120 degrees" in s for s in sentences)
    assert all("at 300 K never visit phi" in s and "600 K" in s for s in sentences)
    covering = with_phi(both, temperature_kelvin=300.0)
    assert coverage_warnings(replace(covering, hot=(hot,)), torsions=torsions) == ()
    assert coverage_warnings(cold, torsions=torsions) == ()


def test_a_missed_basin_decides_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "the data at 300 K never visit phi between 0 and 60 degrees"
    monkeypatch.setattr(generator, "coverage_warnings", lambda *_, **__: (sentence,))
    config = tiny(data={"steps_per_replica": 1500}, training={"forward_kl_steps": 1, "reverse_kl_steps": 0}, evaluation={"n_samples": 100})
    results = run(config, tmp_path / "run")
    assert results.verdict == "missing modes"
    assert results.reasons[0] == sentence


def constrained_system(path: Path) -> Path:
    """Alanine dipeptide with rigid X–H bonds, in vacuum, as most users prepare it."""
    topology = app.PDBFile(str(VACUUM / "topology.pdb")).topology
    system = app.ForceField("amber96.xml").createSystem(topology, constraints=app.HBonds, nonbondedMethod=app.NoCutoff)
    path.write_text(openmm.XmlSerializer.serialize(system))
    return path


def test_rigid_hydrogens_go_through_the_whole_job(tmp_path: Path) -> None:
    config = tiny(system=str(constrained_system(tmp_path / "system.xml")), data={"timestep": "2 femtosecond"})
    results = run(config, tmp_path / "run")
    assert results.verdict != "reliable"
    loaded = load(config.topology, config.system)
    assert len(loaded.molecule.constraints) == 12
    problem = load_problem(config, RunFolder.read(tmp_path / "run"))
    assert isinstance(problem.target, ConstrainedTarget)
    data = arrays(tmp_path / "run/trajectory.npz")
    with torch.no_grad():
        exact = problem.target.reduced_potential(torch.from_numpy(data["x0"])).numpy()
        bare = problem.openmm_target.reduced_potential(torch.from_numpy(data["x0"])).numpy()
    np.testing.assert_allclose(data["u0"], exact, atol=1e-6)  # as the weights of the samples: with the mass-metric term
    assert np.abs(exact - bare).min() > 0.01
    samples = mdtraj.load(str(tmp_path / "run/samples.xtc"), top=str(VACUUM / "topology.pdb"))
    lengths = mdtraj.compute_distances(samples, loaded.molecule.constraints)
    assert np.abs(lengths - loaded.molecule.constraint_lengths).max() < 2e-3
    assert draw_samples(RunFolder.read(tmp_path / "run"), load_config(tmp_path / "run" / "config.yaml"), 3, progress=False).exists()


def test_an_xtc_of_rigid_hydrogens_is_put_back_onto_its_constraints(tmp_path: Path) -> None:
    """XTC rounds to 0.001 nm, which moves constrained bonds off the manifold that energies and density live on."""
    system = str(constrained_system(tmp_path / "system.xml"))
    loaded = load(VACUUM / "topology.pdb", Path(system))
    settings = DynamicsSettings(n_steps=3000, save_every=10, timestep_ps=0.002, friction_per_ps=1.0, seed=1,
                                platform=PlatformChoice(name="Reference"))  # fmt: skip
    made = langevin(loaded.system, loaded.positions, temperature_kelvin=300.0, settings=settings, progress=False)
    mdtraj.Trajectory(made.x, mdtraj.Topology.from_openmm(loaded.topology)).save_xtc(str(tmp_path / "user.xtc"))
    config = tiny(system=system, data={"source": "trajectory", "files": [str(tmp_path / "user.xtc")], "timestep": "2 femtosecond"})
    run(config, tmp_path / "run")
    data = arrays(tmp_path / "run/trajectory.npz")
    i, j = loaded.molecule.constraints.T
    lengths = np.linalg.norm(data["x0"][:, i] - data["x0"][:, j], axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to(loaded.molecule.constraint_lengths, lengths.shape), atol=1e-9)
    assert any(name.startswith("trajectory 1 user.xtc") for name in content(tmp_path / "run")["provenance"]["sha256"])
    unconstrained = made.x * 1.05
    with pytest.raises(InputError, match="it was made without constraints"):
        onto_constraints(unconstrained, loaded)


@pytest.mark.parametrize("changes", [{"data": {"source": "langevin"}}, {"training": {"reverse_estimator": "score", "use_forces": False}}])
def test_other_data_and_estimators_go_through_the_whole_job(changes: dict[str, Any], tmp_path: Path) -> None:
    results = run(tiny(**changes), tmp_path / "run")
    assert math.isfinite(results.diagnostics["ess_raw"])
    assert {row["stage"] for row in map(json.loads, (tmp_path / "run/training.jsonl").read_text().splitlines())} >= {
        "likelihood",
        "energies",
    }


def test_cooling_from_hot_data_runs(tmp_path: Path) -> None:
    config = tiny(
        data={"temperatures": ["300 kelvin", "320 kelvin"]},
        training={
            "annealing": {"enabled": True, "minimum_ess": 0.001, "steps_per_temperature": 2},
            "batch_size": 8,
        },
    )
    results = run(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/training.jsonl").read_text().splitlines()]
    assert {"likelihood", "annealing", "energies", "populations-1", "populations-2"} == {row["stage"] for row in rows}
    assert results.diagnostics["energy_evaluations"]["training"] > 0


def test_a_finished_run_is_a_flow_move_in_openmmtools(finished: Path, tmp_path: Path) -> None:
    from openmmtools import cache, states, utils

    from boltzgen.workflows.plugins.densities import FreeMolecule
    from boltzgen.workflows.plugins.openmmtools import FlowMove

    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    contexts = cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))
    state = states.ThermodynamicState(loaded.system, 300 * openmm.unit.kelvin)
    start = states.SamplerState(loaded.positions * openmm.unit.nanometer)
    move = FlowMove(finished, n_proposals=5, seed=2)
    move.apply(state, start, context_cache=contexts)
    again = utils.deserialize(utils.serialize(move))
    again.apply(state, start, context_cache=contexts)
    assert again.n_proposed == 10
    assert again.n_failed == again.n_outside == 0
    density = move.flow.load()
    assert isinstance(density.frame, FreeMolecule)
    generator = torch.Generator().manual_seed(1)
    x, log_q = density.draw(4, generator=generator)
    placed = torch.stack([density.frame.place(y, torch.from_numpy(loaded.positions), generator=generator) for y in x])
    torch.testing.assert_close(density.log_prob(placed), log_q, atol=1e-6, rtol=0)
    torch.testing.assert_close(placed.mean(1), torch.from_numpy(loaded.positions).mean(0).expand(4, 3))
    torch.testing.assert_close(torch.cdist(placed, placed), torch.cdist(x, x))
    assert float((placed - placed.mean(1, keepdim=True) - x + x.mean(1, keepdim=True)).abs().max()) > 0.05

    changed = tmp_path / "changed"
    shutil.copytree(finished, changed)
    other = FlowMove(changed)
    with open(changed / "flow.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match="have changed since the run began"):
        other.apply(state, start, context_cache=contexts)
