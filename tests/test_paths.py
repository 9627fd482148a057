"""The job of steered paths, end to end on a dimer: right numbers, honest verdicts, and resuming without losing or counting a path twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from assertions import assert_z, z_score
from click.testing import CliRunner, Result
from dimer_runs import TOP, always_asked, assert_same, dimer_config, exact_difference, plain, run, table, written_dimer

from boltzgen.cli import commands
from boltzgen.config import PathsConfig
from boltzgen.errors import CheckpointError, Interrupted
from boltzgen.estimators.path_free_energy import basin_free_energy
from boltzgen.paths import Paths
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.workflows import cycle_records, paths
from boltzgen.workflows.jobs import make_report
from boltzgen.workflows.path_analysis import analyse_paths
from boltzgen.workflows.path_records import Recorder
from boltzgen.workflows.paths import open_problem
from boltzgen.workflows.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
LONG = {
    "walkers": {"count": 8, "equilibration": 10}, "proposal": {"bins": 8, "training_steps": 60}, "adaptation": {"rounds": 3, "cycles": 8},
    "production": {"cycles": 250, "save_interval": 50},
}  # fmt: skip


@pytest.fixture
def dimer(tmp_path: Path, no_pictures: None) -> Path:
    written_dimer(tmp_path)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has its own tests, and takes most of the time of a short run."""
    monkeypatch.setattr(paths, "build_paths_report", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PathsConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("long")
    written_dimer(folder)
    config = dimer_config(folder, LONG)
    return folder / "run", config, run(config, folder / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    written_dimer(folder)
    run(dimer_config(folder), folder / "run")
    return folder / "run"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_free_energies_are_those_of_quadrature(long_run: tuple[Path, PathsConfig, dict[str, Any]]) -> None:
    path, _, results = long_run
    found = {estimate["name"]: estimate for estimate in results["estimates"]}
    assert set(found) == {"F(long) - F(short)", "F(long) - F(short), flux", "acceptance", "mean bond"}
    for name in ("F(long) - F(short)", "F(long) - F(short), flux"):
        assert found[name]["stderr"] < 0.2
        assert_z(found[name]["value"], exact_difference(), found[name]["stderr"])
    assert results["verdict"] == "reliable", results["verdict_reasons"]
    tried = Paths(**table(path / "paths.npz"))
    blind = replace(tried, log_proposal_ratio=np.zeros(len(tried)))
    wrong = basin_free_energy(blind, lambda xi: xi[:, 0] < TOP, lambda xi: xi[:, 0] >= TOP, seed=1).difference
    assert abs(z_score(float(wrong.value), exact_difference(), float(wrong.stderr))) > 5, "works without the ratio of the proposal"


def test_a_run_leaves_all_its_files_and_counts_what_it_spent(long_run: tuple[Path, PathsConfig, dict[str, Any]]) -> None:
    path, config, results = long_run
    assert json.loads((path / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("report.html", "results.csv", "proposal.safetensors", "films.npz", "works.npz", "config.yaml", "run.log",
                 "walkers.png", "proposal.png", "rounds.png", "profile_bond.png", "works.png", "path.png"):  # fmt: skip
        assert (path / name).stat().st_size > 0, name
    tried, samples = table(path / "paths.npz"), table(path / "samples.npz")
    assert len(tried["work"]) == results["diagnostics"]["n_paths"] == 8 * 225  # the first tenth of the cycles is left out
    assert samples["x"].shape == (5, 8, 3, 3)
    spent = results["diagnostics"]["energy_evaluations"]
    assert spent["starts"] == 10 * 8 * 7
    assert spent["adaptation, local"] == 24 * 8 * 7
    assert spent["production, local"] == 225 * 8 * 7
    every = Recorder(RunFolder(path), 1).history("production").paths
    assert spent["production, discarded"] == 25 * 8 * 7 + every.n_force.sum() - tried["n_force"].sum()
    assert spent["production, paths"] == tried["n_force"].sum()
    assert spent["tuning"] == 0
    assert spent["picture of a path"] > 0
    assert spent["total"] == sum(n for name, n in spent.items() if name != "total")
    assert results["diagnostics"]["failed_paths"] == 0
    assert results["diagnostics"]["production_cycles"] == 225
    assert results["diagnostics"]["discarded_cycles"] == 25
    assert set(results["provenance"]["sha256"]) == {"topology topology.pdb", "system system.xml"}
    assert results["provenance"]["platform"] == "Reference"
    assert make_report(RunFolder.read(path)).exists()
    assert config.seed == results["provenance"]["seed"]


def test_adaptation_and_what_is_discarded_enter_no_estimate(long_run: tuple[Path, PathsConfig, dict[str, Any]]) -> None:
    path, config, results = long_run
    n_before = 24 + 25
    assert table(path / "paths.npz")["time"].min() == n_before
    assert table(path / "samples.npz")["cycle"].min() >= n_before
    recorder = Recorder(RunFolder(path), 1)
    production, adaptation = recorder.history("production"), recorder.history("adaptation")
    assert adaptation.paths is not None
    broken = replace(adaptation.paths, work=np.full(len(adaptation.paths), -50.0))
    early = production.paths.time < n_before
    worse = replace(production, paths=replace(production.paths, work=np.where(early, -50.0, production.paths.work)))
    restraint = open_problem(config).engine.restraint
    again = analyse_paths(config, worse, replace(adaptation, paths=broken), restraint=restraint)
    assert [estimate.value for estimate in again.estimates] == [estimate["value"] for estimate in results["estimates"]]
    all_of_it = config.model_copy(update={"production": config.production.model_copy(update={"discard": 0.0})})
    wrong = analyse_paths(all_of_it, worse, adaptation, restraint=restraint).estimates[0].value
    assert wrong != results["estimates"][0]["value"]


def test_stopped_after_every_cycle_a_run_is_the_same(dimer: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In adaptation, at its border, in production, and after the last cycle."""
    config = dimer_config(dimer)
    monkeypatch.setattr(paths, "stop_on_signal", always_asked)
    for stops in range(11):
        with pytest.raises(Interrupted, match=f"after cycle {stops + 1} of 11"):
            run(config, dimer / "run", resume=stops > 0)
    results = run(config, dimer / "run", resume=True)
    assert len(list((dimer / "run/paths").glob("*.npz"))) == 11
    for name in ("paths.npz", "samples.npz", "films.npz"):
        assert_same(whole / name, dimer / "run" / name)
    before = json.loads((whole / "results.json").read_text())
    assert results["estimates"] == before["estimates"]
    assert results["diagnostics"]["energy_evaluations"] == before["diagnostics"]["energy_evaluations"]


def test_a_finished_run_made_longer_is_the_longer_run(dimer: Path, whole: Path) -> None:
    (dimer / "long.yaml").write_text(yaml.safe_dump(plain(dimer), sort_keys=False))
    run(dimer_config(dimer, {"production": {"cycles": 2}}), dimer / "run")
    done = invoke("paths", dimer / "long.yaml", "--out", dimer / "run", "--resume")
    assert done.exit_code == 0, done.output
    for name in ("paths.npz", "samples.npz", "films.npz"):
        assert_same(whole / name, dimer / "run" / name)
    found, expected = (json.loads((path / "results.json").read_text()) for path in (dimer / "run", whole))
    assert found["estimates"] == expected["estimates"]
    assert "already finished" in invoke("paths", dimer / "long.yaml", "--out", dimer / "run", "--resume").output
    with pytest.raises(CheckpointError, match=r"production\.cycles: 5, and 4 are asked for: it can be made longer, not shorter"):
        run(dimer_config(dimer, {"production": {"cycles": 4}}), dimer / "run", resume=True)
    assert (dimer / "run/results.json").exists()


def test_a_longer_run_that_is_stopped_is_not_finished(dimer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of the shorter one do not stand for it."""
    run(dimer_config(dimer, {"production": {"cycles": 2}}), dimer / "run")
    monkeypatch.setattr(paths, "stop_on_signal", always_asked)
    with pytest.raises(Interrupted):
        run(dimer_config(dimer), dimer / "run", resume=True)
    assert not (dimer / "run/results.json").exists()


@pytest.mark.parametrize("n_saved", [0, 2, 6, 8])
def test_pieces_that_no_checkpoint_knows_are_done_again(n_saved: int, dimer: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power fails between the piece and its checkpoint: before any, in adaptation, after its border, in production."""
    save, saved = CheckpointStore.save, []

    def failing(store: CheckpointStore, snapshot: Any) -> None:
        if len(saved) == n_saved:
            raise RuntimeError("power cut")
        saved.append(snapshot.step)
        save(store, snapshot)

    monkeypatch.setattr(cycle_records, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(CheckpointStore, "save", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run(dimer_config(dimer), dimer / "run")
    assert len(list((dimer / "run/paths").glob("*.npz"))) == n_saved + 1
    monkeypatch.setattr(CheckpointStore, "save", save)
    run(dimer_config(dimer), dimer / "run", resume=True)
    assert_same(whole / "paths.npz", dimer / "run/paths.npz")


def _killed(config: Path, out: Path, *, seconds: float) -> int:
    """Start a run that writes a checkpoint after every cycle, and kill it some seconds after the first one; its exit code."""
    code = "import boltzgen.workflows.cycle_records as r; r.CHECKPOINT_SECONDS = -1.0; from boltzgen.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code, "paths", str(config), "--out", str(out)], env=environment, cwd=ROOT,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        limit = time.monotonic() + 300
        while not any(out.glob("checkpoints/sampling/step-*")) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        return process.wait()


@pytest.mark.parametrize("seconds", [0.13, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.0, 0.31, 0.57, 0.83))])
def test_a_killed_run_goes_on_to_the_same_table(seconds: float, dimer: Path) -> None:
    more = {"production": {"cycles": 150, "save_interval": 50}}
    (dimer / "job.yaml").write_text(yaml.safe_dump(plain(dimer, more)))
    run(dimer_config(dimer, more), dimer / "whole")
    assert _killed(dimer / "job.yaml", dimer / "run", seconds=seconds) == -signal.SIGKILL
    assert not (dimer / "run/results.json").exists()
    assert "holds another run (unfinished)" in invoke("paths", dimer / "job.yaml", "--out", dimer / "run").stderr
    done = invoke("paths", dimer / "job.yaml", "--out", dimer / "run", "--resume")
    assert done.exit_code == 0, done.output
    assert_same(dimer / "whole/paths.npz", dimer / "run/paths.npz")


def _stopped(config: PathsConfig, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped after its first cycle."""
    with monkeypatch.context() as patch:
        patch.setattr(paths, "stop_on_signal", always_asked)
        with pytest.raises(Interrupted):
            run(config, path)


def test_a_run_is_not_resumed_with_another_system_or_variable(dimer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dimer / "run"
    _stopped(dimer_config(dimer), path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"started with other values of collective_variables"):
        run(dimer_config(dimer, {"collective_variables": {"bond": {"kind": "distance", "atoms": [0, 2]}}}), path, resume=True)
    written_dimer(dimer, barrier=5.0)
    with pytest.raises(CheckpointError, match=r"starts\.npz belong to another system or configuration; start again with --overwrite"):
        run(dimer_config(dimer), path, resume=True)
    walkers = (path / "starts.npz").read_bytes()
    (path / "starts.npz").unlink()
    with pytest.raises(CheckpointError, match="belongs to another system or configuration"):
        run(dimer_config(dimer), path, resume=True)
    written_dimer(dimer)
    (path / "starts.npz").write_bytes(walkers)
    run(dimer_config(dimer), path, resume=True)


def test_the_order_of_variables_counts(dimer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of tables and weights of flows are those of the variables in order."""
    kinds = {"bond": {"kind": "distance", "atoms": [0, 1]}, "other": {"kind": "distance", "atoms": [1, 2]}}
    ranges = {"bond": ["0.22 nanometer", "0.58 nanometer"], "other": ["0.1 nanometer", "0.3 nanometer"]}
    more = {"collective_variables": kinds, "ranges": ranges}
    _stopped(dimer_config(dimer, more), dimer / "run", monkeypatch)
    turned = dimer_config(dimer, more | {"collective_variables": dict(reversed(kinds.items()))})
    with pytest.raises(CheckpointError, match="belong to another system or configuration"):
        run(turned, dimer / "run", resume=True)


@pytest.mark.parametrize(
    "more", [{"dynamics": {"timestep": "2 picosecond"}}, {"widths": {"bond": "0.00001 nanometer"}}], ids=["time step", "stiffness"]
)
def test_paths_that_blow_up_are_counted_and_the_run_goes_on(more: dict[str, Any], tmp_path: Path) -> None:
    written_dimer(tmp_path)
    _blows_up(dimer_config(tmp_path, more), tmp_path / "run")


def _blows_up(config: PathsConfig, path: Path) -> None:
    results = run(config, path)
    assert results["diagnostics"]["n_paths"] == 16
    assert results["diagnostics"]["blown_up_paths"] > 10
    assert results["diagnostics"]["failed_paths"] > 0
    assert results["verdict"] != "reliable"
    assert any("kT of work: take a smaller time step or a softer restraint" in reason for reason in results["verdict_reasons"])
    assert np.isfinite(table(path / "samples.npz")["x"]).all()
    assert (path / "report.html").exists()


def test_a_proposal_of_one_basin_is_reported(dimer: Path) -> None:
    peak = {"centre": {"bond": "0.3 nanometer"}, "width": {"bond": "0.02 nanometer"}}
    results = run(dimer_config(dimer, {"proposal": {"kind": "fixed", "peaks": [peak], "defensive": 0.0}}), dimer / "run")
    assert results["verdict"] != "reliable"
    assert any("0 % of paths to basin long: it covers one basin only" in reason for reason in results["verdict_reasons"])
    assert results["diagnostics"]["proposed"] == {"short": 1.0, "long": 0.0}


def test_a_third_basin_that_is_not_proposed_is_reported_too(dimer: Path) -> None:
    basins = {
        "short": {"bond": ["0 nanometer", "0.4 nanometer"]}, "long": {"bond": ["0.4 nanometer", "0.8 nanometer"]},
        "broken": {"bond": ["0.8 nanometer", "2 nanometer"]},
    }  # fmt: skip
    results = run(dimer_config(dimer, {"basins": basins, "proposal": {"kind": "fixed"}}), dimer / "run")
    assert any("0 % of paths to basin broken" in reason for reason in results["verdict_reasons"])


def test_plain_dynamics_are_not_exact_and_say_so(dimer: Path) -> None:
    results = run(dimer_config(dimer, {"local": {"kind": "langevin"}, "proposal": {"kind": "fixed"}}), dimer / "run")
    assert results["verdict"] == "not exact"
    assert any("error of its time step; take local.kind: metropolised" in reason for reason in results["verdict_reasons"])
    assert any("error of its time step" in note for note in results["notes"])


def test_production_ends_early_when_enough_is_known(dimer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the same cycle on a machine that is so fast that it writes no checkpoint, or so slow that it writes all of them."""
    more = {"proposal": {"kind": "fixed"}, "production": {"cycles": 400, "round_trips": 6, "r_hat": 1.5, "save_interval": 50}}
    for name, seconds in (("fast", 1e6), ("slow", -1.0)):
        monkeypatch.setattr(cycle_records, "CHECKPOINT_SECONDS", seconds)
        results = run(dimer_config(dimer, more), dimer / name)
    assert_same(dimer / "fast/paths.npz", dimer / "slow/paths.npz")
    kept, n = (results["diagnostics"][name] for name in ("production_cycles", "discarded_cycles"))
    n += kept
    assert n % cycle_records.ASK_EVERY == 0
    assert 8 <= n < 400
    assert results["diagnostics"]["round_trips"] >= 6
    assert results["diagnostics"]["n_paths"] == 4 * kept
    assert any(note.startswith(f"production ended after {n} of 400 cycles") for note in results["notes"])


def test_pilot_paths_choose_what_is_used(dimer: Path) -> None:
    results = run(dimer_config(dimer, {"paths": {"tune": True, "pilot_paths": 2}}), dimer / "run")
    tried = json.loads((dimer / "run/pilot.json").read_text())
    best = tried[0]
    assert best["score"] == max(one["score"] for one in tried) > 0
    assert {one["steps"] for one in tried} >= {10, 20, 40}
    used = results["diagnostics"]
    assert (used["path_steps"], used["bend"], used["widths"]) == (best["steps"], best["bend"], {"bond": best["widths"][0]})
    assert used["energy_evaluations"]["tuning"] == sum(one["n_force"] for one in tried) > 0
    found = table(dimer / "run/paths.npz")
    span, looks = 0.18, table(dimer / "run/looks.npz")
    seen = np.array([np.sum((looks["time"] == t) & (looks["walker"] == w)) for t, w in zip(found["time"], found["walker"], strict=True)])
    steps = np.ceil(best["steps"] * np.abs(found["end"] - found["start"])[:, 0] / span).clip(min=1)
    assert seen.sum() > 0
    np.testing.assert_array_equal(found["n_force"], steps + 2 + 2 * seen)
