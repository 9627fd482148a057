"""Steered paths and flow proposals inside openmmtools: exact, stored, resumed, copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
import yaml
from openmm import unit
from openmmtools import cache, mcmc, multistate, states, testsystems, utils
from openmmtools.multistate.multistatereporter import _DictYamlDumper, _DictYamlLoader

from boltzgen.cvs import Distance
from boltzgen.errors import CheckpointError, EnergyError, InputError
from boltzgen.recipes import normal_mixture as mixture
from boltzgen.workflows.plugins.context_moves import SteeredPath
from boltzgen.workflows.plugins.engines import shared_engines
from boltzgen.workflows.plugins.openmmtools import FlowMove, SteeredPathMove, normal_mixture, save_distribution
from tests.assertions import assert_z, z_score
from tests.dimers import BOND, Dimer, distances, observables, positions

TILTED = Dimer(temperature_kelvin=350.0, tilt=12.0)
#: Basins with a preference that is far from the truth.
LOPSIDED = {"means": [[0.2], [0.4]], "widths": [[0.03], [0.05]], "weights": [3.0, 1.0]}
CLOUD = {"means": [[[0.0] * 3] * 2], "widths": [[[0.16] * 3] * 2]}


class TiltState(states.GlobalParameterState):
    tilt = states.GlobalParameterState.GlobalParameter("tilt", standard_value=0.0)


def state_of(dimer: Dimer) -> states.CompoundThermodynamicState:
    plain = states.ThermodynamicState(dimer.system, dimer.temperature_kelvin * unit.kelvin)
    return states.CompoundThermodynamicState(plain, [TiltState(tilt=dimer.tilt)])


@pytest.fixture(autouse=True)
def _on_reference() -> Iterator[None]:
    shared_engines.empty()
    before = cache.global_context_cache.platform
    cache.global_context_cache.empty()
    cache.global_context_cache.platform = openmm.Platform.getPlatformByName("Reference")
    yield
    cache.global_context_cache.empty()
    cache.global_context_cache.platform = before
    shared_engines.empty()


def steered(*, seed: int = 1, friction: float = 0.0, kind: type[SteeredPathMove] = SteeredPathMove, n_steps: int = 40) -> SteeredPathMove:
    return kind([BOND], normal_mixture(**LOPSIDED), n_steps=n_steps, widths=[0.02], timestep=5 * unit.femtosecond,
                friction=friction / unit.picosecond, seed=seed)  # fmt: skip


def flow(*, seed: int = 1, kind: type[FlowMove] = FlowMove, n_proposals: int = 4) -> FlowMove:
    return kind(normal_mixture(**CLOUD), n_proposals=n_proposals, seed=seed)


def scores(move: mcmc.MCMCMove, *, n_walkers: int, n_moves: int = 5, seed: int = 3) -> list[tuple[float, float, float]]:
    """Mean, exact value and error of every observable along chains that start from exact samples, with other moves in between."""
    thermodynamic_state = state_of(TILTED)
    sequence = mcmc.SequenceMove([move, mcmc.MCDisplacementMove(displacement_sigma=0.01 * unit.nanometer)])
    means = []
    for start in TILTED.draw(n_walkers, np.random.default_rng(seed)):
        sampler = mcmc.MCMCSampler(thermodynamic_state, states.SamplerState(positions(start)), move=sequence)
        along = []
        for _ in range(n_moves):
            sampler.run()
            along.append(sampler.sampler_state.positions.value_in_unit(unit.nanometer))
        means.append(observables(distances(np.array(along))).mean(0))
    found, errors = np.mean(means, axis=0), np.std(means, axis=0, ddof=1) / np.sqrt(n_walkers)
    return list(zip(found.tolist(), TILTED.expected().tolist(), errors.tolist(), strict=True))


class WithoutTheRatioOfProposals(SteeredPathMove):
    """A biased twin: ln ρ(λ₁) − ln ρ(λ₀) is left out."""

    def move(self, context: openmm.Context, temperature_kelvin: float) -> bool:
        self._distribution = mixture(**{**LOPSIDED, "weights": [10.0, 1.0]})
        self._distribution.log_prob = lambda x, context=None: torch.zeros(len(x), dtype=torch.float64)  # type: ignore[method-assign]
        return super().move(context, temperature_kelvin)


class WithoutTheDensity(FlowMove):
    """A biased twin: ln q is left out."""

    def move(self, context: openmm.Context, temperature_kelvin: float) -> bool:
        self._density = self.flow.load()
        self._density.distribution.log_prob = lambda x, context=None: torch.zeros(len(x), dtype=torch.float64)  # type: ignore[method-assign]
        return super().move(context, temperature_kelvin)


@pytest.mark.parametrize("friction", [0.0, 5.0])
def test_steered_paths_leave_the_state_invariant(friction: float) -> None:
    move = steered(friction=friction)
    for found, exact, error in scores(move, n_walkers=100):
        assert_z(found, exact, error)
    assert 0.1 < move.acceptance < 0.9
    assert len(shared_engines) == 1


def test_flow_proposals_leave_the_state_invariant() -> None:
    move = flow()
    for found, exact, error in scores(move, n_walkers=100):
        assert_z(found, exact, error)
    assert 0.1 < move.acceptance < 0.9


@pytest.mark.parametrize("twin", [steered(kind=WithoutTheRatioOfProposals), flow(kind=WithoutTheDensity)])
def test_moves_that_forget_their_proposal_are_caught(twin: mcmc.MCMCMove) -> None:
    z = [z_score(*one) for one in scores(twin, n_walkers=100, n_moves=8)]
    assert max(map(abs, z)) > 5


def test_a_hamiltonian_that_global_parameters_do_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SteeredPath._engine
    monkeypatch.setattr(SteeredPath, "_engine", lambda *args: whole(*args).at(350.0, parameters={"tilt": 0.0}))
    start = states.SamplerState(positions(TILTED.draw(1, np.random.default_rng(0))[0]))
    with pytest.raises(EnergyError, match="differ by more than global parameters"):
        steered().apply(state_of(TILTED), start)


def through_netcdf(state: dict) -> dict:
    """What openmmtools' reporter makes of a state."""
    return yaml.load(yaml.dump(state, Dumper=_DictYamlDumper), Loader=_DictYamlLoader)


