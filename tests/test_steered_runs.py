"""The configurations of steered paths that come with the systems run, keep to the plane, and do the work of their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_steered_systems import DEFINITIONS, KT, Definition

from boltzgen.config import PathsConfig, make_config
from boltzgen.paths import Schedule
from boltzgen.workflows import paths
from boltzgen.workflows.run_folder import RunFolder

SYSTEMS = Path(__file__).parents[1] / "systems"
SHORT: dict[str, dict[str, Any]] = {
    "walkers": {"count": 2, "pull_steps": 1000, "equilibration": 2}, "local": {"steps": 10}, "paths": {"steps": 40},
    "proposal": {"training_steps": 5}, "adaptation": {"rounds": 1, "cycles": 2},
    "production": {"cycles": 3, "discard": 0.0, "save_interval": 1}, "platform": {"name": "CPU", "contexts": 1},
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


def work_and_end(one: Definition, x: np.ndarray, v: np.ndarray, *, centres: np.ndarray, stiffness: float, dt: float) -> tuple[float, float]:
    """Work in kT of a path of velocity Verlet with the pair sum of the definition, and the distance at its end in nm."""
    mass, x, v = 39.948, x.copy(), v.copy()

    def at(centre: float) -> tuple[float, np.ndarray]:
        energy, force = one.energy_and_forces(x)
        bond = x[0] - x[1]
        r = float(np.linalg.norm(bond))
        force[:2] -= stiffness * (r - centre) * np.outer([1, -1], bond / r)
        return energy + 0.5 * stiffness * (r - centre) ** 2 + 0.5 * mass * float((v**2).sum()), force

    begin, force = at(centres[0])
    for centre in centres[1:]:
        v += 0.5 * dt * force / mass
        x += dt * v
        force = at(centre)[1]
        v += 0.5 * dt * force / mass
    return (at(centres[-1])[0] - begin) / KT, float(np.linalg.norm(x[0] - x[1]))


def test_a_path_in_the_plane_does_the_work_of_its_definition() -> None:
    one, problem = next(d for d in DEFINITIONS if d.planar), paths.open_problem(shortened("wca_dimer_2d"))
    engine, n_steps, dt = problem.engine, 60, 0.0272
    lattice = paths.start_positions((), problem.loaded)[0].astype(np.float64)
    x = lattice + np.random.default_rng(1).normal(scale=0.01, size=lattice.shape) * [1, 1, 0]
    walkers = engine.locate(torch.from_numpy(x)[None])
    start, end = walkers.xi + 0.03, walkers.xi + 0.2
    result = engine.steer(walkers, start, end, schedule=Schedule(n_steps), generator=torch.Generator().manual_seed(2))
    v = torch.randn((1, one.n, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()[0] * [1, 1, 0]
    centres = np.linspace(float(start), float(end), n_steps + 1)
    work, r = work_and_end(one, x, v * np.sqrt(KT / 39.948), centres=centres, stiffness=KT / 0.068**2, dt=dt)
    assert float(result.work) == pytest.approx(work, abs=2e-2)
    assert float(result.xi) == pytest.approx(r, abs=1e-3)
    blind, _ = work_and_end(one, x, v * np.sqrt(KT / 39.948) * 1.01, centres=centres, stiffness=KT / 0.068**2, dt=dt)
    assert abs(float(result.work) - blind) > 2e-2
