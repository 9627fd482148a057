"""OpenMM's native replica exchange with steered paths and flow proposals between exchanges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from openmm import app

from boltzgen.errors import InputError
from boltzgen.md.exchange import ReproducibleExchange
from boltzgen.workflows.plugins.context_moves import ContextMove


class MoveReplicaExchange(ReproducibleExchange):
    """Replica exchange in which every replica, after its dynamics, makes moves that leave its state invariant.

    Args:
        states: States, as OpenMM's ``ReplicaExchangeSampler`` takes them: temperatures and global parameters, but no force groups.
        simulation: Simulation whose context all replicas share.
        steps_per_iteration: Steps of dynamics of every replica between exchanges.
        moves: Moves of every replica, in this order, such as a ``SteeredPath`` and a ``FlowProposal``.
        seed: Of the exchanges. Moves have their own.

    Raises:
        InputError: If states differ by force groups.

    References:
        Sugita and Okamoto, Chem. Phys. Lett. 314, 141 (1999), eqs. 12 and 14.
    """

    def __init__(
        self, states: Sequence[Mapping[str, Any]], simulation: app.Simulation, steps_per_iteration: int, *, moves: Sequence[ContextMove],
        seed: int = 0,
    ) -> None:  # fmt: skip
        if any("groups" in state for state in states):
            raise InputError(
                "the states differ by force groups, and moves take the energy of all forces: let a global parameter scale them"
            )
        super().__init__(states, simulation, steps_per_iteration, rng=np.random.default_rng(seed))
        self.moves = list(moves)

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """Dynamics of one replica, and then its moves."""
        super().simulateReplica(index, steps)
        context, temperature = self.simulation.context, self.temperature_of(self.replicaStateIndex[index])
        for move in self.moves:
            move.move(context, temperature)
        self.replicaConformation[index] = context.getState(positions=True, velocities=True, parameters=True, integratorParameters=True)
