"""Variables on a circle: a force whose values are in another turn, and limits of basins in any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openmm
import pytest
import torch

from boltzgen.config import PathsConfig, make_config
from boltzgen.cvs import CollectiveVariables, Dihedral
from boltzgen.md.force_variable import ForceVariable
from boltzgen.md.platforms import ResolvedPlatform
from boltzgen.md.steering import OpenMMSteering
from boltzgen.paths import PathWalkers, Schedule
from boltzgen.workflows.coordinates import inside, within
from boltzgen.workflows.path_basins import memberships
from boltzgen.workflows.paths import _span

TURN = 2 * math.pi
PHI = Dihedral("phi", (0, 1, 2, 3))
#: About the cis and about the trans side, the second through ±π.
CIS, TRANS = (-1.0, 1.2), (2.5, -2.0)


def shifted(period: float | None = TURN) -> ForceVariable:
    """The dihedral from 0 to 2π."""
    torsion, force = openmm.CustomTorsionForce("theta"), openmm.CustomCVForce(f"t+{TURN!r}*step(-t)")
    torsion.addTorsion(0, 1, 2, 3)
    force.addCollectiveVariable("t", torsion)
    return ForceVariable("phi", force, n_particles=4, period=period, unit="rad")


def chains(n: int) -> torch.Tensor:
    """Four atoms with every dihedral ``[n, 4, 3]``."""
    angle = torch.linspace(-math.pi, math.pi, n + 1, dtype=torch.float64)[:-1] + 0.01
    last = torch.stack([-angle.cos(), angle.sin(), 1 + 0 * angle], dim=1) + torch.tensor([1.0, 0.0, 0.0])
    first = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    return 0.15 * torch.cat([first.expand(n, 3, 3), last[:, None]], dim=1)


def config(**more: Any) -> PathsConfig:
    values = {"task": "paths", "topology": "t.pdb", "system": "s.xml"}
    made = make_config(values | {"collective_variables": {"phi": {"kind": "dihedral", "atoms": [0, 1, 2, 3]}}} | more)
    assert isinstance(made, PathsConfig)
    return made


def walked(variable: Dihedral | ForceVariable) -> list[PathWalkers]:
    """Where paths along a variable go, of free particles on springs to a chain."""
    system, x = openmm.System(), chains(8)
    spring = openmm.HarmonicBondForce()
    for i, j in ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3)):
        spring.addBond(i, j, float((x[0, i] - x[0, j]).norm()), 5000.0)
    for _ in range(4):
        system.addParticle(12.0)
    system.addForce(spring)
    engine = OpenMMSteering(
        system, CollectiveVariables([variable]), temperature_kelvin=300.0, positions=x[0].numpy(), widths=[0.3], timestep_ps=0.002,
        platform=ResolvedPlatform("Reference", {}, 1),
    )  # fmt: skip
    generator, walkers = torch.Generator().manual_seed(1), engine.locate(x)
    end = engine.restraint.wrapped(torch.linspace(-3, 9, 8, dtype=torch.float64)[:, None])
    start = engine.restraint.draw(walkers.xi, generator=generator)
    result = engine.steer(walkers, start, end, schedule=Schedule(60, span=(math.pi,)), generator=generator)
    assert torch.isfinite(result.work).all()
    return [walkers, PathWalkers(x=result.x, u=result.work, xi=result.xi)]


def test_a_force_from_0_to_2_pi_is_the_dihedral() -> None:
    found, x = shifted(), chains(50).requires_grad_(True)
    raw = shifted(period=None)(x)
    assert float(raw.min()) >= 0
    assert float(raw.max()) > math.pi
    torch.testing.assert_close(found(x), PHI(x))
    (gradient,), (expected,) = (torch.autograd.grad(variable(x).sum(), x) for variable in (found, PHI))
    torch.testing.assert_close(gradient, expected)


def test_paths_along_it_are_those_along_the_dihedral() -> None:
    for one, other in zip(walked(shifted()), walked(PHI), strict=True):
        torch.testing.assert_close(one.xi, other.xi, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.u, other.u, atol=1e-6, rtol=0)


@pytest.mark.parametrize("low", [-1, 0, 1])
@pytest.mark.parametrize("high", [-1, 0, 1])
def test_limits_of_basins_are_in_any_turn(low: int, high: int) -> None:
    xi = np.linspace(-4, 7, 200)[:, None]
    cis = np.cos(xi[:, 0] - 0.1) > math.cos(1.1)
    trans = np.cos(xi[:, 0] - 0.25 - math.pi) > math.cos(0.5 * (TURN - 4.5))
    for (first, last), expected in ((CIS, cis), (TRANS, trans)):
        limits = first + low * TURN, last + high * TURN
        if limits[1] - limits[0] < TURN:
            assert within({"phi": limits}, xi, ["phi"], (TURN,)).tolist() == expected.tolist()
            assert inside({"phi": limits}, xi, CollectiveVariables([PHI])).tolist() == expected.tolist()


def test_both_jobs_draw_the_same_line_between_basins() -> None:
    """The lower limit belongs to a basin, the upper one to the next; NaN to none."""
    basins = {"one": {"phi": ["0 radian", "1 radian"]}, "next": {"phi": ["1 radian", "2 radian"]}}
    xi, variables = np.array([[0.0], [1.0], [2.0], [math.nan]]), CollectiveVariables([PHI])
    regions = memberships(config(basins=basins))
    for name, expected in (("one", [True, False, False, False]), ("next", [False, True, False, False])):
        assert regions[name](xi).tolist() == expected
        assert inside({"phi": config(basins=basins).basin_ranges[name]["phi"]}, xi, variables).tolist() == expected


def test_the_way_between_basins_is_the_shorter_arc() -> None:
    goals = {"walkers": {"pulled_to": [{"phi": "150 degree"}, {"phi": "-110 degree"}]}}
    assert _span(config(**goals)) == pytest.approx((math.radians(100),))
