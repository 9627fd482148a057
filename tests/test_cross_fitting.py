"""Cross-fitting: each half of the data is judged by a map that the other half trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from boltzgen.config import Joining
from boltzgen.core import Bridge
from boltzgen.errors import ConfigError, InputError
from boltzgen.estimators.perturbation import acceptance_ratio
from boltzgen.estimators.works import Works
from boltzgen.md.loading import load
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import of_frames
from boltzgen.targets.analytic import Gaussian
from boltzgen.transforms.triangular import ConditionalTriangular
from boltzgen.workflows.folds import make_folds
from boltzgen.workflows.joining import Ensemble
from tests.assertions import assert_z
from tests.registry import seeded
from tests.test_tfep import config, exact, named, run
from tests.test_tfep import files as files

#: Few rows of A and many of B: where a map fits its own rows too well, the errors of both directions do not cancel.
DIMENSION, FEW, MANY, REPEATS = 8, 30, 300, 150
A = Gaussian(torch.zeros(DIMENSION), covariance=torch.eye(DIMENSION))
B = Gaussian(torch.full((DIMENSION,), 0.6), covariance=torch.diag(torch.linspace(0.4, 2.0, DIMENSION)))
TRUTH = float(A.log_z) - float(B.log_z)  # type: ignore[arg-type]


def fitted(x: torch.Tensor, y: torch.Tensor) -> ConditionalTriangular:
    """The affine map that carries mean and covariance of these rows of A to those of these rows of B: much too good for them."""
    left, right = (torch.linalg.cholesky(torch.cov(rows.T)) for rows in (x, y))
    scale = right @ torch.linalg.inv(left)
    return ConditionalTriangular(0, mean=y.mean(0) - scale @ x.mean(0), scale=scale, hidden=(), generator=seeded()).double()


def difference(repeat: int, *, own: bool) -> tuple[float, float]:
    """The estimate of both halves together and its standard error."""
    x = A.sample(2 * FEW, generator=seeded(1000 + 2 * repeat)).split(FEW)
    y = B.sample(2 * MANY, generator=seeded(1001 + 2 * repeat)).split(MANY)
    parts = []
    for half in (0, 1):
        trained_on = half if own else 1 - half
        bridge = Bridge(A, B, fitted(x[trained_on], y[trained_on]))
        with torch.no_grad():
            parts.append([Works.of(w, role="evaluate", log_det_error=0.0) for w in (bridge.works(x[half]), bridge.reverse_works(y[half]))])
    forward, reverse = (Works.joined(several) for several in zip(*parts, strict=True))
    found = acceptance_ratio(forward, reverse, n_bootstrap=50, seed=1).difference
    return float(found.value), float(found.stderr)


def test_halves_judged_by_each_others_maps_are_unbiased_and_judged_by_their_own_are_not() -> None:
    for own in (False, True):
        found, stated = np.array([difference(repeat, own=own) for repeat in range(REPEATS)]).T
        mean, stderr = float(found.mean()), float(found.std(ddof=1) / np.sqrt(REPEATS))
        if own:
            assert abs(mean - TRUTH) > 8 * stderr  # the twin
        else:
            assert_z(mean, TRUTH, stderr)
            assert 0.85 < float(found.std(ddof=1)) / float(np.sqrt((stated**2).mean())) < 1.2


def test_parts_keep_their_rows_chains_and_units() -> None:
    parts = [
        Works.of(w, role="evaluate", log_det_error=error, units=units, chain=np.array([0, 0, 1, 1]))
        for w, error, units in (([1.0, 2.0, 3.0, 4.0], 0.0, [0, 0, 1, 1]), ([5.0, 6.0, 7.0, np.inf], 1e-3, [0, 1, 1, 2]))
    ]
    joined = Works.joined(parts)
    assert joined.units.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert joined.share(0.5).w.tolist() == [1.0, 2.0, 3.0, 4.0]  # the first half of each chain
    assert joined.log_det_error == 1e-3
    with pytest.raises(InputError, match="same role"):
        Works.joined([parts[0], Works.of([1.0, 2.0], role="train", log_det_error=0.0)])
    with pytest.raises(InputError, match="same role"):
        Works.joined([])
    with pytest.raises(InputError, match="lacks a chain"):
        Works.joined([parts[0], Works.of([1.0, 2.0], role="evaluate", log_det_error=0.0)])


def test_no_frame_is_judged_by_a_map_that_it_trained(files: Path) -> None:
    loaded = [load(files / "topology.pdb", files / f"{name}.xml") for name in ("a", "b")]
    ends = []
    for k, one in enumerate(loaded):
        x = one.positions + np.random.default_rng(k).normal(scale=0.003, size=(2, 200, *one.positions.shape))
        frames = of_frames(list(x), list(np.random.default_rng(9).normal(size=(2, 200))), topology=one.topology, temperature_kelvin=300.0)
        ends.append(Ensemble.of("ab"[k], OpenMMTarget.from_loaded(one, temperature_kelvin=300.0), frames, evaluate_fraction=0.5))
    settings = Joining.model_validate({"training": {"cross_fitting": True}})
    folds = make_folds(settings, loaded, ends, box=None)
    assert folds[0].pieces is not folds[1].pieces
    for k, end in enumerate(ends):
        held_out = [{row.tobytes() for row in fold.ends[k].held_out.x} for fold in folds]
        trained = [{row.tobytes() for row in fold.ends[k].training.x} for fold in folds]
        for first, second in ((held_out[0], trained[0]), (held_out[1], trained[1]), (held_out[0], held_out[1])):
            assert not first & second
        assert held_out[0] | held_out[1] == {row.tobytes() for row in end.trajectory.x}
        assert held_out[0] & trained[1]  # the twin: maps exchanged between the folds would see their own rows


def test_all_frames_count_in_a_job(files: Path, tmp_path: Path) -> None:
    results = run(tmp_path / "run", config(files, training={"cross_fitting": True}))
    numbers, found = results["diagnostics"], named(results)["F_B - F_A"]
    assert_z(found["value"], exact(), found["stderr"])
    assert numbers["n_forward"] == numbers["without_map"]["n_forward"]
    assert {path.name for path in (tmp_path / "run").glob("map*.safetensors")} == {"map.safetensors", "map-2.safetensors"}
    stages = {json.loads(line)["stage"] for line in (tmp_path / "run" / "training.jsonl").read_text().splitlines()}
    assert stages == {"map", "map-2"}


def test_what_cannot_be_cross_fitted_is_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="identity learns nothing"):
        config(files, training={"cross_fitting": True}, map={"kind": "identity"})
    with pytest.raises(ConfigError, match="takes halves"):
        config(files, training={"cross_fitting": True}, data={"evaluate_fraction": 0.3})
