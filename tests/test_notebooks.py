"""The notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

#: What a notebook must print.
PRINTED = {
    "alanine_dipeptide": ("verdict:", "frames to learn from", "free torsions", "ESS ", "F(0 < phi < 2 rad) - F(rest)"),
    "lj13": ("configurations to learn from", "parameters", "flow_matching", "ESS ", "log density known to", "ln Z"),
    "polymer_paths": ("R / sigma", "F(stretched) - F(compact)", "verdict:", "round trips"),
    "vacuum_to_water": ("configurations", "F_B - F_A = ", "verdict:", "without a map", "overlap "),
}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With few steps, and beside a copy of nothing but links, so that its runs land in a temporary folder."""
    monkeypatch.setenv("BOLTZGEN_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "systems").symlink_to(path.parents[1] / "systems")
    (tmp_path / "notebooks").mkdir()
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    printed = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))
    for words in PRINTED[path.stem]:
        assert words in printed
    assert "JAX NOT FOUND" not in printed
    assert path.stem != "alanine_dipeptide" or (tmp_path / "runs/notebook/report.html").exists()


def test_stored_notebooks_are_small() -> None:
    assert NOTEBOOKS
    assert all(path.stat().st_size < 300_000 for path in NOTEBOOKS)
