"""Jumps to proposals of a continuous flow of particles: exact with its measured density, biased without the divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from assertions import assert_z, z_score
from torch import Tensor

from boltzgen.core import Context, Distribution, Flow
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import InputError, SolverError
from boltzgen.networks.radial_field import RadialField
from boltzgen.recipes import FieldSize
from boltzgen.recipes.particle_learning import MatchingSettings, ParticleFlowRecipe
from boltzgen.sampling.adaptive import AdaptiveSampler, Cycle, Plan
from boltzgen.sampling.coordinate_learner import CoordinateLearner, FlowJump
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster

#: Three particles in the plane with the pair energy of DW4: every distance short or long, 4.4 kT between them.
CLUSTER = DoubleWellCluster(3, 2)
SHORT, LONG = (4.0 + side * math.sqrt(4.0 / 1.8) for side in (-1, 1))
LOCAL = HamiltonianMonteCarlo(CLUSTER, step_size=0.1, n_leapfrog=3, mean_free=True)
RECIPE = ParticleFlowRecipe(
    CLUSTER, ParticleNormal.isotropic(3, 2, scale=2.5, dtype=torch.float32), RadialField, FieldSize(length=4.0, n_radial=24),
    MatchingSettings(steps=300, batch_size=128, learning_rate=1e-2, log_det_error=0.01),
)  # fmt: skip
N_WALKERS, N_PRODUCTION, DISCARDED = 150, 40, 10


class WithoutVolume(Distribution):
    """Wrong: the density of the base where a sample came from, without the divergence on the way."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow, self.event_shape = flow, flow.event_shape

    @property
    def log_det_error(self) -> float:
        return 0.0

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_p = self.flow.base.sample(n, generator=generator)
        return self.flow.transform(z)[0], log_p

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return self.flow.base.log_prob(self.flow.transform.inverse(x)[0])


def distances(x: Tensor) -> Tensor:
    """Distances of the three pairs ``[b, 3]``."""
    return torch.stack([(x[:, i] - x[:, j]).norm(dim=1) for i, j in ((0, 1), (0, 2), (1, 2))], dim=1)


def n_long(x: Tensor) -> Tensor:
    return (distances(x) > 4.0).sum(1)


OBSERVABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": CLUSTER.reduced_potential,
    "all short": lambda x: (n_long(x) == 0).double(),
    "all long": lambda x: (n_long(x) == 3).double(),
    "square distance": lambda x: distances(x).square().mean(1),
    "fourth power": lambda x: (distances(x) / 4.0).pow(4).mean(1),
}


def exact_means(m: int = 90) -> dict[str, float]:
    """Means by quadrature over two distances a, b and the angle θ between them: the volume of the subspace is a b da db dθ."""
    r = (torch.arange(m, dtype=torch.float64) + 0.5) * 9.0 / m
    angle = (torch.arange(m, dtype=torch.float64) + 0.5) * math.pi / m
    a, b, t = (grid.reshape(-1) for grid in torch.meshgrid(r, r, angle, indexing="ij"))
    x = torch.stack([0 * a, 0 * a, a, 0 * a, b * t.cos(), b * t.sin()], dim=1).reshape(-1, 3, 2)
    log_w = (a * b).log() - CLUSTER.reduced_potential(x)
    w = torch.softmax(log_w, 0)
    return {name: float((w * observable(x)).sum()) for name, observable in OBSERVABLES.items()}


