"""Steered moves are exact at any time step and friction, and two moves that look right are not.

    python benchmarks/stationarity.py

Two Gaussian basins in the plane with a variable whose gradient varies from 1 to about 4 in length: walkers start from exact samples and
move; moments, the population of a basin and the identity acceptance = 2 P(w < 0) must stay (z-scores over independent walkers). A dimer in
vacuum, in three dimensions, against quadrature of its bond length. A bad variable: a slow coordinate that the variable does not see.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from stored import out_path, store

from boltzgen.core import Target
from boltzgen.estimators.path_diagnostics import path_diagnostics
from boltzgen.mixtures import Flat
from boltzgen.paths import Paths, Restraint, Schedule
from boltzgen.sampling.steered import FreePaths, SteeredMove
from boltzgen.sampling.steering import TargetSteering
from tests.steering_problems import FromTheVariable, Problem, ProtocolWork, stationary_scores, two_hills

#: Time step, friction and steps of a path.
SETTINGS = ((0.1, 0.0, 12), (0.2, 0.0, 8), (0.4, 0.0, 8), (0.2, 1.0, 8), (0.4, 4.0, 8))
N_WALKERS, N_MOVES = 20_000, 15


class Dimer(Target):
    """Two particles in three dimensions: a double well of their distance and a weak hold on their centre."""

    event_shape = (2, 3)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return self.along(distance(x)[:, 0]) + 0.5 * x.mean(1).square().sum(1)

    @staticmethod
    def along(r: Tensor) -> Tensor:
        """The energy of the distance."""
        return 3.0 * ((r - 2.0) ** 2 - 1) ** 2

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Samples up to the interpolation of the cumulative density of the distance."""
        r = torch.linspace(1e-3, 4.5, 40_001, dtype=torch.float64)
        cumulative = torch.cumsum(r**2 * torch.exp(-self.along(r)), 0)
        drawn = np.interp(torch.rand(n, generator=generator, dtype=torch.float64).numpy(), (cumulative / cumulative[-1]).numpy(), r.numpy())
        way = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        half = 0.5 * torch.from_numpy(drawn)[:, None] * way / way.norm(dim=1, keepdim=True)
        centre = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return torch.stack([centre - half, centre + half], 1)


def distance(x: Tensor) -> Tensor:
    """The distance of both particles ``[b, 1]``."""
    return (x[:, 1] - x[:, 0]).norm(dim=1, keepdim=True)


def dimer() -> Problem:
    """The dimer as a problem: mean distance, its square, and the share of long ones, by quadrature."""
    target = Dimer()
    r = torch.linspace(1e-3, 4.5, 400_001, dtype=torch.float64)
    p = r**2 * torch.exp(-target.along(r))
    p = p / p.sum()
    return Problem(
        target=target, variables=distance, proposal=Flat([0.4], [3.6]), draw=lambda n, g: target.sample(n, generator=g),
        observables=lambda x: torch.stack([distance(x)[:, 0], distance(x)[:, 0] ** 2, (distance(x)[:, 0] > 2).double(), x[:, 0, 0]], 1),
        expected=torch.stack([(p * r).sum(), (p * r**2).sum(), p[r > 2].sum(), torch.zeros(())]),
    )  # fmt: skip


def judged(name: str, problem: Problem, move: SteeredMove, *, seed: int, n_moves: int = N_MOVES, **settings: Any) -> dict[str, Any]:
    """One row of the table."""
    began = time.perf_counter()
    scores, identity, acceptance = stationary_scores(move, problem, n_walkers=N_WALKERS, n_moves=n_moves, seed=seed)
    row = {"move": name, **settings, "moves": N_WALKERS * n_moves, "acceptance": round(acceptance, 4),
           "largest_z": round(float(np.abs(scores).max()), 2), "identity_z": round(identity, 2)}  # fmt: skip
    print(row, f"{time.perf_counter() - began:.1f} s", flush=True)
    return row


