"""OpenMM's own replica exchange with moves in between."""

from __future__ import annotations

import math

import numpy as np
import openmm
import pytest
from openmm import app, unit

from boltzgen.errors import InputError
from boltzgen.workflows.plugins.context_moves import FlowProposal, SteeredPath
from boltzgen.workflows.plugins.distributions import normal_mixture
from boltzgen.workflows.plugins.engines import shared_engines
from boltzgen.workflows.plugins.replica_exchange import MoveReplicaExchange
from tests.assertions import assert_z, z_score
from tests.dimers import BOND, Dimer, distances, observables

LADDER = [Dimer(temperature_kelvin=300.0, tilt=0.0), Dimer(temperature_kelvin=300.0, tilt=30.0), Dimer(temperature_kelvin=420.0, tilt=30.0)]


def steered() -> SteeredPath:
    return SteeredPath([BOND], normal_mixture([[0.2], [0.4]], [[0.03], [0.03]]), n_steps=40, widths=[0.02],
                       timestep=5 * unit.femtosecond)  # fmt: skip


def sampler(*, seed: int, kind: type[MoveReplicaExchange] = MoveReplicaExchange) -> MoveReplicaExchange:
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, 0.5 * unit.femtosecond)
    integrator.setRandomNumberSeed(seed + 1)
    simulation = app.Simulation(LADDER[0].topology, LADDER[0].system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(LADDER[0].draw(1, np.random.default_rng(seed))[0])
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, seed + 1)
    states = [{"temperature": dimer.temperature_kelvin * unit.kelvin, "tilt": dimer.tilt} for dimer in LADDER]
    flow = FlowProposal(normal_mixture([[[0.0] * 3] * 2], [[[0.16] * 3] * 2]), n_proposals=2)
    return kind(states, simulation, 10, moves=[steered(), flow], seed=seed)


def scores(one: MoveReplicaExchange, *, n_iterations: int, n_blocks: int = 20) -> np.ndarray:
    """z-scores of the observables in every state, with errors from blocks ``[states, observables]``."""
    rows = np.empty((len(LADDER), n_iterations, 3))

    def record(sampler: MoveReplicaExchange) -> None:
        for state, found in zip(sampler.replicaStateIndex, sampler.replicaConformation, strict=True):
            x = found.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
            rows[state, sampler.currentIteration - 1] = observables(distances(x[None]))[0]

    one.reporters.append(record)
    one.simulate(n_iterations)
    blocks = rows[:, n_iterations // 20 :].reshape(len(LADDER), n_blocks, -1, 3).mean(2)
    errors = blocks.std(1, ddof=1) / math.sqrt(n_blocks)
    exact = np.array([dimer.expected() for dimer in LADDER])
    return np.vectorize(z_score)(blocks.mean(1), exact, errors)


class WithTheSignTurned(MoveReplicaExchange):
    """A biased twin: exchanges prefer what they should avoid."""

    def reduced_energies(self) -> np.ndarray:
        return -super().reduced_energies()


def test_every_state_has_its_own_averages() -> None:
    one = sampler(seed=4)
    for z in scores(one, n_iterations=400).ravel():
        assert_z(z, 0.0, 1.0)
    path, flow = one.moves
    assert path.n_proposed == 3 * 400
    assert flow.n_proposed == 2 * 3 * 400
    assert path.acceptance > 0.1
    assert flow.acceptance > 0.1
    assert (one.accepted / one.attempted > 0.2).all()


def test_exchanges_with_the_wrong_sign_are_caught() -> None:
    assert np.abs(scores(sampler(seed=4, kind=WithTheSignTurned), n_iterations=400)).max() > 6


def test_exchanges_and_moves_are_reproducible() -> None:
    ends, indices = [], []
    for seed in (4, 4, 5):
        shared_engines.empty()  # a new context starts the Reference platform's noise, which all contexts share, anew
        one = sampler(seed=seed)
        one.simulate(10)
        ends.append(one.replicaConformation[1].getPositions(asNumpy=True)._value)
        indices.append(one.replicaStateIndex)
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])
    assert indices[0] == indices[1]


def test_states_of_force_groups_are_refused() -> None:
    simulation = sampler(seed=1).simulation
    with pytest.raises(InputError, match="let a global parameter scale them"):
        MoveReplicaExchange([{"groups": {0}}, {"groups": {1}}], simulation, 1, moves=[steered()])