def one_start_of_each_basin() -> Tensor:
    """All short, one short and two long, all long, in turn; no other data."""
    triangles = []
    for a, b, c in ((SHORT, SHORT, SHORT), (SHORT, LONG, LONG), (LONG, LONG, LONG)):
        along = (a * a + b * b - c * c) / (2 * a)
        triangles.append([[0.0, 0.0], [a, 0.0], [along, math.sqrt(b * b - along**2)]])
    return torch.tensor(triangles, dtype=torch.float64).repeat(N_WALKERS // 3, 1, 1)


def sampler(recipe: ParticleFlowRecipe = RECIPE, *, seed: int = 1, n_cycles: int = 10, n_production: int = N_PRODUCTION) -> AdaptiveSampler:
    plan = Plan(n_local=2, n_rounds=2, n_cycles=n_cycles, n_production=n_production)
    state = LOCAL.init(one_start_of_each_basin())
    return AdaptiveSampler(LOCAL, CoordinateLearner(CLUSTER, recipe), plan=plan, state=state, generator=torch.Generator().manual_seed(seed))


def run(loop: AdaptiveSampler) -> list[Cycle]:
    cycles: list[Cycle] = []
    loop.run(lambda cycle: cycles.append(cycle) or True)  # type: ignore[func-returns-value]
    return cycles


def by_walker(states: list[Tensor], name: str) -> tuple[float, float]:
    """Mean of an observable, and its error from the scatter of the walkers."""
    means = torch.stack([OBSERVABLES[name](x) for x in states]).mean(0)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


@pytest.fixture(scope="module")
def exact() -> dict[str, float]:
    return exact_means()


@pytest.fixture(scope="module")
def learned() -> tuple[AdaptiveSampler, list[Cycle]]:
    loop = sampler()
    return loop, run(loop)


def flow_of(loop: AdaptiveSampler) -> Flow:
    learner = loop.learner
    assert isinstance(learner, CoordinateLearner)
    assert isinstance(learner.flow, Flow)
    return learner.flow


def test_production_agrees_with_quadrature(learned: tuple[AdaptiveSampler, list[Cycle]], exact: dict[str, float]) -> None:
    production = [cycle for cycle in learned[1] if cycle.stage == "production"]
    states = [cycle.state.x for cycle in production[DISCARDED:]]
    for name in OBSERVABLES:
        value, error = by_walker(states, name)
        assert_z(value, exact[name], error)
    accepted = np.mean([cycle.jump.accepted.double().mean().item() for cycle in production if cycle.jump is not None])
    assert accepted > 0.3
    assert max(float(x.mean(1).abs().max()) for x in states) < 1e-5


def test_local_moves_alone_keep_the_populations_of_the_starts(exact: dict[str, float]) -> None:
    state, states = LOCAL.init(one_start_of_each_basin()), []
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        state, _ = LOCAL.step(state, generator=generator)
        states.append(state.x)
    value, error = by_walker(states, "all short")
    assert z_score(value, exact["all short"], error) > 4.5


def test_a_density_without_its_divergence_is_biased(learned: tuple[AdaptiveSampler, list[Cycle]], exact: dict[str, float]) -> None:
    loop, _ = learned
    found = {}
    for name, flow in (("right", flow_of(loop)), ("wrong", WithoutVolume(flow_of(loop)))):
        generator, state, states = torch.Generator().manual_seed(3), loop.state, []
        jump = FlowJump(flow, CLUSTER)
        for _ in range(20):
            state, _ = LOCAL.step(state, generator=generator)
            state, _ = jump.step(state, generator=generator)
            states.append(state.x)
        found[name] = [z_score(value, exact[key], error) for key in OBSERVABLES for value, error in [by_walker(states[5:], key)]]
    assert max(map(abs, found["right"])) < 4.5, found
    assert max(map(abs, found["wrong"])) > 8, found


def test_the_density_is_exact_and_comes_back_from_what_is_stored(learned: tuple[AdaptiveSampler, list[Cycle]]) -> None:
    flow, x = flow_of(learned[0]), learned[0].state.x
    assert flow.log_det_error is not None
    assert flow.log_det_error <= RECIPE.settings.log_det_error
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    again = RECIPE.rebuilt(RECIPE.described(flow))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert again.log_det_error == flow.log_det_error


def test_the_loop_goes_on_from_a_snapshot_as_if_never_stopped() -> None:
    recipe = replace(RECIPE, settings=replace(RECIPE.settings, steps=3))
    whole = sampler(recipe, n_cycles=2, n_production=2)
    run(whole)
    for stop in (3, 5):
        first, second = (sampler(recipe, seed=seed, n_cycles=2, n_production=2) for seed in (1, 5))
        first.run(lambda cycle, stop=stop: cycle.number + 1 < stop)  # type: ignore[misc]
        second.restore(first.snapshot())
        second.run(lambda cycle: True)
        assert torch.equal(second.state.x, whole.state.x)


def test_a_trap_keeps_its_centre(generator: torch.Generator) -> None:
    """Base and target over all coordinates: with an untrained field, jumps sample a Gaussian gas, centre included."""
    gas = CoulombGas(3, 2, beta=1.0, strength=0.0)
    base = ParticleNormal.isotropic(3, 2, scale=0.8, centre_scale=0.5, dtype=torch.float32)
    recipe = ParticleFlowRecipe(gas, base, RadialField, FieldSize(length=1.0), MatchingSettings(steps=1, batch_size=16))
    x, _ = base.sample(300, generator=generator)
    flow, numbers = recipe.learned(x, None, generator=generator)
    assert numbers["n_rows"] == 300
    jump, states = FlowJump(flow, gas), []
    state = jump.init(x.double())
    for _ in range(30):
        state, _ = jump.step(state, generator=generator)
        states.append(state.x)
    for observable, value in ((lambda y: y.mean(1).square().sum(1), 1 / 3), (gas.reduced_potential, 3.0)):
        means = torch.stack([observable(y) for y in states[15:]]).mean(0)
        assert_z(float(means.mean()), value, float(means.std() / len(means) ** 0.5))


def test_what_cannot_be_exact_is_refused(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    with pytest.raises(InputError, match=r"0\.01 nats"):
        MatchingSettings(log_det_error=0.1)
    steep = replace(RECIPE, settings=MatchingSettings(steps=1, solver_steps=1, log_det_error=1e-12))
    with pytest.raises(SolverError, match="with 8 steps the log density is known to"):
        steep.learned(one_start_of_each_basin(), None, generator=generator)
