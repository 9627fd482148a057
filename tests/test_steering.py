from __future__ import annotations

import copy
import math

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.cvs import CollectiveVariables, Distance
from boltzgen.distributions import NormalMixture
from boltzgen.errors import InexactDensityError, InputError, ShapeError
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.steering import OpenMMSteering
from boltzgen.mixtures import Flat, Mixture
from boltzgen.paths import Restraint, Schedule
from boltzgen.sampling.steered import FreePaths, SteeredMove
from boltzgen.sampling.steering import TargetSteering
from boltzgen.targets.analytic import DoubleWell, VonMisesProduct
from boltzgen.targets.views import Regularised
from boltzgen.units import thermal_energy
from tests.assertions import assert_z
from tests.steering_problems import FromTheVariable, ProtocolWork, stationary_scores, two_hills

REFERENCE = PlatformChoice(name="Reference", contexts=1)
KT = thermal_energy(300.0)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("step_size", "friction"), [(0.15, 0.0), (0.4, 0.0), (0.3, 2.0)])
def test_the_move_leaves_the_target_as_it_is(step_size: float, friction: float) -> None:
    problem = two_hills()
    move = SteeredMove(problem.engine(step_size=step_size, friction=friction), problem.proposal, schedule=Schedule(8, bend=0.5))
    scores, identity, acceptance = stationary_scores(move, problem, n_walkers=10_000, n_moves=8, seed=1)
    assert np.abs(scores).max() < 4.5
    assert abs(identity) < 4.5, "mean acceptance is not 2 P(w < 0)"
    assert acceptance > 0.1


def test_lengths_in_proportion_to_the_way_are_exact_too() -> None:
    problem = two_hills()
    move = SteeredMove(problem.engine(step_size=0.3, friction=0.0), problem.proposal, schedule=Schedule(8, span=(2.0,)))
    scores, identity, _ = stationary_scores(move, problem, n_walkers=10_000, n_moves=8, seed=2)
    assert np.abs(scores).max() < 4.5
    assert abs(identity) < 4.5


def test_starting_from_the_variable_itself_is_biased_and_caught() -> None:
    problem = two_hills()
    move = FromTheVariable(problem.engine(step_size=0.4, friction=0.0, stiffness=2.0), problem.proposal, schedule=Schedule(8))
    scores, identity, _ = stationary_scores(move, problem, n_walkers=20_000, n_moves=20, seed=1)
    assert np.abs(scores).max() > 8
    assert abs(identity) > 8


def test_protocol_work_alone_is_biased_and_caught() -> None:
    problem = two_hills()
    move = SteeredMove(problem.engine(step_size=0.4, friction=0.0, kind=ProtocolWork), problem.proposal, schedule=Schedule(8))
    scores, identity, _ = stationary_scores(move, problem, n_walkers=20_000, n_moves=20, seed=1)
    assert np.abs(scores).max() > 8
    assert abs(identity) > 8


def test_free_paths_are_exact_at_a_long_step() -> None:
    target = DoubleWell(2, barrier=2.0)
    engine = TargetSteering(target, lambda x: x[:, :1], Restraint([1.0], (None,)), step_size=0.5, friction=1.0)
    state, move, generator = engine.locate(target.sample(20_000, generator=seeded())), FreePaths(engine, n_steps=3), seeded(4)
    for _ in range(10):
        state, info = move.step(state, generator=generator)
    right = (state.x[:, 0] > 0).double()
    exact = 1 / (1 + math.exp(target.free_energy_difference))
    assert_z(float(right.mean()), exact, float(right.std()) / math.sqrt(len(right)))
    assert 0.2 < float(info.accepted.double().mean()) < 0.9


def test_a_periodic_variable_goes_around_the_shorter_way() -> None:
    target = VonMisesProduct(torch.tensor([3.0]), concentration=torch.tensor([2.0]))
    turn = 2 * math.pi
    engine = TargetSteering(target, lambda x: x, Restraint([20.0], (turn,)), step_size=0.2)
    proposal = Mixture(
        [NormalMixture(torch.tensor([[-3.0]]), torch.tensor([[0.8]]), periods=(turn,)), Flat([-math.pi], [math.pi])], [0.7, 0.3]
    )
    move, generator = SteeredMove(engine, proposal, schedule=Schedule(10)), seeded(5)
    state = move.init(target.sample(20_000, generator=generator))
    for _ in range(10):
        state, info = move.step(state, generator=generator)
    cosine = torch.cos(state.x[:, 0] - 3.0)
    exact = float(torch.special.i1(torch.tensor(2.0)) / torch.special.i0(torch.tensor(2.0)))
    assert_z(float(cosine.mean()), exact, float(cosine.std()) / math.sqrt(len(cosine)))
    assert float((engine.restraint.difference(info.end, info.start)).abs().max()) <= math.pi