@pytest.mark.parametrize("make", [steered, flow])
@pytest.mark.parametrize(
    "again",
    [
        lambda move: utils.deserialize(through_netcdf(utils.serialize(move))),
        copy.deepcopy,
        lambda move: pickle.loads(pickle.dumps(move)),
        lambda move: copy.deepcopy(mcmc.SequenceMove([move])).move_list[0],
    ],
    ids=["serialised", "copied", "pickled", "copied in a sequence"],
)
def test_a_move_goes_on_where_it_was_copied(make, again) -> None:
    state, start = state_of(TILTED), states.SamplerState(positions(TILTED.draw(1, np.random.default_rng(2))[0]))
    move = make()
    for _ in range(3):
        move.apply(state, start)
    copied, there = again(move), copy.deepcopy(start)
    before = copied.statistics
    assert type(copied) is type(move)
    assert copied.statistics == move.statistics
    for _ in range(4):
        move.apply(state, start)
    assert copied.statistics == before, "copies must be independent"
    for _ in range(4):
        copied.apply(state, there)
    assert copied.statistics == move.statistics
    np.testing.assert_array_equal(there.positions._value, start.positions._value)
    np.testing.assert_array_equal(there.velocities._value, start.velocities._value)


def test_copies_in_different_states_do_not_share_their_noise() -> None:
    x = positions(Dimer().draw(1, np.random.default_rng(2))[0])
    ends = []
    for dimer in (Dimer(), Dimer(tilt=1e-9)):
        start = states.SamplerState(x)
        steered().apply(state_of(dimer), start)
        ends.append(start.velocities._value)
    assert not np.allclose(*ends)


def test_rejected_paths_keep_positions_and_renew_velocities() -> None:
    start = states.SamplerState(positions(TILTED.draw(1, np.random.default_rng(2))[0]))
    x = start.positions._value.copy()
    move = SteeredPathMove([BOND], normal_mixture([[3.0]], [[0.01]]), n_steps=5, widths=[0.01], timestep=50 * unit.femtosecond)
    seen = []
    for _ in range(5):
        move.apply(state_of(TILTED), start)
        np.testing.assert_array_equal(start.positions._value, x)
        seen.append(start.velocities._value.copy())
    assert move.n_accepted == 0
    assert len(np.unique(np.round(seen, 9), axis=0)) == 5
    assert len(move.works) == move.n_proposed == 5


def test_paths_that_blow_up_are_counted_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    start = states.SamplerState(positions(TILTED.draw(1, np.random.default_rng(2))[0]))
    move = SteeredPathMove([BOND], normal_mixture([[0.4]], [[0.1]]), n_steps=400, widths=[0.02], timestep=20 * unit.picosecond)
    for _ in range(3):
        move.apply(state_of(TILTED), start)
    assert move.n_failed == 3
    assert np.isinf(move.works).all()
    assert "take a smaller time step" in caplog.text


def test_at_constant_pressure_a_path_runs_in_the_present_box() -> None:
    fluid = testsystems.LennardJonesFluid(nparticles=216, reduced_density=0.3)
    state = states.ThermodynamicState(fluid.system, 120 * unit.kelvin, 50 * unit.atmosphere)
    own = np.array([list(vector._value) for vector in fluid.system.getDefaultPeriodicBoxVectors()])
    start = states.SamplerState(fluid.positions, box_vectors=1.02 * own * unit.nanometer)
    sampler = mcmc.MCMCSampler(state, start, move=None)
    sampler.minimize()
    start = sampler.sampler_state
    box, x = np.array(start.box_vectors._value), np.array(start.positions._value)
    apart = Distance("apart", (0, 215), box=own)
    here = float(Distance("here", (0, 215), box=box)(torch.from_numpy(x)[None]))
    move = SteeredPathMove([apart], normal_mixture([[here]], [[0.05]]), n_steps=20, widths=[0.05], timestep=10 * unit.femtosecond)
    for _ in range(6):
        move.apply(state, start)
    np.testing.assert_allclose(np.array(start.box_vectors._value), box, atol=1e-6)
    assert move.n_accepted > 0
    assert move.n_failed == 0
    assert not np.allclose(start.positions._value, x)
    (engine,) = shared_engines._engines.values()
    assert "MonteCarloPressure" not in engine.parameter_names
    assert len(engine.parameter_names) == 0


