"""What walkers that jump did, cycle by cycle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boltzgen.cvs import CollectiveVariables
from boltzgen.sampling.adaptive import Cycle
from boltzgen.sampling.chains import ProposalInfo
from boltzgen.workflows.cycle_records import CycleRecorder


@dataclass(frozen=True)
class JumpHistory:
    """All cycles of one stage. Where nothing was learned yet there were no jumps: what concerns them is NaN, and none is accepted.

    Attributes:
        xi: Variables of the walkers after every cycle ``[c, w, k]``.
        u: Their reduced potentials ``[c, w]`` in kT.
        xi_between: Variables after the local moves, before the jump ``[c, w, k]``.
        u_between: Reduced potentials there ``[c, w]``.
        xi_proposed: Variables of the proposals, accepted or not ``[c, w, k]``.
        u_proposed: Their reduced potentials ``[c, w]``.
        log_ratio: Log acceptance ratio of the jumps ``[c, w]``.
        accepted: Which were accepted, bool ``[c, w]``.
        round: Round of every cycle ``[c]``.
        local_acceptance: Share of accepted local moves ``[c]``.
        loss: Held-out loss of the learning after a cycle ``[c]``; NaN where there was none.
        n_learned: Energies that it took ``[c]``.
        x: Stored configurations ``[f, w, n, 3]`` in nm, float32.
        x_cycle: Their cycles ``[f]``.
    """

    xi: np.ndarray
    u: np.ndarray
    xi_between: np.ndarray
    u_between: np.ndarray
    xi_proposed: np.ndarray
    u_proposed: np.ndarray
    log_ratio: np.ndarray
    accepted: np.ndarray
    round: np.ndarray
    local_acceptance: np.ndarray
    loss: np.ndarray
    n_learned: np.ndarray
    x: np.ndarray
    x_cycle: np.ndarray

    def __len__(self) -> int:
        return len(self.u)


@dataclass
class JumpRecorder(CycleRecorder):
    """Collects cycles of walkers that jump.

    Attributes:
        variables: Coordinates that are looked along.
    """

    variables: CollectiveVariables = CollectiveVariables(())  # noqa: RUF009

    def arrays(self, cycles: list[Cycle]) -> dict[str, np.ndarray]:
        states, between = [cycle.state for cycle in cycles], [cycle.before for cycle in cycles]
        stored = [cycle for cycle in cycles if cycle.stage == "production" and cycle.number % self.save_every == 0]
        local = [np.mean([info.accepted.double().mean().item() for info in cycle.local]) for cycle in cycles]
        learned = [cycle.learned or {} for cycle in cycles]
        shape = (0, *states[0].x.shape)
        return {
            "xi": self._values([state.x for state in states]),
            "u": torch.stack([state.u for state in states]).numpy(),
            "xi_between": self._values([state.x for state in between]),
            **self._jumps(cycles),
            "round": np.array([cycle.round for cycle in cycles]),
            "local_acceptance": np.array(local),
            "loss": np.array([numbers.get("held_out_loss", np.nan) for numbers in learned]),
            "n_learned": np.array([numbers.get("n_energies", 0.0) for numbers in learned]),
            "x": np.stack([cycle.state.x.numpy().astype(np.float32) for cycle in stored]) if stored else np.zeros(shape, np.float32),
            "x_cycle": np.array([cycle.number for cycle in stored], dtype=np.int64),
        }

    def history(self, stage: str) -> JumpHistory:
        """All cycles of a stage that were written.

        Raises:
            CheckpointError: If a piece cannot be read, or there is none.
        """
        return JumpHistory(**self.joined(stage))

    def _jumps(self, cycles: list[Cycle]) -> dict[str, np.ndarray]:
        w, k = len(cycles[0].state.x), len(self.variables)
        empty = {
            "u_between": np.full(w, np.nan), "xi_proposed": np.full((w, k), np.nan), "u_proposed": np.full(w, np.nan),
            "log_ratio": np.full(w, np.nan), "accepted": np.zeros(w, dtype=bool),
        }  # fmt: skip
        rows = []
        for cycle in cycles:
            info = cycle.jump
            if not isinstance(info, ProposalInfo):
                rows.append(empty)
                continue
            rows.append(
                {
                    "u_between": info.u_before.numpy(),
                    "xi_proposed": self._values([info.x])[0],
                    "u_proposed": info.u.numpy(),
                    "log_ratio": info.log_ratio.numpy(),
                    "accepted": info.accepted.numpy(),
                }
            )
        return {name: np.stack([row[name] for row in rows]) for name in empty}

    def _values(self, x: list[Tensor]) -> np.ndarray:
        """Variables of several sets of walkers ``[c, w, k]``."""
        return self.variables(torch.cat(x)).numpy().reshape(len(x), len(x[0]), -1)