def test_restraint_draws_follow_its_own_density() -> None:
    restraint = Restraint([4.0, 9.0], (None, 2 * math.pi))
    xi = torch.tensor([[1.0, 3.0]], dtype=torch.float64).expand(40_000, 2)
    draws = restraint.draw(xi, generator=seeded())
    energy = restraint.energy(xi, draws)
    bent = 9.0 * (1 - float(torch.special.i1e(torch.tensor(9.0)) / torch.special.i0e(torch.tensor(9.0))))
    assert_z(float(energy.mean()), 0.5 + bent, float(energy.std()) / 200)
    assert bool((draws[:, 1].abs() <= math.pi).all())


def test_a_clipped_target_is_refused() -> None:
    with pytest.raises(InexactDensityError, match="clipped"):
        TargetSteering(Regularised(DoubleWell(1), u_cut=2.0, u_max=50.0), lambda x: x, Restraint([1.0], (None,)), step_size=0.1)


def test_schedules_and_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="bend"):
        Schedule(10, bend=1.5)
    with pytest.raises(InputError, match="positive stiffness"):
        Restraint([-1.0], (None,))
    problem = two_hills()
    engine = problem.engine(step_size=0.1, friction=0.0)
    with pytest.raises(ShapeError, match="proposal"):
        SteeredMove(engine, Flat([0.0, 0.0], [1.0, 1.0]), schedule=Schedule(5))
    h = Schedule(10, bend=0.7)
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(h.fraction(s) + h.fraction(1 - s), torch.ones(11, dtype=torch.float64))


def dimer_system(*, barrier: float = 4.0, constrained: bool = False) -> openmm.System:
    """A dimer in a double well of its bond and a third particle on a spring, in vacuum; masses 10, 20 and 5."""
    system = openmm.System()
    for mass in (10.0, 20.0, 5.0):
        system.addParticle(mass)
    bond = openmm.CustomBondForce(f"{barrier * KT}*(1-((r-0.4)/0.1)^2)^2")
    bond.addBond(0, 1, [])
    spring = openmm.HarmonicBondForce()
    spring.addBond(1, 2, 0.2, 2000.0)
    place = openmm.CustomExternalForce("20*(x*x+y*y+z*z)")
    place.addParticle(0, [])
    for force in (bond, spring, place):
        system.addForce(force)
    if constrained:
        spring.setBondParameters(0, 1, 2, 0.2, 0.0)
        system.addConstraint(1, 2, 0.2)
    return system


class DimerTarget(Target):
    """The same energies in PyTorch."""

    event_shape = (3, 3)

    def reduced_potential(self, x: Tensor) -> Tensor:
        bond, spring = (x[:, 1] - x[:, 0]).norm(dim=1), (x[:, 2] - x[:, 1]).norm(dim=1)
        return 4.0 * (1 - ((bond - 0.4) / 0.1) ** 2) ** 2 + (1000 * (spring - 0.2) ** 2 + 20 * x[:, 0].square().sum(1)) / KT


START = np.array([[0.01, 0.0, 0.0], [0.31, 0.02, 0.0], [0.35, 0.2, 0.03]])


def openmm_dimer(**options: float) -> OpenMMSteering:
    return OpenMMSteering(
        dimer_system(), CollectiveVariables([Distance("bond", (0, 1))]), temperature_kelvin=300, positions=START, widths=[0.02],
        platform=REFERENCE, **({"timestep_ps": 0.01} | options),
    )  # fmt: skip


