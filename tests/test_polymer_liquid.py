"""Every part of the compiled hybrid Monte Carlo of the polymer's reference: forces, dynamics, test, reversal and noise."""

from __future__ import annotations

import functools
import importlib
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest

from tests.assertions import assert_z

sys.path.append(str(Path("benchmarks").resolve()))  # they share code with each other
UMBRELLA, LIQUID, HYBRID = (importlib.import_module(name) for name in ("umbrella", "polymer_liquid", "hybrid_monte_carlo"))
POLYMER = UMBRELLA.POLYMER
pytestmark = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler")
CENTRE, STIFFNESS, COARSE = 5.3, POLYMER.stiffness * LIQUID.KT, 0.018


@functools.cache
def code(*defined: str) -> Any:
    return LIQUID.PolymerLiquid(*defined)


@functools.cache
def state() -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities in equilibrium, in units of the model."""
    x, v = POLYMER.load()[1] / POLYMER.sigma, np.random.default_rng(1).normal(size=(LIQUID.N_ATOMS, 3)) * math.sqrt(LIQUID.KT)
    return code().hybrid(x, v, n=60, length=12, step=0.01, kept=0.9, stiffness=STIFFNESS, centre=CENTRE, seed=2)[:2]


def moved(liquid: Any, *, seed: int, kept: float = 1.0, step: float = COARSE, length: int = 12) -> tuple[np.ndarray, np.ndarray, int]:
    """One trajectory from the state; without noise where all of the velocities are kept."""
    x, v, _, accepted = liquid.hybrid(*state(), n=1, length=length, step=step, kept=kept, stiffness=STIFFNESS, centre=CENTRE, seed=seed)
    return x, v, accepted


def hamiltonian(x: np.ndarray, v: np.ndarray) -> float:
    """H in kT, with the window."""
    r = np.linalg.norm(x[0] - x[8])
    return (code().potential(x)[0] + 0.5 * STIFFNESS * (r - CENTRE) ** 2 + 0.5 * (v**2).sum()) / LIQUID.KT


def test_a_trajectory_in_a_window_is_that_of_openmm() -> None:
    x, v = state()
    system = POLYMER.load()[0]
    window = openmm.CustomBondForce(f"{0.5 * POLYMER.stiffness * POLYMER.kt / POLYMER.sigma**2!r}*(r-{CENTRE * POLYMER.sigma!r})^2")
    window.addBond(*POLYMER.atoms, [])
    system.addForce(window)
    step, mass = 0.001 * POLYMER.tau, system.getParticleMass(0)._value
    context = openmm.Context(system, openmm.VerletIntegrator(step), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x * POLYMER.sigma)
    force = context.getState(forces=True).getForces(asNumpy=True)._value
    context.setVelocities(v * POLYMER.sigma / POLYMER.tau - 0.5 * step / mass * force)  # half a step behind
    context.getIntegrator().step(60)
    found, _, accepted = moved(code(), seed=1, step=0.001, length=60)
    assert accepted
    np.testing.assert_allclose(found, context.getState(positions=True).getPositions(asNumpy=True)._value / POLYMER.sigma, atol=1e-6)
    assert np.abs(found - x).max() > 0.1


def check_test_and_reversal(liquid: Any) -> None:
    """The same coarse trajectory under many seeds: accepted as often as its rise of H says, and else turned back."""
    x, v = state()
    tries = [moved(liquid, seed=seed) for seed in range(400)]
    end = next((row for row in tries if row[2]), None)
    assert end is not None
    rise = hamiltonian(end[0], end[1]) - hamiltonian(x, v)
    assert 0.3 < rise < 2.0, "neither always nor never accepted"
    p = math.exp(-rise)
    assert_z(np.mean([row[2] for row in tries]), p, math.sqrt(p * (1 - p) / len(tries)))
    for row in tries:
        if not row[2]:
            np.testing.assert_array_equal(row[0], x)
            np.testing.assert_array_equal(row[1], -v)


def test_trajectories_are_accepted_as_often_as_they_should_and_turned_back_otherwise() -> None:
    check_test_and_reversal(code())


@pytest.mark.parametrize("wrong", ["KEPT_VELOCITY", "UNTESTED"])
def test_twins_without_reversal_or_test_are_caught(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_test_and_reversal(code(wrong))


def test_velocities_are_kept_in_part() -> None:
    _, v = state()
    drawn = np.stack([moved(code(), seed=seed, kept=0.6, step=1e-9, length=1)[1] - 0.6 * v for seed in range(40)])
    variance = (1 - 0.36) * LIQUID.KT
    assert_z(drawn.mean(), 0.0, math.sqrt(variance / drawn.size))
    assert_z(drawn.var(), variance, variance * math.sqrt(2 / drawn.size))


def test_the_walker_goes_where_its_window_is() -> None:
    walker = HYBRID.CompiledWalker(POLYMER, seed=1, liquid=code())
    walker.enter(10)
    assert walker.trace(150)[50:].mean() == pytest.approx(POLYMER.centres[10], abs=0.15)
    assert walker.evaluations >= walker.proposed * HYBRID.LENGTH
    with pytest.raises(ValueError, match="polymer_in_solvent"):
        HYBRID.CompiledWalker(UMBRELLA.DIMER_3D, seed=1)
