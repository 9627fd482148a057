"""Work values of other programs, from files to a verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from boltzgen.cli import commands
from boltzgen.errors import InputError
from boltzgen.units import thermal_energy
from boltzgen.workflows.work_files import judge_work_files
from tests.assertions import assert_z

TRUTH, SIGMA = 3.0, 1.5


def written(path: Path, values: np.ndarray) -> Path:
    path.write_text("# works\n" + "\n".join(f"{value:.10g}" for value in values) + "\n")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Normal works that obey Crooks' theorem: means ΔF + σ²/2 and −ΔF + σ²/2."""
    random = np.random.default_rng(4)
    forward, reverse = (random.normal(sign * TRUTH + SIGMA**2 / 2, SIGMA, 2000) for sign in (1, -1))
    return written(tmp_path / "forward.txt", forward), written(tmp_path / "reverse.txt", reverse)


def test_both_directions_give_the_difference_and_a_verdict(files: tuple[Path, Path], tmp_path: Path) -> None:
    estimates, verdict = judge_work_files(*files, unit="kT")
    assert_z(float(estimates[0].value), TRUTH, float(estimates[0].stderr))
    assert verdict is not None
    assert verdict.word == "reliable"
    kt = thermal_energy(300.0)
    scaled = [written(tmp_path / f"{k}.txt", kt * np.loadtxt(path)) for k, path in enumerate(files)]
    again, _ = judge_work_files(*scaled, unit="kJ/mol", temperature_kelvin=300.0)
    assert float(again[0].value) == pytest.approx(float(estimates[0].value), abs=1e-7)
    swapped, doubt = judge_work_files(files[0], files[0], unit="kT")  # works of the same way twice contradict each other
    assert doubt is not None
    assert doubt.word != "reliable"
    assert abs(float(swapped[0].value) - TRUTH) > 8 * float(swapped[0].stderr)


def test_correlated_rows_get_wider_errors(tmp_path: Path) -> None:
    random, series = np.random.default_rng(5), np.zeros((2, 4000))
    for t in range(1, 4000):
        series[:, t] = 0.95 * series[:, t - 1] + np.sqrt(1 - 0.95**2) * random.normal(size=2)
    paths = [written(tmp_path / f"{k}.txt", row + 0.5) for k, row in enumerate(series)]
    alone, blocked = (float(judge_work_files(*paths, unit="kT", correlated=flag)[0][0].stderr) for flag in (False, True))
    assert blocked > 3 * alone


def test_the_command(files: tuple[Path, Path]) -> None:
    forward, reverse = map(str, files)
    both = CliRunner().invoke(commands, ["works", forward, reverse, "--unit", "kT"])
    assert both.exit_code == 0, both.output
    assert both.output.startswith("F_B - F_A = ")
    assert "verdict: reliable" in both.output
    one = CliRunner().invoke(commands, ["works", forward, "--unit", "kT"])
    assert "verdict: none, as one direction cannot tell" in one.output
    missing = CliRunner().invoke(commands, ["works", forward, reverse, "--unit", "kJ/mol"])
    assert missing.exit_code == InputError.exit_code
    assert "need a temperature" in missing.output
