"""Imports go through the doors, and importing the package stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["boltzgen", "boltzgen.core", "boltzgen.config", "boltzgen.cli"])
def test_importing_does_not_load_the_heavy_doors(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'openmm', 'openmmtools', 'e3nn', 'dask', 'nflows', 'pymbar'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_floors_and_doors_are_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_linter_catches_a_forbidden_import(tmp_path: Path) -> None:
    package = tmp_path / "boltzgen"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "core.py").write_text("import openmm\n")
    (package / "units.py").write_text("import boltzgen.core\n")
    (tmp_path / "pyproject.toml").write_text(
        """
[tool.importlinter]
root_package = "boltzgen"
include_external_packages = true
[[tool.importlinter.contracts]]
name = "floors"
type = "layers"
layers = ["boltzgen.core", "boltzgen.units"]
[[tool.importlinter.contracts]]
name = "door"
type = "forbidden"
source_modules = ["boltzgen.core"]
forbidden_modules = ["openmm"]
"""
    )
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert "floors BROKEN" in done.stdout
    assert "door BROKEN" in done.stdout
