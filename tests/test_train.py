"""Populations: the marginal of the torsions, estimated from the energies, against the flow's own weights and a known answer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.config import make_config
from boltzgen.core import Target
from boltzgen.md.trajectory import Trajectory
from boltzgen.recipes import InternalCoordinateFlow
from boltzgen.workflows.run_folder import RunFolder
from boltzgen.workflows.train import Trainer
from tests.assertions import assert_z
from tests.test_recipes import assembled


class NearlyTheFlow(Target):
    """exp(−u) = Z q(x) w(x) with the flow's own density q and a factor w: the weights of the flow are known.

    w = 1 + a sin 3φ of the first soft torsion, that of a methyl group. The flow is kept as it was.
    """

    def __init__(self, pieces: InternalCoordinateFlow, *, amplitude: float, log_z: float) -> None:
        self.pieces, self.amplitude, self.shift = copy.deepcopy(pieces), amplitude, log_z
        self.event_shape = pieces.flow.event_shape

    def factor(self, torsions: Tensor) -> Tensor:
        return 1 + self.amplitude * (3 * torsions[:, 0].to(torch.float64)).sin()

    def reduced_potential(self, x: Tensor) -> Tensor:
        y, _ = self.pieces.fixed.inverse(x)
        return -self.pieces.flow.log_prob(x) - self.factor(y).log() - self.shift


def trainer(tmp_path: Path, *, amplitude: float = 0.8, log_z: float = 3.0, **training: Any) -> Trainer:
    torch.set_num_threads(1)
    pieces, _ = assembled("alanine_dipeptide_vacuum")
    target = NearlyTheFlow(pieces, amplitude=amplitude, log_z=log_z)
    with torch.no_grad():
        x, _ = pieces.flow.sample(200, generator=torch.Generator().manual_seed(1))
        u = target.reduced_potential(x).numpy()
    rows = np.zeros(len(u), dtype=np.int64)
    frames = Trajectory(
        x=x.numpy(), u=u, block=rows, chain=rows, temperature_kelvin=300.0, statistical_inefficiency=1.0, n_force_evaluations=0
    )
    config = make_config({"topology": "a.pdb", "system": "a.xml", "training": training})
    return Trainer(config=config, pieces=pieces, target=target, training=frames, held_out=frames, folder=RunFolder.create(tmp_path / "run"),
                   fingerprint="f", should_stop=lambda: False, progress=False)  # fmt: skip


def own_torsions(chosen: Trainer, n: int) -> tuple[Tensor, Tensor]:
    assert chosen.pieces.torsions is not None
    with torch.no_grad():
        return chosen.pieces.torsions.sample(n, generator=torch.Generator().manual_seed(2))


def check_marginal(chosen: Trainer, estimate: Tensor, torsions: Tensor, log_q: Tensor) -> None:
    """p̂/q of the torsions is Z w(s), here without noise, as the rest given the torsions is exact."""
    expected = chosen.target.shift + chosen.target.factor(torsions).log()  # type: ignore[attr-defined]
    torch.testing.assert_close(estimate - log_q, expected, atol=0.05, rtol=0)  # single precision of the layers
    ratio = (estimate - log_q - chosen.target.shift).exp()  # type: ignore[attr-defined]
    assert_z(float(ratio.mean()), float(chosen.target.factor(torsions).mean()), float(ratio.std()) / math.sqrt(len(ratio)))  # type: ignore[attr-defined]


def test_energies_at_given_torsions_estimate_their_density(tmp_path: Path) -> None:
    chosen = trainer(tmp_path)
    torsions, log_q = own_torsions(chosen, 2000)
    estimate = chosen._log_marginal(torsions, generator=torch.Generator().manual_seed(3))
    check_marginal(chosen, estimate, torsions, log_q)
    given = chosen.pieces.given(torsions)
    with torch.no_grad():
        z = torch.cat([torsions, torch.randn(2000, chosen.pieces.domains.n_stiff, generator=torch.Generator().manual_seed(3))], dim=1)
        y, log_det = given.transform(z)
    forgotten = {"log_det": estimate - log_det, "base": estimate + given.base.log_prob(z), "sign": -estimate}
    assert float(y[:, : torsions.shape[1]].sub(torsions).abs().max()) == 0.0
    for wrong in forgotten.values():
        with pytest.raises(AssertionError):
            check_marginal(chosen, wrong, torsions, log_q)


def test_rows_without_an_energy_have_no_weight(tmp_path: Path) -> None:
    chosen = trainer(tmp_path)
    torsions, _ = own_torsions(chosen, 8)
    with torch.no_grad():
        y, _ = chosen.pieces.given(torsions).sample(8, generator=torch.Generator().manual_seed(1))
    far = y.to(torch.float64)
    far[3, -1], far[5, torsions.shape[1]] = math.nan, 1e6
    u = chosen._potential(far)
    assert torch.isposinf(u[[3, 5]]).all()
    assert torch.isfinite(u[[0, 1, 2, 4, 6, 7]]).all()


def test_wrong_populations_become_right(tmp_path: Path) -> None:
    """The flow lacks the factor w; after the rounds the torsions have it, as the spread of the weights shows."""
    chosen = trainer(
        tmp_path,
        population_rounds=2,
        population_steps=120,
        population_samples=1500,
        population_batch_size=256,
        ema_decay=0.9,
        population_learning_rate=0.01,
    )
    torsions, _ = own_torsions(chosen, 2000)
    factor = chosen.target.factor(torsions)  # type: ignore[attr-defined]
    before = float((factor.log()).std())
    log_p = chosen._log_marginal(torsions, generator=torch.Generator().manual_seed(4))
    chosen.populations()
    assert chosen.pieces.torsions is not None
    with torch.no_grad():
        after = float((log_p - chosen.pieces.torsions.log_prob(torsions)).std())
    assert before > 0.4
    assert after < 0.5 * before
    assert {row["stage"] for row in chosen.rows} == {"populations-1", "populations-2"}
