"""Runs of the job of steered paths on a dimer, small enough to be done many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.config import PathsConfig, make_config
from boltzgen.workflows import paths
from boltzgen.workflows.run_folder import RunFolder
from tests.test_steering import START, dimer_system

#: Between the short and the long bond, in nm.
TOP = 0.4


def written_dimer(folder: Path, *, barrier: float = 4.0, name: str = "system.xml") -> None:
    """Files of the dimer: bond of 0.3 or 0.5 nm between the first two of its three particles."""
    topology = app.Topology()
    residue = topology.addResidue("DIM", topology.addChain())
    for atom in "ABC":
        topology.addAtom(atom, app.Element.getBySymbol("C"), residue)
    with (folder / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, START * unit.nanometer, file)
    (folder / name).write_text(openmm.XmlSerializer.serialize(dimer_system(barrier=barrier)))


def exact_difference(*, barrier: float = 4.0) -> float:
    """F(long) − F(short) in kT, by quadrature of r² exp(−u)."""
    r = np.linspace(0.1, 0.8, 40_001)
    density = r**2 * np.exp(-barrier * (1 - ((r - TOP) / 0.1) ** 2) ** 2)
    return -float(np.log(density[r > TOP].sum() / density[r < TOP].sum()))


def plain(folder: Path, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration as YAML holds it: a few cycles, with sections of it replaced key by key."""
    values: dict[str, Any] = {
        "task": "paths", "topology": str(folder / "topology.pdb"), "system": str(folder / "system.xml"),
        "platform": {"name": "Reference", "contexts": 1}, "collective_variables": {"bond": {"kind": "distance", "atoms": [0, 1]}},
        "ranges": {"bond": ["0.22 nanometer", "0.58 nanometer"]}, "widths": {"bond": "0.02 nanometer"},
        "basins": {"short": {"bond": ["0 nanometer", f"{TOP} nanometer"]}, "long": {"bond": [f"{TOP} nanometer", "2 nanometer"]}},
        "dynamics": {"timestep": "20 femtosecond"}, "walkers": {"count": 4, "equilibration": 3}, "local": {"steps": 5, "per_cycle": 1},
        "paths": {"steps": 20, "tune": False}, "proposal": {"bins": 6, "training_steps": 20}, "adaptation": {"rounds": 2, "cycles": 3},
        "production": {"cycles": 5, "save_interval": 2},
    }  # fmt: skip
    for key, value in (more or {}).items():
        merged = isinstance(value, dict) and key not in ("collective_variables", "ranges", "widths", "basins")
        values[key] = values.get(key, {}) | value if merged else value
    return values


def dimer_config(folder: Path, more: Mapping[str, Any] | None = None) -> PathsConfig:
    config = make_config(plain(folder, more))
    assert isinstance(config, PathsConfig)
    return config


def run(config: PathsConfig, path: Path, *, resume: bool = False) -> dict[str, Any]:
    """The results of a run, as ``results.json`` holds them."""
    with RunFolder.create(path, resume=resume) as folder:
        return paths.run_paths(config, folder, progress=False).to_dict()


@contextmanager
def always_asked() -> Iterator[Callable[[], bool]]:
    """A stand-in for signals: asked to stop after every cycle."""
    yield lambda: True


def table(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def assert_same(one: Path, other: Path) -> None:
    """Assert that two npz files hold the same arrays, bit for bit."""
    first, second = table(one), table(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
