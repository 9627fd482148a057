"""The command line: clean messages, exit codes, and nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from boltzgen.cli import commands
from boltzgen.config import load_config
from boltzgen.core import Estimate
from boltzgen.errors import InputError, Interrupted
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

ROOT = Path(__file__).parents[1]
VACUUM = ROOT / "systems/alanine_dipeptide_vacuum"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(f"topology: {VACUUM / 'topology.pdb'}\nsystem: {VACUUM / 'system.xml'}\n")
    return path


def generator_that(monkeypatch: pytest.MonkeyPatch, run_generator: object) -> None:
    """Stand in for the workflow, which has its own tests."""
    module = types.ModuleType("boltzgen.workflows.generator")
    module.run_generator = run_generator  # type: ignore[attr-defined]
    module.draw_samples = lambda folder, config, n: folder.path / f"{n}.xtc"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "boltzgen.workflows.generator", module)
    monkeypatch.setattr("boltzgen.workflows.molecule.require_usable", lambda config: None)


def finishing(_: object, folder: RunFolder) -> Results:
    estimates = (Estimate("delta_f", 1.0, 0.1, "kT", 100.0),)
    results = Results("generator", estimates, {}, {}, "reliable", provenance(1, "Reference", sha256={}))
    folder.finish(results)
    return results


def test_help_is_fast_and_light() -> None:
    code = "import sys, boltzgen.cli; print(sorted({'torch', 'openmm', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
    text = invoke("--help").output
    for command in ("check", "run", "paths", "sample", "report", "config", "platforms", "selftest"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("task", ["generator", "cartesian", "particles", "paths"])
def test_config_prints_a_configuration_that_loads(task: str, tmp_path: Path) -> None:
    result = invoke("config", task)
    (tmp_path / "a.yaml").write_text(result.output)
    assert load_config(tmp_path / "a.yaml").task == task


def test_a_run_says_where_its_results_are(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator_that(monkeypatch, finishing)
    result = invoke("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "delta_f = 1.0000 ± 0.1000 kT" in result.output
    assert f"report: {tmp_path / 'out/report.html'}" in result.output
    assert json.loads((tmp_path / "out/results.json").read_text())["task"] == "generator"
    again = invoke("run", config, "--out", tmp_path / "out")
    assert again.exit_code == 2
    assert "holds another run (finished)" in again.stderr
    assert "already finished" in invoke("run", config, "--out", tmp_path / "out", "--resume").output
    assert invoke("run", config, "--out", tmp_path / "out", "--overwrite").exit_code == 0
    assert "12.xtc" in invoke("sample", tmp_path / "out", "-n", 12).output


def test_an_error_is_one_message_without_a_traceback(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object, folder: RunFolder) -> Results:
        raise InputError("the topology has 22 atoms and the system 21 particles")

    generator_that(monkeypatch, failing)
    result = invoke("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "error: the topology has 22 atoms and the system 21 particles\n"
    debugged = invoke("--debug", "run", config, "--out", tmp_path / "out2")
    assert isinstance(debugged.exception, InputError)


def test_an_interrupted_run_says_how_to_go_on(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object, folder: RunFolder) -> Results:
        if folder.resumed:
            return finishing(_, folder)
        raise Interrupted("stopped after step 10 of 20")

    generator_that(monkeypatch, interrupted)
    result = invoke("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 143
    assert f"boltzgen run {config} --out {tmp_path / 'out'} --resume" in result.stderr
    assert "stopped: stopped after step 10" in result.stderr
    assert "is not finished" in invoke("report", tmp_path / "out").stderr
    assert invoke("run", config, "--out", tmp_path / "out", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("temperatur: 300 kelvin", "did you mean 'temperature'?"), ("temperature: 300", "got the bare 300"), ("a: [", "not valid YAML")],
)
def test_a_wrong_configuration_leaves_no_folder(text: str, message: str, config: Path, tmp_path: Path) -> None:
    config.write_text(text)
    result = invoke("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_check_describes_a_system() -> None:
    result = invoke("check", VACUUM / "topology.pdb", VACUUM / "system.xml")
    assert result.exit_code == 0, result.output
    for words in ("atoms        22", "ACE-ALA-NME", "kJ/mol", "energies and forces per second", "60 degrees of freedom"):
        assert words in result.output


def test_check_names_the_remedy_where_no_flow_fits() -> None:
    water = ROOT / "systems/alanine_dipeptide_explicit"
    result = invoke("check", water / "topology.pdb", water / "system.xml")
    assert result.exit_code == 2
    assert "no flow can be used" in result.output
    assert "Remove solvent" in result.output


def test_check_reports_files_that_do_not_belong_together() -> None:
    result = invoke("check", VACUUM / "topology.pdb", ROOT / "systems/capped_proline/system.xml")
    assert result.exit_code == 2
    assert "the topology has 22 atoms and the system 26 particles" in result.stderr


def test_platforms_are_listed() -> None:
    result = invoke("platforms")
    assert result.exit_code == 0
    assert "Reference  usable" in result.output


def test_the_entry_point_exits_with_the_code(config: Path) -> None:
    code = "import sys; sys.argv = ['boltzgen', 'run', 'no-such.yaml']; from boltzgen.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "cannot read the configuration no-such.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_selftest_passes() -> None:
    result = invoke("selftest")
    assert result.exit_code == 0, result.output
    assert result.output.count("ok    ") == 5
