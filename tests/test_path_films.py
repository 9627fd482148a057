"""A filmed path is the path that would have been run, and its work grows to the work that is accepted or rejected."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch

from boltzgen.cvs import CollectiveVariables, Dihedral
from boltzgen.md.loading import load
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.steering import OpenMMSteering
from boltzgen.mixtures import Flat
from boltzgen.paths import Looks, PathWalkers, Schedule
from boltzgen.workflows.path_films import film_paths, stored_films

SYSTEM = Path(__file__).parents[1] / "systems/alanine_dipeptide_vacuum"
PHI, PSI = Dihedral("phi", (4, 6, 8, 14)), Dihedral("psi", (6, 8, 14, 16))
SCHEDULE = Schedule(60, bend=-0.5)
START, END = torch.tensor([[-2.6, 2.7], [-1.4, 1.0]], dtype=torch.float64), torch.tensor([[2.9, -2.9], [-1.2, 1.3]], dtype=torch.float64)


def engine(*, friction: float = 0.0, timestep: float = 0.001, constrained: bool = False) -> tuple[OpenMMSteering, PathWalkers]:
    loaded = load(SYSTEM / "topology.pdb", SYSTEM / "system.xml")
    system = openmm.XmlSerializer.clone(loaded.system)
    if constrained:
        bonds = next(force for force in system.getForces() if isinstance(force, openmm.HarmonicBondForce))
        for a, b, length, _ in (bonds.getBondParameters(i) for i in range(bonds.getNumBonds())):
            if min(system.getParticleMass(atom)._value for atom in (a, b)) < 1.5:
                system.addConstraint(a, b, length)
    made = OpenMMSteering(
        system, CollectiveVariables([PHI, PSI]), temperature_kelvin=300, positions=loaded.positions, widths=(0.15, 0.15),
        timestep_ps=timestep, friction_per_ps=friction, platform=PlatformChoice(name="Reference", contexts=1),
    )  # fmt: skip
    return made, made.locate(torch.from_numpy(np.stack([loaded.positions, loaded.positions])))


@pytest.mark.parametrize("constrained", [False, True])
def test_a_film_is_the_path_itself(constrained: bool) -> None:
    plain, walkers = engine(constrained=constrained)
    expected = plain.steer(walkers, START, END, schedule=SCHEDULE, generator=torch.Generator().manual_seed(4))
    watched, again = engine(constrained=constrained)
    found, films = watched.film(again, START, END, schedule=SCHEDULE, n_frames=12, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.work, expected.work, rtol=0, atol=1e-10)
    for row, film in enumerate(films):
        np.testing.assert_allclose(film.s, np.arange(13) / 12)
        assert film.failure is None
        assert film.work[0] == 0
        np.testing.assert_allclose(film.work[-1], float(expected.work[row]), atol=1e-9)
        np.testing.assert_allclose(film.xi[-1], expected.xi[row], atol=1e-9)
        np.testing.assert_allclose(film.xi[0], walkers.xi[row])
        np.testing.assert_allclose(film.centre[0], START[row])
        np.testing.assert_allclose(plain.restraint.wrapped(torch.from_numpy(film.centre[-1:] - END[row].numpy())), 0, atol=1e-12)
        assert np.abs(np.diff(film.centre, axis=0)).max() < 0.4, "the centre must not jump where it passes the end of the circle"
    assert (found.n_force - expected.n_force).tolist() == [24, 24]


def test_the_work_of_a_film_leaves_out_the_heat() -> None:
    steering, walkers = engine(friction=50.0)
    result, films = steering.film(walkers, START, END, schedule=SCHEDULE, n_frames=7, generator=torch.Generator().manual_seed(2))
    for row, film in enumerate(films):
        np.testing.assert_allclose(film.work[-1], float(result.work[row]), atol=1e-9)
        np.testing.assert_allclose(film.xi[-1], result.xi[row], atol=1e-9)


def test_short_paths_have_fewer_frames_and_broken_ones_end_early() -> None:
    steering, walkers = engine()
    _, films = steering.film(walkers, START, END, schedule=Schedule(5), n_frames=50, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(films[0].s, np.arange(6) / 5)
    broken = steering.with_settings(timestep_ps=0.05)
    result, films = broken.film(walkers, START, END, schedule=Schedule(200), n_frames=40, generator=torch.Generator().manual_seed(1))
    assert result.failures
    assert torch.isinf(result.work).any()
    for row, reason in result.failures.items():
        assert films[row].failure == reason
        assert len(films[row].s) == len(films[row].xi) == len(films[row].work) == len(films[row].centre) < 41
        assert np.isfinite(films[row].work).all()


def test_filmed_moves_keep_the_widest_path_of_each_kind() -> None:
    steering, walkers = engine()
    proposal = Flat([-math.pi, -math.pi], [math.pi, math.pi])
    made = film_paths(steering, walkers, proposal, schedule=Schedule(40), generator=torch.Generator().manual_seed(3), tries=3)
    assert [one.accepted for one in made.paths] in ([True], [False], [True, False])
    assert made.n_force >= 2 * (42 + 2 * 40)
    for one in made.paths:
        np.testing.assert_allclose(one.w, one.film.work[-1], atol=1e-9)  # a flat proposal has no ratio
    found = stored_films(made.arrays())
    assert [one.w for one in found] == [one.w for one in made.paths]


@pytest.mark.parametrize("constrained", [False, True])
def test_a_schedule_with_looks_gives_the_same_path_and_what_it_passes(constrained: bool) -> None:
    plain, walkers = engine(constrained=constrained)
    expected = plain.steer(walkers, START, END, schedule=SCHEDULE, generator=torch.Generator().manual_seed(4))
    watched, again = engine(constrained=constrained)
    schedule = replace(SCHEDULE, looks=(0.3,) * START.shape[1])
    found = watched.steer(again, START, END, schedule=schedule, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.work, expected.work, rtol=0, atol=1e-10)
    steps = schedule.looked_at(plain.restraint.difference(END, START))
    assert (found.n_force - expected.n_force).tolist() == [2 * len(some) for some in steps]
    looks = Looks.of(found, time=7)
    assert np.bincount(looks.walker).tolist() == [len(some) for some in steps]
    assert set(looks.time) == {7}
    third, once_more = engine(constrained=constrained)
    n = int(schedule.steps(END - START)[0])
    _, films = third.film(once_more, START, END, schedule=SCHEDULE, n_frames=n, generator=torch.Generator().manual_seed(4))
    for row, some in enumerate(steps):
        mine = looks.walker == row
        np.testing.assert_allclose(looks.work[mine], films[row].work[list(some)], atol=1e-9)
        np.testing.assert_allclose(looks.xi[mine], films[row].xi[list(some)], atol=1e-9)
        np.testing.assert_allclose(looks.centre[mine], films[row].centre[list(some)], atol=1e-12)
