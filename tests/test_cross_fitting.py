"""Cross-fitting: each half of the data is judged by a map that the other half trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from boltzgen.core import Bridge
from boltzgen.errors import ConfigError, InputError
from boltzgen.estimators.perturbation import acceptance_ratio
from boltzgen.estimators.works import Works
from boltzgen.targets.analytic import Gaussian
from boltzgen.transforms.triangular import ConditionalTriangular
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


def difference(repeat: int, *, own: bool) -> float:
    x = A.sample(2 * FEW, generator=seeded(1000 + 2 * repeat)).split(FEW)
    y = B.sample(2 * MANY, generator=seeded(1001 + 2 * repeat)).split(MANY)
    parts = []
    for half in (0, 1):
        trained_on = half if own else 1 - half
        bridge = Bridge(A, B, fitted(x[trained_on], y[trained_on]))
        with torch.no_grad():
            parts.append([Works.of(w, role="evaluate", log_det_error=0.0) for w in (bridge.works(x[half]), bridge.reverse_works(y[half]))])
    forward, reverse = (Works.joined(several) for several in zip(*parts, strict=True))
    return float(acceptance_ratio(forward, reverse, n_bootstrap=20, seed=1).difference.value)


def test_halves_judged_by_each_others_maps_are_unbiased_and_judged_by_their_own_are_not() -> None:
    for own in (False, True):
        found = np.array([difference(repeat, own=own) for repeat in range(REPEATS)])
        mean, stderr = float(found.mean()), float(found.std(ddof=1) / np.sqrt(REPEATS))
        if own:
            assert abs(mean - TRUTH) > 8 * stderr  # the twin
        else:
            assert_z(mean, TRUTH, stderr)


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
