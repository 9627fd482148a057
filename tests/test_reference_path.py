"""The reference by MBAR over states between two systems, on harmonic traps: F_B − F_A = (3n/2) ln[(k_B/T_B)/(k_A/T_A)]."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from boltzgen.md.mixing import mixed_system
from boltzgen.md.platforms import PlatformChoice, ResolvedPlatform
from boltzgen.md.target import OpenMMTarget
from boltzgen.units import thermal_energy
from tests.assertions import assert_z
from tests.test_mixing import trap

sys.path.append(str(Path("benchmarks").resolve()))  # it shares code with its neighbours
REFERENCE = importlib.import_module("reference_path")
N, STIFFNESS, KELVIN = 4, (300.0, 900.0), (300.0, 330.0)


def test_the_path_is_hot_in_the_middle_and_begins_and_ends_at_the_states() -> None:
    weights = REFERENCE.path(5, 4.0)
    np.testing.assert_allclose(weights, [[1, 0], [0.375, 0.125], [0.125, 0.125], [0.125, 0.375], [0, 1]])


def test_exchanges_keep_the_product_of_all_states() -> None:
    """Two states of one coordinate at two temperatures: the swap's log ratio is that of the densities of both together."""
    weights, counts = np.array([[1.0, 0.0], [0.0, 0.5]]), np.zeros((2, 1))
    u, state = np.array([[1.0, 0.0], [3.0, 2.0]]), np.array([0, 1])
    before = u[0] @ weights[0] + u[1] @ weights[1]
    after = u[1] @ weights[0] + u[0] @ weights[1]

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def integers(self, _: int) -> int:
            return 0

        def random(self) -> float:
            return self.value

    ratio = np.exp(before - after)
    assert ratio < 1
    for value, moved in ((1.01 * ratio, [0, 1]), (0.99 * ratio, [1, 0]), (0.99, [0, 1])):  # back again at any rate
        REFERENCE.exchange(u, weights, state, rng=Fixed(value), counts=counts)
        assert state.tolist() == moved
    assert counts.tolist() == [[3.0], [2.0]]


def test_round_trips_are_there_and_back() -> None:
    """Replica 0 goes from state 0 to 1 and back; replica 1 from 1 to 0 and back."""
    assert REFERENCE.round_trips(np.array([[[0, 1], [1, 0], [1, 0], [0, 1]]])) == 2
    assert REFERENCE.round_trips(np.array([[[0, 1], [0, 1]]])) == 0


def check(found: dict, weights: np.ndarray) -> None:
    """The difference of both ends, and F of every state of the path against the first."""
    exact = 1.5 * N * np.log(STIFFNESS[1] / KELVIN[1] / (STIFFNESS[0] / KELVIN[0]))
    assert_z(found["delta_f_kT"], exact, found["stderr_kT"], n_sigma=4)
    stiffness = weights @ (STIFFNESS[0], STIFFNESS[1] * KELVIN[0] / KELVIN[1])
    for f, k, error in zip(found["path_kT"][1:], stiffness[1:], found["path_stderr_kT"][1:], strict=True):
        assert_z(f, 1.5 * N * np.log(k / stiffness[0]), error, n_sigma=4)


def test_harmonic_traps_at_two_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference and every state of the path; a twin whose MBAR is told of a colder path than was sampled is caught."""
    reference = ResolvedPlatform("Reference", {}, 1)
    monkeypatch.setattr(REFERENCE, "choose_platform", lambda *_, **__: reference)
    x, systems = 0.01 * np.random.default_rng(0).normal(size=(N, 3)), [trap(k, n=N) for k in STIFFNESS]
    choice = PlatformChoice(name="Reference", contexts=1)
    targets = tuple(
        OpenMMTarget(one, temperature_kelvin=t, positions=x, platform=choice) for one, t in zip(systems, KELVIN, strict=True)
    )  # fmt: skip
    kt = tuple(thermal_energy(t) for t in KELVIN)
    ends = REFERENCE.Ends(mixed_system(*systems), targets, kt, KELVIN[0], x, None, None)
    weights = REFERENCE.path(4, 2.0)
    frames = REFERENCE.sample(ends, weights, n_steps=12_000, n_sets=2, timestep_ps=0.03, friction_per_ps=3.0, seed=3)
    found = REFERENCE.analyse(ends, frames, weights, n_bootstrap=50, seed=1)
    check(found, weights)
    assert min(found["exchange_rates"]) > 0.1
    assert found["round_trips"] > 5
    colder = REFERENCE.path(4, 1.3)
    twin = REFERENCE.analyse(ends, frames, colder, n_bootstrap=50, seed=1)
    with pytest.raises(AssertionError):
        check(twin, colder)
