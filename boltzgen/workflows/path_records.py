"""What a run of steered paths did, cycle by cycle, in pieces that a resumed run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boltzgen.config.sections import FrozenConfig
from boltzgen.paths import Looks, Paths, PathWalkers
from boltzgen.sampling.adaptive import Cycle
from boltzgen.sampling.steered import PathInfo
from boltzgen.workflows.cycle_records import CycleRecorder


@dataclass(frozen=True)
class History:
    """All cycles of one stage.

    Attributes:
        number: Number of every cycle ``[c]``, from 0 at the first of adaptation.
        xi: Variables of the walkers after every cycle ``[c, w, k]``.
        xi_between: The same after the local moves, before the jump ``[c, w, k]``.
        xi_visited: The same after each of the local moves ``[c, L, w, k]``.
        u: Reduced potentials after every cycle ``[c, w]``.
        round: Round of every cycle ``[c]``.
        local_acceptance: Share of accepted local moves in every cycle ``[c]``; NaN without any.
        n_force_local: Force evaluations of local moves ``[c]``.
        loss: Held-out loss of the learning after a cycle ``[c]``; NaN where there was none.
        paths: Every steered path; ``time`` is its cycle.
        looks: What was seen of them on their way.
        x: Stored configurations ``[f, w, n, 3]`` in nm, float32.
        x_cycle: Their cycles ``[f]``.
    """

    number: np.ndarray
    xi: np.ndarray
    xi_between: np.ndarray
    xi_visited: np.ndarray
    u: np.ndarray
    round: np.ndarray
    local_acceptance: np.ndarray
    n_force_local: np.ndarray
    loss: np.ndarray
    paths: Paths
    looks: Looks
    x: np.ndarray
    x_cycle: np.ndarray

    def __len__(self) -> int:
        return len(self.u)

    @property
    def visited(self) -> np.ndarray:
        """Variables of the walker of every path after each local move before it ``[n, L, k]``."""
        return np.moveaxis(self.xi_visited[np.searchsorted(self.number, self.paths.time)], 1, 2)[
            np.arange(len(self.paths)), self.paths.walker
        ]

    def kept(self, config: FrozenConfig) -> History:
        """Production without the cycles at the start that are left out."""
        first = config.n_discarded(len(self))
        of_cycles = ("number", "xi", "xi_between", "xi_visited", "u", "round", "local_acceptance", "n_force_local", "loss")
        later, stored = self.paths.time >= self.number[first], self.x_cycle >= self.number[first]
        return History(
            **{name: getattr(self, name)[first:] for name in of_cycles},
            paths=self.paths.rows(later),
            looks=self.looks.rows(self.looks.time >= self.number[first]),
            x=self.x[stored],
            x_cycle=self.x_cycle[stored],
        )


class Recorder(CycleRecorder):
    """Collects cycles of steered paths."""

    @property
    def place(self) -> Path:
        return self.folder.path / "paths"

    def arrays(self, cycles: list[Cycle]) -> dict[str, np.ndarray]:
        return _arrays(cycles, save_every=self.save_every)

    def history(self, stage: str) -> History:
        """All cycles of a stage that were written.

        Raises:
            CheckpointError: If a piece cannot be read, or there is none.
        """
        columns = self.joined(stage)
        paths, looks = (
            {name.removeprefix(prefix): columns.pop(name) for name in list(columns) if name.startswith(prefix)}
            for prefix in ("path_", "look_")
        )
        seen = Looks(**looks) if looks else Looks.none(columns["xi"].shape[-1])  # runs of before looks have none
        return History(**columns, paths=Paths(**paths), looks=seen)


def path_rows(cycle: Cycle) -> Paths | None:
    """The steered paths of a cycle, one row each; None where there was none."""
    jump, before = cycle.jump, cycle.before
    if not isinstance(jump, PathInfo) or not isinstance(before, PathWalkers):
        return None
    n = len(jump.accepted)
    xi_end = jump.result.xi.numpy().copy()
    xi_end[list(jump.result.failures)] = np.nan
    return Paths(
        start=jump.start.numpy(), end=jump.end.numpy(), xi_start=before.xi.numpy(), xi_end=xi_end,
        log_proposal_ratio=jump.log_proposal_ratio.numpy(), work=jump.result.work.numpy(), accepted=jump.accepted.numpy(),
        walker=np.arange(n), time=np.full(n, cycle.number), n_force=jump.result.n_force.numpy(),
    )  # fmt: skip


def _visited(cycle: Cycle) -> np.ndarray:
    """Variables after each local move ``[L, w, k]``."""
    assert isinstance(cycle.before, PathWalkers)
    none = np.zeros((0, *cycle.before.xi.shape))
    return np.concatenate([none, *(state.xi.numpy()[None] for state in cycle.visited if isinstance(state, PathWalkers))])


def _arrays(cycles: list[Cycle], *, save_every: int) -> dict[str, np.ndarray]:
    states = [cycle.state for cycle in cycles]
    between = [cycle.before for cycle in cycles]
    stored = [cycle for cycle in cycles if cycle.stage == "production" and cycle.number % save_every == 0]
    local = [[info.accepted.double().mean().item() for info in cycle.local] for cycle in cycles]
    cost = [sum(int(info.result.n_force.sum()) for info in cycle.local if isinstance(info, PathInfo)) for cycle in cycles]
    shape = (0, *states[0].x.shape)
    arrays = {
        "number": np.array([cycle.number for cycle in cycles]),
        "xi": np.stack([state.xi.numpy() for state in states if isinstance(state, PathWalkers)]),
        "xi_between": np.stack([state.xi.numpy() for state in between if isinstance(state, PathWalkers)]),
        "xi_visited": np.stack([_visited(cycle) for cycle in cycles]),
        "u": np.stack([state.u.numpy() for state in states]),
        "round": np.array([cycle.round for cycle in cycles]),
        "local_acceptance": np.array([np.mean(shares) if shares else np.nan for shares in local]),
        "n_force_local": np.array(cost),
        "loss": np.array([(cycle.learned or {}).get("held_out_loss", np.nan) for cycle in cycles]),
        "x": np.stack([cycle.state.x.numpy().astype(np.float32) for cycle in stored]) if stored else np.zeros(shape, dtype=np.float32),
        "x_cycle": np.array([cycle.number for cycle in stored], dtype=np.int64),
    }
    tables = [table for table in map(path_rows, cycles) if table is not None]
    looks = Looks.joined([Looks.of(cycle.jump.result, time=cycle.number) for cycle in cycles if isinstance(cycle.jump, PathInfo)])
    arrays |= {f"look_{name}": column for name, column in looks.arrays().items()}
    return arrays | {f"path_{name}": column for name, column in Paths.joined(tables).arrays().items()}
