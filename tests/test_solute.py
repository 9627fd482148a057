from __future__ import annotations

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from boltzgen.cvs import CollectiveVariables, Distance
from boltzgen.errors import InputError, ShapeError
from boltzgen.md.driven import DrivenSteering
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.target import OpenMMTarget
from boltzgen.paths import Schedule
from boltzgen.sampling.driving import TargetDriving
from boltzgen.sampling.filtered import FilteredProposal
from boltzgen.sampling.solute import SoluteMove, straight_way, superposed
from boltzgen.sampling.steered import FreePaths
from boltzgen.units import thermal_energy
from tests import solute_problems as problem

REFERENCE = PlatformChoice(name="Reference", contexts=1)
KT = thermal_energy(300.0)
SOLUTE = (0, 1, 2, 3)
ENDS = CollectiveVariables([Distance("ends", (0, 3))])


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("step", "friction", "schedule"),
    [(0.1, 0.0, Schedule(6)), (0.25, 0.0, Schedule(6, bend=-1.0)), (0.2, 2.0, Schedule(6)), (0.15, 0.0, Schedule(8, span=(0.5,)))],
)
def test_the_move_leaves_the_distribution_as_it_is(step: float, friction: float, schedule: Schedule) -> None:
    move = SoluteMove(problem.driven(step, friction), problem.proposal(), schedule=schedule)
    scores, identity, acceptance = problem.stationary_scores(move, n_walkers=6_000, n_moves=5, seed=1)
    assert np.abs(scores).max() < 4.5
    assert abs(identity) < 4.5, "mean acceptance is not 2 P(w < 0)"
    assert acceptance > 0.05


def test_nearest_images_are_exact_for_a_target_that_has_them() -> None:
    def images(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x.flip(1), x * torch.tensor([1.0, 1.0, -1.0]), x.flip(1) * torch.tensor([1.0, 1.0, -1.0])])

    move = SoluteMove(problem.driven(0.15, 0.0), problem.proposal(), schedule=Schedule(6), images=images)
    scores, identity, acceptance = problem.stationary_scores(move, n_walkers=6_000, n_moves=5, seed=2)
    assert np.abs(scores).max() < 4.5
    assert abs(identity) < 4.5
    assert acceptance > 0.05


@pytest.mark.slow
def test_the_move_is_exact_over_a_million_moves() -> None:
    for k, (step, friction) in enumerate([(0.1, 0.0), (0.25, 0.0), (0.2, 2.0)]):
        move = SoluteMove(problem.driven(step, friction), problem.proposal(), schedule=Schedule(6))
        scores, identity, _ = problem.stationary_scores(move, n_walkers=20_000, n_moves=17, seed=10 + k)
        assert np.abs(scores).max() < 4.5
        assert abs(identity) < 4.5


def model(x: torch.Tensor) -> torch.Tensor:
    """ln of the chain's density without the solvent, off by a constant."""
    return 5.0 - problem.chain_energy(problem.COORDINATES.inverse(x)[0])


def test_proposals_filtered_by_a_model_are_exact_and_better() -> None:
    filtered = FilteredProposal(problem.proposal(), model, level=1.0)
    engine = problem.driven(0.15, 0.0)
    scores, identity, better = problem.stationary_scores(
        SoluteMove(engine, filtered, schedule=Schedule(6)), n_walkers=6_000, n_moves=5, seed=4
    )
    _, _, plain = problem.stationary_scores(
        SoluteMove(engine, problem.proposal(), schedule=Schedule(6)), n_walkers=6_000, n_moves=1, seed=4
    )
    assert np.abs(scores).max() < 4.5
    assert abs(identity) < 4.5
    assert better > plain
    assert 0 < filtered.kept < filtered.drawn