def test_openmm_paths_are_those_of_the_torch_engine() -> None:
    engine = openmm_dimer()
    masses = torch.tensor([10.0, 20.0, 5.0], dtype=torch.float64)[:, None] / KT
    twin = TargetSteering(
        DimerTarget(), lambda x: Distance("bond", (0, 1))(x)[:, None], engine.restraint, step_size=0.01, masses=masses
    )  # fmt: skip
    x = torch.from_numpy(START)[None].repeat(3, 1, 1)
    x[1, 0, 0] += 0.02
    start = torch.tensor([[0.3], [0.31], [0.3]], dtype=torch.float64)
    end = torch.tensor([[0.5], [0.52], [0.295]], dtype=torch.float64)
    schedule = Schedule(60, bend=-0.5, span=(0.2,))
    found = engine.steer(engine.locate(x), start, end, schedule=schedule, generator=seeded())
    other = twin.steer(twin.locate(x), start, end, schedule=schedule, generator=seeded())
    torch.testing.assert_close(found.x, other.x, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.work, other.work, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.xi, other.xi, rtol=0, atol=1e-9)
    assert found.n_force.tolist() == other.n_force.tolist() == [62, 65, 4]


def test_openmm_moves_sample_the_bond_of_a_dimer() -> None:
    """The bond length follows r² exp(−u) by quadrature, from a start in one well, across a barrier that free paths do not cross."""
    engine = openmm_dimer(timestep_ps=0.02)
    move = SteeredMove(engine, Flat([0.25], [0.55]), schedule=Schedule(12))
    local, generator = FreePaths(engine, n_steps=5), seeded(7)
    state = engine.locate(torch.from_numpy(START)[None].repeat(20, 1, 1))
    long_side = []
    for k in range(150):
        state, _ = local.step(state, generator=generator)
        state, _ = move.step(state, generator=generator)
        if k >= 20:
            long_side.append((state.xi[:, 0] > 0.4).double())
    share = torch.stack(long_side)
    r = np.linspace(0.15, 0.75, 20_001)
    density = r**2 * np.exp(-4.0 * (1 - ((r - 0.4) / 0.1) ** 2) ** 2)
    exact = density[r > 0.4].sum() / density.sum()
    per_walker = share.mean(0)
    assert_z(float(per_walker.mean()), exact, float(per_walker.std()) / math.sqrt(20))


@pytest.mark.parametrize("friction", [0.0, 5.0])
def test_friction_gives_its_heat_to_the_work(friction: float) -> None:
    """⟨e^{−w}⟩ = 1 for paths that start at equilibrium and go nowhere: the heat of O is in the work."""
    engine = openmm_dimer(timestep_ps=0.03, friction_per_ps=friction)
    state, local, generator = engine.locate(torch.from_numpy(START)[None].repeat(40, 1, 1)), FreePaths(engine, n_steps=8), seeded(8)
    terms = []
    for k in range(60):
        state, info = local.step(state, generator=generator)
        if k > 15:
            terms.append(info.log_ratio.exp())
    values = torch.stack(terms)
    means = values.mean(0)
    assert_z(float(means.mean()), 1.0, float(means.std()) / math.sqrt(len(means)))
    assert float(values.std()) > 1e-3


def water_box() -> tuple[openmm.System, np.ndarray, np.ndarray]:
    """Alanine dipeptide's φ is not needed to see constraints: one rigid water pair and a constrained CH bond of methanol-like masses."""
    system = openmm.System()
    positions = []
    for k in range(3):
        for mass in (15.999, 1.008, 1.008):
            system.addParticle(mass)
        first = 3 * k
        for a, b, length in ((0, 1, 0.09572), (0, 2, 0.09572), (1, 2, 0.15139)):
            system.addConstraint(first + a, first + b, length)
        offset = np.array([0.33 * k, 0.05 * k, 0.0])
        positions += [offset, offset + np.array([0.09572, 0, 0]), offset + np.array([-0.02399, 0.09266, 0])]
    pair = openmm.CustomBondForce("200*(r-0.33)^2")
    pair.addBond(0, 3, [])
    pair.addBond(3, 6, [])
    system.addForce(pair)
    return system, np.array(positions), np.array([0, 3])


