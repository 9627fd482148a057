"""OpenMM's replica exchange with a random generator of its own and exchanges in reduced energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from openmm import app, unit

from boltzgen.errors import EnergyError
from boltzgen.units import MOLAR_GAS_CONSTANT


class ReproducibleExchange(app.ReplicaExchangeSampler):
    """Replica exchange whose random numbers come from one generator (OpenMM's come from the global one), counting neighbouring swaps.

    Args:
        states: States, as OpenMM takes them.
        simulation: Simulation whose context all replicas share.
        steps: Steps between exchanges.
        rng: Generator of the exchanges.

    Attributes:
        attempted: Exchanges tried between every state and the next one ``[k − 1]``.
        accepted: Those accepted.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]], simulation: app.Simulation, steps: int, *, rng: np.random.Generator) -> None:
        super().__init__([dict(state) for state in states], simulation, steps)
        self.rng = rng
        self.attempted, self.accepted = np.zeros(len(states) - 1), np.zeros(len(states) - 1)

    def temperature_of(self, state: int) -> float:
        """Temperature of a state in kelvin: its own, or that of the integrator."""
        kelvin = self.states[state].get("temperature", None)
        kelvin = self.simulation.integrator.getTemperature() if kelvin is None else kelvin
        return float(kelvin.value_in_unit(unit.kelvin) if unit.is_quantity(kelvin) else kelvin)

    def reduced_energies(self) -> np.ndarray:
        """Energy of every replica in every state ``[replicas, states]`` in kT of the state, after the last iteration.

        Raises:
            EnergyError: If a replica has no finite energy in its own state, or one is not a number.
        """
        kt = MOLAR_GAS_CONSTANT * np.array([self.temperature_of(state) for state in range(len(self.states))])
        energies = [row.value_in_unit(unit.kilojoules_per_mole) for row in self.replicaStateEnergy]
        u = np.array(energies, dtype=np.float64) / kt
        own = u[np.arange(len(u)), self.replicaStateIndex]
        if np.isnan(u).any() or not np.isfinite(own).all():
            raise EnergyError(f"expected finite energies of all replicas, got {own.tolist()} kT: the dynamics have blown up; take a "
                              f"smaller time step or minimise the start")  # fmt: skip
        return u

    def exchangeReplicas(self) -> None:
        """Swap the states of random pairs with probability min(1, exp(u_i(s_i) + u_j(s_j) − u_i(s_j) − u_j(s_i)))."""
        n = len(self.states)
        if n < 2:
            return
        u = self.reduced_energies()
        for _ in range(self.exchangesPerIteration):
            i = int(self.rng.integers(n))
            j = (i + int(self.rng.integers(1, n))) % n
            si, sj = self.replicaStateIndex[i], self.replicaStateIndex[j]
            accept = np.log1p(-self.rng.random()) < u[i, si] + u[j, sj] - u[i, sj] - u[j, si]
            if abs(si - sj) == 1:
                self.attempted[min(si, sj)] += 1
                self.accepted[min(si, sj)] += accept
            if accept:
                self.replicaStateIndex[i], self.replicaStateIndex[j] = sj, si