def saved(path: Path) -> Path:
    save_distribution(mixture(**LOPSIDED), path, recipe="normal_mixture", arguments=LOPSIDED)
    return path


def test_a_proposal_in_a_file_is_known_by_its_hash(tmp_path: Path) -> None:
    file = saved(tmp_path / "proposal.safetensors")
    start = states.SamplerState(positions(TILTED.draw(1, np.random.default_rng(2))[0]))
    other = copy.deepcopy(start)
    move = SteeredPathMove([BOND], file, n_steps=10, widths=[0.02], timestep=5 * unit.femtosecond, seed=1)
    written_down = steered(n_steps=10)
    for _ in range(3):
        move.apply(state_of(TILTED), start)
        written_down.apply(state_of(TILTED), other)
    np.testing.assert_array_equal(start.positions._value, other.positions._value)
    stored = through_netcdf(utils.serialize(move))
    assert "safetensors" in stored["proposal"]["path"]
    changed = {**LOPSIDED, "weights": [1.0, 5.0]}
    save_distribution(mixture(**changed), file, recipe="normal_mixture", arguments=changed)
    with pytest.raises(CheckpointError, match="have changed since the run began"):
        utils.deserialize(stored).apply(state_of(TILTED), start)
    file.unlink()
    with pytest.raises(CheckpointError, match="are gone"):
        SteeredPathMove(  # named while it was there
            [BOND], move.proposal, n_steps=10, widths=[0.02], timestep=5 * unit.femtosecond
        ).apply(state_of(TILTED), start)


def test_what_cannot_be_proposed_is_refused(tmp_path: Path) -> None:
    start = states.SamplerState(positions(TILTED.draw(1, np.random.default_rng(2))[0]))
    with pytest.raises(InputError, match="there is none at"):
        SteeredPathMove([BOND], tmp_path / "nothing", n_steps=10, widths=[0.02], timestep=5 * unit.femtosecond)
    with pytest.raises(InputError, match="one positive width for each of bond"):
        SteeredPathMove([BOND], normal_mixture(**LOPSIDED), n_steps=10, widths=[0.02, 0.1], timestep=5 * unit.femtosecond)
    with pytest.raises(InputError, match="makes 3 particles and the system has 2"):
        FlowMove(normal_mixture([[[0.0] * 3] * 3], [[[0.1] * 3] * 3])).apply(state_of(TILTED), start)
    with pytest.raises(InputError, match="expected a distribution of configurations"):
        FlowMove(normal_mixture(**LOPSIDED)).apply(state_of(TILTED), start)


def exchange(path: Path, moves: mcmc.MCMCMove) -> multistate.ReplicaExchangeSampler:
    sampler = multistate.ReplicaExchangeSampler(mcmc_moves=moves, number_of_iterations=8)
    ladder = [Dimer(temperature_kelvin=300.0 + 50 * k, tilt=4.0 * k) for k in range(3)]
    x = ladder[0].draw(1, np.random.default_rng(5))[0]
    reporter = multistate.MultiStateReporter(str(path), checkpoint_interval=1)
    sampler.create([state_of(dimer) for dimer in ladder], states.SamplerState(positions(x)), reporter)
    return sampler


def test_replica_exchange_resumes_from_netcdf(tmp_path: Path) -> None:
    sampler = exchange(tmp_path / "run.nc", mcmc.SequenceMove([steered(n_steps=10), flow()]))
    sampler.run(n_iterations=3)
    before = [move.statistics for move in sampler.mcmc_moves]
    engines = len(shared_engines)
    del sampler  # closes the file
    shared_engines.empty()
    cache.global_context_cache.empty()

    resumed = multistate.ReplicaExchangeSampler.from_storage(multistate.MultiStateReporter(str(tmp_path / "run.nc"), open_mode="r+"))
    assert [move.statistics for move in resumed.mcmc_moves] == before
    assert resumed.iteration == 3
    resumed.run(n_iterations=3)
    after = [move.statistics for move in resumed.mcmc_moves]
    for path, proposals in after:
        assert path["n_proposed"] == len(path["works"]) == 6
        assert proposals["n_proposed"] == 24
    assert [path["works"][:3] for path, _ in after] == [path["works"] for path, _ in before]
    assert engines == len(shared_engines) == 1, "one context serves all states and all copies of the move"
