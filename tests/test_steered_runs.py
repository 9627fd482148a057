"""The configurations of steered paths that come with the systems run, in a few short cycles, and keep what they promise of the plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from boltzgen.config import PathsConfig, make_config
from boltzgen.workflows import paths
from boltzgen.workflows.run_folder import RunFolder

SYSTEMS = Path(__file__).parents[1] / "systems"
SHORT: dict[str, dict[str, Any]] = {
    "walkers": {"count": 2, "pull_steps": 1000, "equilibration": 2}, "local": {"steps": 10}, "paths": {"steps": 40},
    "proposal": {"training_steps": 5}, "adaptation": {"rounds": 1, "cycles": 2}, "production": {"cycles": 3, "save_interval": 1},
    "platform": {"name": "CPU", "contexts": 1},
}  # fmt: skip


def shortened(system: str) -> PathsConfig:
    """The stored configuration of a system, with everything that takes time made short."""
    values = yaml.safe_load((SYSTEMS / system / "paths.yaml").read_text())
    config = make_config(values | {key: values.get(key, {}) | few for key, few in SHORT.items()}, folder=SYSTEMS / system)
    assert isinstance(config, PathsConfig)
    return config


def run(config: PathsConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, dict[str, Any]]:
    """Stored configurations ``[cycles, walkers, n, 3]`` and the diagnostics of a run; the report has its own tests."""
    monkeypatch.setattr(paths, "build_paths_report", lambda *arguments, **options: None)
    with RunFolder.create(folder) as opened:
        results = paths.run_paths(config, opened, progress=False)
    with np.load(folder / "samples.npz") as stored:
        return stored["x"], results.to_dict()["diagnostics"]


@pytest.mark.parametrize("system", ["polymer_in_solvent", "wca_dimer_2d", "wca_dimer_3d"])
def test_the_stored_configuration_runs(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shortened(system)
    x, diagnostics = run(config, tmp_path / "run", monkeypatch)
    i, j = next(iter(config.collective_variables.values())).model_dump()["atoms"]
    r = np.linalg.norm(x[..., i, :] - x[..., j, :], axis=-1).reshape(len(x), -1)
    parting = next(iter(config.basin_ranges.values()))[config.names[0]][1]
    assert (r.min() < parting) & (r.max() > parting), "walkers were pulled into both basins"
    assert diagnostics["n_paths"] == 6
    assert diagnostics["failed_paths"] == 0
    assert (np.abs(x[..., 2]).max() == 0) == (system == "wca_dimer_2d")


def test_a_dimer_that_may_leave_the_plane_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shortened("wca_dimer_2d")
    free = config.model_copy(update={"dynamics": config.dynamics.model_copy(update={"planar": False})})
    assert np.abs(run(free, tmp_path / "run", monkeypatch)[0][..., 2]).max() > 0