def test_paths_with_constraints_retrace_their_way() -> None:
    """With its velocities turned round and the centre going back, a path of rigid molecules ends where it began."""
    system, positions, pair = water_box()
    engine = OpenMMSteering(
        system, CollectiveVariables([Distance("d", pair.tolist())]), temperature_kelvin=300, positions=positions, widths=[0.02],
        timestep_ps=0.002, platform=REFERENCE,
    )  # fmt: skip
    slot = engine._pool.slots[0]
    state = engine.locate(torch.from_numpy(positions)[None])
    there = engine.steer(
        state, torch.tensor([[0.33]]).double(), torch.tensor([[0.45]]).double(), schedule=Schedule(200), generator=seeded()
    )
    context = slot._context
    velocities = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    slot._integrator.begin(
        np.array([0.45]), np.array([-0.12]), schedule=Schedule(200), n_steps=200, temperature_kelvin=300.0, timestep_ps=0.002, n_particles=9
    )
    context.setVelocities(-velocities)
    context.setParameter("boltzgen_center_0", 0.45)
    slot._integrator.step(200)
    back = context.getState(positions=True).getPositions(asNumpy=True)._value
    np.testing.assert_allclose(back, state.x[0].numpy(), atol=1e-6)
    assert float((there.x - state.x).abs().max()) > 0.05
    lengths = (there.x[0, 1] - there.x[0, 0]).norm()
    assert abs(float(lengths) - 0.09572) < 1e-7


def test_rigid_molecules_keep_their_ensemble() -> None:
    """Constraints, friction and steering: ⟨e^{−w}⟩ = 1 for free paths and the distance follows its density (masses on rigid bodies)."""
    system, positions, pair = water_box()
    engine = OpenMMSteering(
        system, CollectiveVariables([Distance("d", pair.tolist())]), temperature_kelvin=300, positions=positions, widths=[0.02],
        timestep_ps=0.004, friction_per_ps=2.0, platform=REFERENCE,
    )  # fmt: skip
    state, generator = engine.locate(torch.from_numpy(positions)[None].repeat(16, 1, 1)), seeded(11)
    move, local = SteeredMove(engine, Flat([0.25], [0.42]), schedule=Schedule(20)), FreePaths(engine, n_steps=10)
    seen, terms = [], []
    for k in range(120):
        state, free = local.step(state, generator=generator)
        state, _ = move.step(state, generator=generator)
        if k >= 20:
            seen.append(state.xi[:, 0])
            terms.append(free.log_ratio.exp())
    r = np.linspace(0.05, 0.7, 20_001)
    density = r**2 * np.exp(-200 * (r - 0.33) ** 2 / KT)
    exact, means = float((r * density).sum() / density.sum()), torch.stack(seen).mean(0)
    assert_z(float(means.mean()), exact, float(means.std()) / 4)
    weights = torch.stack(terms).mean(0)
    assert_z(float(weights.mean()), 1.0, float(weights.std()) / 4)


def test_paths_that_blow_up_are_rejected_counted_and_leave_the_walkers_alone() -> None:
    engine = openmm_dimer(timestep_ps=2.0)
    state = engine.locate(torch.from_numpy(START)[None].repeat(4, 1, 1))
    after, info = SteeredMove(engine, Flat([0.3], [0.5]), schedule=Schedule(50)).step(state, generator=seeded())
    assert engine.n_failures == len(info.result.failures) == 4
    assert not info.accepted.any()
    assert torch.isinf(info.result.work).all()
    torch.testing.assert_close(after.x, state.x)
    gentle = engine.with_settings(timestep_ps=0.01)
    _, again = FreePaths(gentle, n_steps=5).step(after, generator=seeded())
    assert not again.result.failures


def test_the_engine_leaves_couplings_out_and_refuses_virtual_sites() -> None:
    system = dimer_system()
    system.addForce(openmm.CMMotionRemover())
    engine = OpenMMSteering(
        system, CollectiveVariables([Distance("bond", (0, 1))]), temperature_kelvin=300, positions=START, widths=[0.02], timestep_ps=0.01,
        platform=REFERENCE,
    )  # fmt: skip
    assert any("CMMotionRemover" in note for note in engine.notes)
    site = copy.deepcopy(dimer_system())
    site.addParticle(0.0)
    site.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(InputError, match="virtual sites"):
        OpenMMSteering(site, CollectiveVariables([Distance("bond", (0, 1))]), temperature_kelvin=300, positions=np.zeros((4, 3)),
                       widths=[0.02], timestep_ps=0.01, platform=REFERENCE)  # fmt: skip
    with pytest.raises(InputError, match="positive width"):
        OpenMMSteering(
            system, CollectiveVariables([Distance("bond", (0, 1))]), temperature_kelvin=300, positions=START, widths=[0.0],
            timestep_ps=0.01, platform=REFERENCE,
        )  # fmt: skip


