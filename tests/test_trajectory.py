"""Reading, correlation times and the split in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mdtraj
import numpy as np
import pytest
from openmm import app

from boltzgen.errors import EnergyError, InputError, ShapeError
from boltzgen.estimators.timeseries import decorrelate, statistical_inefficiency
from boltzgen.md.trajectory import Trajectory, read_trajectory, split_blocks, torsion_angles
from tests.assertions import assert_z

PDB = app.PDBFile("systems/alanine_dipeptide_vacuum/topology.pdb")
START = PDB.getPositions(asNumpy=True)._value
N_FRAMES = 30


def autoregressive(rho: float, *, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Chains ``[chains, n]`` of x_t = ρ x_{t−1} + noise, of unit variance and statistical inefficiency (1 + ρ)/(1 − ρ)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    for t in range(1, shape[1]):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * x[:, t]
    return x


def made(n: int, *, chains: int = 2, inefficiency: float = 5.0, **changes: object) -> Trajectory:
    rows = chains * n
    x = np.arange(rows, dtype=float)[:, None, None] * np.ones((1, 4, 3))
    trajectory = Trajectory(x, np.arange(rows, dtype=float), np.zeros(rows, int), np.repeat(np.arange(chains), n), 300.0, inefficiency, 0)
    return replace(trajectory, **changes)


def check_inefficiency(series: np.ndarray, rho: float) -> None:
    assert statistical_inefficiency(series) == pytest.approx((1 + rho) / (1 - rho), rel=0.15)


def test_statistical_inefficiency_of_an_autoregressive_process() -> None:
    check_inefficiency(autoregressive(0.9, shape=(4, 20_000), seed=1), 0.9)
    check_inefficiency(autoregressive(0.9, shape=(1, 50_000), seed=1)[0], 0.9)
    with pytest.raises(AssertionError):
        check_inefficiency(autoregressive(0.95, shape=(4, 20_000), seed=1), 0.9)


def test_chains_that_never_meet_count_as_correlated() -> None:
    apart = autoregressive(0.5, shape=(2, 2000), seed=1) + np.array([[0.0], [8.0]])
    assert statistical_inefficiency(apart) > 500
    assert max(statistical_inefficiency(chain) for chain in apart) < 5


def test_a_constant_series_taught_nothing() -> None:
    assert statistical_inefficiency(np.full(50, 3.2)) == 50


def test_series_that_are_not_series_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least one frame"):
        statistical_inefficiency(np.zeros((2, 0)))
    with pytest.raises(EnergyError, match="not finite"):
        statistical_inefficiency(np.array([1.0, np.nan]))
    with pytest.raises(ShapeError, match="one chain"):
        decorrelate(np.zeros((2, 5)))


def check_independence(rows: np.ndarray, series: np.ndarray) -> None:
    """The lag-1 correlation of independent rows is zero within 1/√n."""
    kept = series[rows]
    assert_z(float(np.mean(kept[1:] * kept[:-1])), 0.0, 1 / np.sqrt(len(kept)))


def test_decorrelated_rows_are_independent() -> None:
    series = autoregressive(0.9, shape=(1, 40_000), seed=2)[0]
    check_independence(decorrelate(series, inefficiency=4 * 19.0), series)
    with pytest.raises(AssertionError):
        check_independence(decorrelate(series, inefficiency=1.0), series)
    assert decorrelate(series, inefficiency=2.5)[:5].tolist() == [0, 2, 5, 7, 10]


def check_split(train: Trajectory, evaluate: Trajectory, *, gap: int) -> None:
    """Training rows of a chain end a full gap before its evaluation rows begin."""
    for chain in (0, 1):
        assert evaluate.u[evaluate.chain == chain].min() - train.u[train.chain == chain].max() > gap


def test_split_keeps_whole_blocks_with_a_gap_and_decorrelates_evaluation() -> None:
    trajectory = made(200)
    train, evaluate = split_blocks(trajectory)
    assert len(train) == 2 * (160 - 5)
    assert len(evaluate) == 2 * 40 // 5
    assert set(evaluate.block) == {8, 9}
    assert train.block.max() == 7
    assert evaluate.statistical_inefficiency == 1.0
    check_split(train, evaluate, gap=5)
    with pytest.raises(AssertionError):
        check_split(trajectory, evaluate, gap=5)


def test_split_can_hold_the_first_blocks_out() -> None:
    trajectory = made(200)
    train, evaluate = split_blocks(trajectory, evaluate_fraction=0.5, evaluate_first=True, decorrelated=False)
    _, late = split_blocks(trajectory, evaluate_fraction=0.5, decorrelated=False)
    assert len(train) == 2 * (100 - 5)
    assert (train.role, evaluate.role) == ("train", "evaluate")
    assert sorted([*evaluate.u, *late.u]) == sorted(trajectory.u)
    for chain in (0, 1):
        assert train.u[train.chain == chain].min() - evaluate.u[evaluate.chain == chain].max() > 5


def test_split_cuts_hot_trajectories_at_the_same_times() -> None:
    train, evaluate = split_blocks(made(200, inefficiency=2.0, hot=(made(200, inefficiency=7.0),)))
    check_split(train, evaluate.hot[0], gap=7)
    check_split(train.hot[0], evaluate, gap=7)


def test_split_of_a_short_hot_probe_never_trains_on_evaluation_rows() -> None:
    train, evaluate = split_blocks(made(200, inefficiency=12.0, hot=(made(12, inefficiency=2.0),)))
    assert len(train.hot[0]) == 0
    assert len(evaluate.hot[0]) == 2 * 1


def test_split_says_when_the_data_are_too_short_for_the_gap() -> None:
    train, evaluate = split_blocks(made(100, inefficiency=50.0))
    assert "not fully independent" in evaluate.notes[-1]
    assert len(train) == 2 * 70
    assert len(evaluate) == 2
    with pytest.raises(InputError, match="at least 10 frames per chain"):
        split_blocks(made(9))
    with pytest.raises(InputError, match=r"inside \(0, 1\)"):
        split_blocks(made(100), evaluate_fraction=1.0)


def frames(*, seed: int = 0) -> np.ndarray:
    return START + np.random.default_rng(seed).normal(scale=0.002, size=(N_FRAMES, 22, 3))


def written(path: Path, x: np.ndarray, *, order: np.ndarray | None = None, topology: mdtraj.Topology | None = None) -> Path:
    trajectory = mdtraj.Trajectory(x, topology or mdtraj.Topology.from_openmm(PDB.topology))
    (trajectory if order is None else trajectory.atom_slice(order)).save(str(path))
    return path


def read(*paths: Path, energies=lambda x: (x**2).sum(axis=(1, 2))) -> Trajectory:
    return read_trajectory(paths, PDB.topology, temperature_kelvin=300.0, energies=energies)


@pytest.mark.parametrize(("suffix", "precision"), [("xtc", 6e-4), ("dcd", 1e-6), ("nc", 1e-6), ("pdb", 6e-5)])
def test_formats_round_trip(tmp_path: Path, suffix: str, precision: float) -> None:
    pieces = [frames(seed=seed) for seed in (0, 1)]
    trajectory = read(*(written(tmp_path / f"{i}.{suffix}", x) for i, x in enumerate(pieces)))
    assert trajectory.x.dtype == np.float32
    assert trajectory.u.dtype == np.float64
    assert trajectory.chain.tolist() == [0] * N_FRAMES + [1] * N_FRAMES
    assert trajectory.block.max() == 9
    np.testing.assert_allclose(trajectory.x, np.concatenate(pieces), atol=precision)
    assert bool(trajectory.notes) == (suffix in {"xtc", "pdb"})


@pytest.mark.filterwarnings("ignore:atom_indices are not monotonically")
def test_a_pdb_in_another_order_is_brought_into_the_topologys(tmp_path: Path) -> None:
    x, order = frames(), np.arange(22)
    order[8:14] = order[8:14][::-1]
    trajectory = read(written(tmp_path / "a.pdb", x, order=order))
    np.testing.assert_allclose(trajectory.x, x, atol=6e-5)


def test_another_molecule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 21 atoms, the topology 22"):
        read(written(tmp_path / "a.xtc", frames(), order=np.arange(21)))
    with pytest.raises(InputError, match="holds 21 atoms, the topology 22"):
        read(written(tmp_path / "a.pdb", frames(), order=np.arange(21)))
    with pytest.raises(InputError, match=r"the bond .* nm long, expected about"):
        read(written(tmp_path / "b.dcd", frames()[:, np.random.default_rng(1).permutation(22)]))
    with pytest.raises(InputError, match="nm long"):
        read(written(tmp_path / "c.xtc", 10 * frames()))
    renamed = mdtraj.Topology.from_openmm(PDB.topology)
    renamed.atom(10).name = "CG"
    with pytest.raises(InputError, match="has no atom CB"):
        read(written(tmp_path / "d.pdb", frames(), topology=renamed))


@pytest.mark.parametrize("suffix", ["xtc", "dcd", "nc", "pdb", "docx"])
def test_files_that_are_no_trajectories_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match="there is no trajectory file"):
        read(tmp_path / f"missing.{suffix}")
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(b"not a trajectory at all" * 20)
    with pytest.raises(InputError, match=r"broken\."):
        read(path)


def test_a_frame_without_a_finite_energy_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnergyError, match="frame 4 of"):
        read(written(tmp_path / "a.dcd", frames()), energies=lambda x: np.where(np.arange(len(x)) == 4, np.inf, 1.0))


def test_torsions_agree_with_mdtraj() -> None:
    torsions = [(4, 6, 8, 14), (6, 8, 14, 16), (8, 14, 16, 18)]
    trajectory = mdtraj.Trajectory(frames(), mdtraj.Topology.from_openmm(PDB.topology))
    np.testing.assert_allclose(
        np.cos(torsion_angles(frames(), torsions)), np.cos(mdtraj.compute_dihedrals(trajectory, torsions)), atol=1e-5
    )
    np.testing.assert_allclose(
        np.sin(torsion_angles(frames(), torsions)), np.sin(mdtraj.compute_dihedrals(trajectory, torsions)), atol=1e-5
    )