class Twisted(Target):
    """Four wells in the plane; which of the two along x₁ is deeper depends on x₂, whose barrier is 12 kT."""

    event_shape = (2,)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return 3 * (x[:, 0] ** 2 - 1) ** 2 + 12 * (x[:, 1] ** 2 - 1) ** 2 + 1.2 * x[:, 0] * x[:, 1]


def bad_variable() -> dict[str, Any]:
    """Walkers in both wells of x₂, steered along x₁ alone: what the diagnostics say, and along both for comparison."""
    found: dict[str, Any] = {}
    for name, columns in (("x1 alone", [0]), ("x1 and x2", [0, 1])):
        k, generator = len(columns), torch.Generator().manual_seed(5)
        engine = TargetSteering(Twisted(), lambda x, c=columns: x[:, c], Restraint([120.0] * k, (None,) * k), step_size=0.05)
        move = SteeredMove(engine, Flat([-1.5] * k, [1.5] * k), schedule=Schedule(60))
        local = FreePaths(engine, n_steps=10)
        start = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).repeat(4, 1)
        state, tables = engine.locate(start), []
        for t in range(500):
            state, _ = local.step(state, generator=generator)
            before = state
            state, info = move.step(state, generator=generator)
            if t >= 100:
                tables.append(
                    Paths(start=info.start[:, :1].numpy(), end=info.end[:, :1].numpy(), xi_start=before.x[:, :1].numpy(),
                          xi_end=info.result.x[:, :1].numpy(), log_proposal_ratio=info.log_proposal_ratio.numpy(),
                          work=info.result.work.numpy(), accepted=info.accepted.numpy(), walker=np.arange(8), time=np.full(8, t),
                          n_force=info.result.n_force.numpy())
                )  # fmt: skip
        paths = Paths.joined(tables)
        told = path_diagnostics(paths, lambda xi: xi[:, 0] < 0, lambda xi: xi[:, 0] >= 0, seed=1)
        found[name] = {"r_hat": round(float(told.r_hat[0]), 3), "ess": round(float(told.ess[0]), 1), "paths": len(paths),
                       "acceptance": round(float(told.acceptance.value), 3), "round_trips": int(told.round_trips.sum()),
                       "warnings": list(told.warnings)}  # fmt: skip
        print(name, found[name], flush=True)
    return found


def main() -> None:
    out = out_path(__doc__)
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    hills, pair = two_hills(), dimer()
    for number, (step, friction, k) in enumerate(SETTINGS):
        engine = hills.engine(step_size=step, friction=friction)
        move = SteeredMove(engine, hills.proposal, schedule=Schedule(k))
        rows.append(judged("exact, two hills", hills, move, seed=number, step=step, friction=friction))
    for number, (step, friction) in enumerate(((0.05, 0.0), (0.15, 0.0), (0.15, 2.0))):
        engine = pair.engine(step_size=step, friction=friction, stiffness=20.0)
        move = SteeredMove(engine, pair.proposal, schedule=Schedule(20))
        rows.append(judged("exact, dimer", pair, move, seed=100 + number, step=step, friction=friction))
    blurred = FromTheVariable(hills.engine(step_size=0.4, friction=0.0, stiffness=2.0), hills.proposal, schedule=Schedule(8))
    rows.append(judged("start at the variable (biased)", hills, blurred, seed=7, n_moves=40, step=0.4, friction=0.0))
    protocol = SteeredMove(hills.engine(step_size=0.4, friction=0.0, kind=ProtocolWork), hills.proposal, schedule=Schedule(8))
    rows.append(judged("protocol work alone (biased)", hills, protocol, seed=8, n_moves=40, step=0.4, friction=0.0))
    exact = [row for row in rows if row["move"].startswith("exact")]
    store(out, {
        "rows": rows, "moves_in_total": sum(row["moves"] for row in exact),
        "largest_z_of_exact_moves": max(max(row["largest_z"], abs(row["identity_z"])) for row in exact),
        "bad_variable": bad_variable(), "seconds": round(time.perf_counter() - began, 1),
    })  # fmt: skip


if __name__ == "__main__":
    main()