def test_a_planar_system_stays_in_its_plane() -> None:
    engine = OpenMMSteering(
        dimer_system(), CollectiveVariables([Distance("bond", (0, 1))]), temperature_kelvin=300, positions=START * [1, 1, 0],
        widths=[0.02], timestep_ps=0.01, friction_per_ps=3.0, platform=REFERENCE, planar=True,
    )  # fmt: skip
    state, _ = FreePaths(engine, n_steps=50).step(engine.locate(torch.from_numpy(START * [1, 1, 0])[None]), generator=seeded())
    assert float(state.x[..., 2].abs().max()) == 0.0
    assert float((state.x - torch.from_numpy(START * [1, 1, 0])).abs().max()) > 1e-3


def test_proposals_beyond_one_turn_of_a_periodic_variable_are_refused() -> None:
    """Their density is that of the line: the way back starts from the wrapped value, which has another one."""
    engine = TargetSteering(VonMisesProduct(torch.tensor([3.0]), concentration=torch.tensor([2.0])), lambda x: x,
                            Restraint([20.0], (2 * math.pi,)), step_size=0.2)  # fmt: skip
    state = engine.locate(torch.zeros(50, 1, dtype=torch.float64))
    line = NormalMixture(torch.tensor([[3.0]]), torch.tensor([[0.8]]))
    for beyond in (Flat([0.0], [2 * math.pi]), line):
        with pytest.raises(InputError, match="periods of the variables"):
            SteeredMove(engine, beyond, schedule=Schedule(2)).step(state, generator=seeded())
    SteeredMove(engine, Flat([-math.pi], [math.pi]), schedule=Schedule(2)).step(state, generator=seeded())


def test_noise_along_paths_follows_the_generator_and_is_not_repeated_after_a_failure() -> None:
    def ends(engine: OpenMMSteering, seed: int) -> Tensor:
        return engine.roam(engine.locate(torch.from_numpy(START)[None]), n_steps=20, generator=seeded(seed)).x

    first, again, other = (ends(openmm_dimer(friction_per_ps=50.0), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    engine, x, seeds = openmm_dimer(friction_per_ps=50.0), torch.from_numpy(START)[None], []
    for seed in (1, 2):
        engine.roam(engine.locate(x), n_steps=1, generator=seeded(seed))
        seeds.append(engine._pool.slots[0]._integrator.getRandomNumberSeed())
        broken = engine.with_settings(timestep_ps=1e6).roam(engine.locate(x), n_steps=5, generator=seeded(seed))
        assert broken.failures
    assert seeds[0] != seeds[1]


def test_a_path_that_leaves_constraints_unsatisfied_has_failed() -> None:
    """OpenMM's solver gives up without a word where a step turns rigid molecules too far."""
    system = openmm.System()
    for mass in (12.0, 1.0, 1.0, 12.0):
        system.addParticle(mass)
    for a, b, length in ((0, 1, 0.11), (0, 2, 0.11), (1, 2, 0.18), (0, 3, 0.15)):
        system.addConstraint(a, b, length)
    cosine = 1 - 0.18**2 / (2 * 0.11**2)
    x = np.array([[0, 0, 0], [0.11, 0, 0], [0.11 * cosine, 0.11 * math.sqrt(1 - cosine**2), 0], [0.09, -0.12, 0]])
    engine = OpenMMSteering(
        system, CollectiveVariables([Distance("d", (1, 3))]), temperature_kelvin=300, positions=x, widths=[0.02], timestep_ps=0.08,
        platform=REFERENCE,
    )  # fmt: skip
    result = engine.roam(engine.locate(torch.from_numpy(x)[None].repeat(400, 1, 1)), n_steps=5, generator=seeded(1))
    assert "constraints could not be satisfied" in result.failures.values()
    reached = torch.isfinite(result.work)
    off = (result.x[reached][:, 1] - result.x[reached][:, 0]).norm(dim=1) - 0.11
    assert float(off.abs().max()) < 1e-6
    assert not engine.with_settings(timestep_ps=0.01).roam(engine.locate(result.x[:50]), n_steps=5, generator=seeded(1)).failures