def test_a_filter_that_forgets_its_density_is_biased() -> None:
    class Forgetful(FilteredProposal):
        def log_prob(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
            return self.proposal.log_prob(x)

        def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[torch.Tensor, torch.Tensor]:
            x, _ = super().sample(n, generator=generator)
            return x, self.log_prob(x)

    filtered = Forgetful(problem.proposal(), model, level=1.0)
    move = SoluteMove(problem.driven(0.15, 0.0), filtered, schedule=Schedule(6))
    scores, _, _ = problem.stationary_scores(move, n_walkers=6_000, n_moves=8, seed=4)
    assert np.abs(scores).max() > 8


def test_without_the_jacobian_it_is_biased() -> None:
    move = SoluteMove(problem.driven(0.15, 0.0), problem.WithoutJacobian(), schedule=Schedule(3))
    scores, _, _ = problem.stationary_scores(move, n_walkers=10_000, n_moves=10, seed=1)
    assert np.abs(scores).max() > 8


def test_an_alignment_that_is_not_symmetric_is_biased() -> None:
    move = SoluteMove(problem.driven(0.15, 0.0), problem.proposal(), schedule=Schedule(3), way=problem.in_the_laboratory_frame)
    scores, _, _ = problem.stationary_scores(move, n_walkers=10_000, n_moves=8, seed=1)
    assert np.abs(scores).max() > 8


def test_without_the_kinetic_energy_of_the_solvent_it_is_biased() -> None:
    engine = problem.driven(0.2, 0.0, problem.KineticEnergyDropped)
    move = SoluteMove(engine, problem.proposal(), schedule=Schedule(6))
    scores, identity, _ = problem.stationary_scores(move, n_walkers=6_000, n_moves=4, seed=1)
    assert np.abs(scores).max() > 8
    assert abs(identity) > 8


def test_superposition_is_symmetric_proper_and_the_best() -> None:
    generator = seeded()
    x, y = (torch.randn(50, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    there, back = superposed(x, y), superposed(y, x)
    torch.testing.assert_close(there.mean(1), y.mean(1))
    turn = torch.linalg.lstsq(x - x.mean(1, keepdim=True), there - there.mean(1, keepdim=True)).solution
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(50, dtype=torch.float64))
    inverse = torch.linalg.lstsq(y - y.mean(1, keepdim=True), back - back.mean(1, keepdim=True)).solution
    torch.testing.assert_close(turn @ inverse, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    best = (there - y).square().sum((1, 2))
    for _ in range(20):
        other = (x - x.mean(1, keepdim=True)) @ problem.random_rotations(50, generator) + y.mean(1, keepdim=True)
        assert bool(((other - y).square().sum((1, 2)) >= best).all())


def test_a_path_in_torch_is_retraced() -> None:
    generator = seeded()
    engine = problem.driven(0.2, 0.0)
    walkers = engine.locate(problem.draw(10, generator))
    start = walkers.x[:, list(SOLUTE)]
    way = straight_way(start, problem.proposal().sample(10, generator=generator)[0])
    s = Schedule(20, bend=-0.7).fraction(torch.arange(21, dtype=torch.float64) / 20)
    places = start + s[:, None, None, None] * (way[:, 1] - start)
    v = engine._still(torch.randn(10, 8, 3, generator=generator, dtype=torch.float64))
    x, v_end = problem.velocities_after(engine, walkers, places[1:], v)
    back, v_back = problem.velocities_after(engine, engine.locate(x), places[:-1].flip(0), -v_end)
    torch.testing.assert_close(back, walkers.x, atol=1e-8, rtol=0)
    torch.testing.assert_close(-v_back, v, atol=1e-8, rtol=0)


def small_system(*, rigid: bool = False, constrained_solute: bool = False) -> tuple[openmm.System, np.ndarray]:
    """Four beads and six solvent particles (three rigid pairs), soft and repulsive, in a trap."""
    system, n = openmm.System(), 10
    for i in range(n):
        system.addParticle(20.0 + i)
    bonds, trap = openmm.HarmonicBondForce(), openmm.CustomExternalForce("100*(x*x+y*y+z*z)")
    soft = openmm.CustomNonbondedForce("10*exp(-(r/0.2)^2)")
    for i in range(n):
        trap.addParticle(i, [])
        soft.addParticle([])
    for i in range(3):
        bonds.addBond(i, i + 1, 0.15, 2000.0)
    for force in (bonds, trap, soft):
        system.addForce(force)
    positions = np.random.default_rng(1).normal(size=(n, 3)) * 0.15
    positions[:4] = 0.15 * np.array([[0, 0, 0], [1, 0, 0], [1.3, 1, 0], [2, 1, 0.7]])
    if rigid:
        for i in (4, 6, 8):
            system.addConstraint(i, i + 1, 0.1)
    if constrained_solute:
        system.addConstraint(0, 1, 0.15)
    return system, positions


def small_engine(*, friction: float = 0.0, rigid: bool = False) -> tuple[DrivenSteering, np.ndarray]:
    system, positions = small_system(rigid=rigid)
    engine = DrivenSteering(system, SOLUTE, ENDS, temperature_kelvin=300.0, positions=positions, timestep_ps=0.02, friction_per_ps=friction,
                            platform=REFERENCE)  # fmt: skip
    return engine, positions


def ways(walkers, generator: torch.Generator) -> torch.Tensor:  # type: ignore[no-untyped-def]
    start = walkers.x[:, list(SOLUTE)]
    bent, end = (start + 0.05 * torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.stack([start, bent, end], 1)


def test_openmm_and_torch_follow_the_same_path() -> None:
    engine, positions = small_engine()
    system, _ = small_system()
    masses = torch.tensor([20.0 + i for i in range(10)], dtype=torch.float64)[:, None] / KT
    target = OpenMMTarget(system, temperature_kelvin=300.0, positions=positions, platform=REFERENCE)
    twin = TargetDriving(target, SOLUTE, ENDS, step_size=0.02, masses=masses)
    x = torch.from_numpy(np.stack([positions, positions + 0.01]))
    walkers = engine.locate(x)
    corners, schedule = ways(walkers, seeded()), Schedule(40, bend=0.3)
    steps = torch.tensor([40, 25])
    here = engine.drive(walkers, corners, steps=steps, schedule=schedule, generator=seeded(5))
    there = twin.drive(twin.locate(x), corners, steps=steps, schedule=schedule, generator=seeded(5))
    torch.testing.assert_close(here.x, there.x, atol=1e-8, rtol=0)
    torch.testing.assert_close(here.work, there.work, atol=1e-8, rtol=0)
    torch.testing.assert_close(here.x[:, list(SOLUTE)], corners[:, -1], atol=1e-12, rtol=0)
    assert here.n_force.tolist() == [42, 27]
    assert float(here.work.abs().min()) > 0.1


@pytest.mark.parametrize("rigid", [False, True])
def test_a_path_in_openmm_is_retraced(rigid: bool) -> None:
    engine, positions = small_engine(rigid=rigid)
    walkers = engine.locate(torch.from_numpy(positions)[None])
    corners = ways(walkers, seeded())
    there = engine.drive(walkers, corners, steps=torch.tensor([50]), schedule=Schedule(50, bend=-1.0), generator=seeded(5))
    slot = engine._pool.slots[0]
    v = slot._context.getState(velocities=True).getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
    assert np.abs(v[:4]).max() == 0

    def reversed_noise(*args, **kwargs):  # type: ignore[no-untyped-def]
        return torch.from_numpy(-v / (slot._slowness * KT**0.5))[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("boltzgen.md.steering.torch.randn", reversed_noise)
        back = engine.drive(engine.locate(there.x), corners.flip(1), steps=torch.tensor([50]), schedule=Schedule(50, bend=-1.0),
                            generator=seeded())  # fmt: skip
    torch.testing.assert_close(back.x, walkers.x, atol=1e-7 if rigid else 1e-8, rtol=0)
    torch.testing.assert_close(back.work, -there.work, atol=1e-5 if rigid else 1e-8, rtol=0)
    if rigid:
        apart = (there.x[:, 4:10:2] - there.x[:, 5:10:2]).norm(dim=2)
        torch.testing.assert_close(apart, torch.full_like(apart, 0.1), atol=1e-8, rtol=0)


def test_heat_of_the_solvent_is_in_the_work() -> None:
    """Along a way that goes nowhere, ⟨e^{−W}⟩ = 1 from the distribution that free paths keep; the heat is of kT's size."""
    engine, positions = small_engine(friction=20.0)
    walkers, local = engine.locate(torch.from_numpy(positions).repeat(40, 1, 1)), FreePaths(engine, n_steps=30)
    generator = seeded()
    for _ in range(10):
        walkers, info = local.step(walkers, generator=generator)
    assert float(info.accepted.double().mean()) > 0.3
    start = walkers.x[:, list(SOLUTE)]
    result = engine.drive(walkers, torch.stack([start, start], 1), steps=torch.full((40,), 50), schedule=Schedule(50), generator=generator)
    assert float(result.work.abs().max()) < 3
    torch.testing.assert_close(result.x[:, list(SOLUTE)], start, atol=1e-12, rtol=0)


def test_a_move_in_openmm_accepts_and_records() -> None:
    engine, positions = small_engine()
    move = SoluteMove(engine, Nearby(torch.from_numpy(positions[:4])), schedule=Schedule(20))
    walkers = move.init(torch.from_numpy(positions).repeat(6, 1, 1))
    after, info = move.step(walkers, generator=seeded())
    paths = info.paths(time=3)
    assert len(paths) == 6
    assert set(paths.time.tolist()) == {3}
    np.testing.assert_allclose(paths.w, -info.log_ratio.numpy())
    np.testing.assert_allclose(paths.xi_end, ENDS(info.result.x).numpy())
    torch.testing.assert_close(after.x[~info.accepted], walkers.x[~info.accepted])


class Nearby(problem.Distribution):
    """Conformations about one, as a stand-in for a flow."""

    event_shape = (4, 3)

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.mean = mean

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.mean + 0.01 * torch.randn(n, 4, 3, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def log_prob(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        apart = superposed(x, self.mean.expand_as(x)) - self.mean
        return -0.5 * (apart / 0.01).square().sum((1, 2))


def test_paths_that_blow_up_are_rejected_and_counted() -> None:
    system, positions = small_system()
    engine = DrivenSteering(system, SOLUTE, ENDS, temperature_kelvin=300.0, positions=positions, timestep_ps=50.0, platform=REFERENCE)
    walkers = engine.locate(torch.from_numpy(positions)[None])
    result = engine.drive(walkers, ways(walkers, seeded()), steps=torch.tensor([400]), schedule=Schedule(400), generator=seeded())
    assert engine.n_failures == len(result.failures) == 1
    assert torch.isinf(result.work).all()
    torch.testing.assert_close(result.x, walkers.x)


def test_refusals() -> None:
    system, positions = small_system(constrained_solute=True)
    settings = {"temperature_kelvin": 300.0, "positions": positions, "timestep_ps": 0.01, "platform": REFERENCE}
    with pytest.raises(InputError, match="constraints=None"):
        DrivenSteering(system, SOLUTE, ENDS, **settings)
    with pytest.raises(InputError, match="different atoms"):
        DrivenSteering(small_system()[0], (0, 1, 77), ENDS, **settings)
    engine, _ = small_engine()
    with pytest.raises(ShapeError, match="conformations"):
        SoluteMove(engine, problem.Internals(), schedule=Schedule(10))
    walkers = engine.locate(torch.from_numpy(positions)[None])
    with pytest.raises(ShapeError, match="ways"):
        engine.drive(walkers, torch.zeros(1, 2, 5, 3), steps=torch.tensor([5]), schedule=Schedule(5), generator=seeded())
    with pytest.raises(InputError, match="span"):
        SoluteMove(engine, Nearby(torch.from_numpy(positions[:4])), schedule=Schedule(10, span=(1.0, 1.0)))
