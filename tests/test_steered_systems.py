"""The systems of steered paths have the energies and forces of their definitions, evaluated pair by pair in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

KT = 8.31446261815324e-3 * 300
SIGMA = 0.34
R0 = 2 ** (1 / 6)
Energy = Callable[[np.ndarray], np.ndarray]


def lennard_jones(r: np.ndarray) -> np.ndarray:
    return 4 * (r**-12 - r**-6)


def switched(r: np.ndarray) -> np.ndarray:
    switch = np.where(r.real < 2, 1.0, np.where(r.real < 2.5, (6.25 - r**2) ** 2 * (2 * r**2 - 5.75) / 11.390625, 0.0))
    return lennard_jones(r) * switch


def wca(r: np.ndarray) -> np.ndarray:
    return np.where(r.real < R0, lennard_jones(r) + 1, 0.0)


def spring(rest: float) -> Energy:
    return lambda r: 250 * (r - rest) ** 2


def ends(r: np.ndarray) -> np.ndarray:
    return 9.1 * (0.25 * (r - 4.62) ** 4 / 0.8**4 - (r - 4.62) ** 2 / 0.8**2)


def double_well(h: float, w: float) -> Energy:
    return lambda r: h * (1 - (r - R0 - w) ** 2 / w**2) ** 2


@dataclass(frozen=True)
class Definition:
    """Pair energies in ε as a function of r in σ; pairs of the first ``n_solute`` particles have no periodic images."""

    name: str
    n: int
    n_solute: int
    edge: float
    epsilon: float
    solvent: Energy
    solute: Callable[[int, int], list[Energy]]
    planar: bool = False

    def energy_and_forces(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """kJ/mol and kJ/mol/nm ``[n, 3]`` at ``x`` in nm; the derivative of every pair energy by a complex step."""
        y, total, forces = x / SIGMA, 0.0, np.zeros_like(x)
        for i in range(self.n):
            for some, terms in self.groups(i):
                d = y[i] - y[some]
                if some[0] >= self.n_solute:
                    d = d - self.edge * np.round(d / self.edge)
                r = np.linalg.norm(d, axis=1)
                for term in terms:
                    value = term(r + 1e-30j)
                    total += value.real.sum()
                    push = -(value.imag / 1e-30 / r)[:, None] * d
                    forces[i] += push.sum(axis=0)
                    forces[some] -= push
        return total * self.epsilon, forces * self.epsilon / SIGMA

    def groups(self, i: int) -> list[tuple[np.ndarray, list[Energy]]]:
        """Partners after ``i`` and the terms they share with it."""
        inside = [(np.array([j]), self.solute(i, j)) for j in range(i + 1, self.n_solute)]
        outside = np.arange(max(i + 1, self.n_solute), self.n)
        return inside + ([(outside, [self.solvent])] if len(outside) else [])


def in_chain(i: int, j: int) -> list[Energy]:
    terms = [spring(1.0)] if j - i == 1 else [spring(1.63)] if j - i == 2 else [switched]
    return [*terms, ends] if (i, j) == (0, 8) else terms


DEFINITIONS = (
    Definition("polymer_in_solvent", 209, 9, (200 / 0.48) ** (1 / 3), KT / 1.3, switched, in_chain),
    Definition("wca_dimer_2d", 100, 2, 15.0, KT, wca, lambda _i, _j: [double_well(2, 2)], planar=True),
    Definition("wca_dimer_3d", 216, 2, (216 / 0.96) ** (1 / 3), KT * 0.4, wca, lambda _i, _j: [double_well(5 * 0.824, R0 / 2)]),
)


def stored(name: str) -> tuple[np.ndarray, openmm.System]:
    folder = Path("systems") / name
    x = app.PDBFile(str(folder / "topology.pdb")).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return x, openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())


def configurations(one: Definition, x: np.ndarray) -> list[np.ndarray]:
    """The stored configuration, disturbed ones, and one with solvent moved by whole boxes and the solute stretched across them."""
    rng, out = np.random.default_rng(1), [x]
    for scale in (0.003, 0.01, 0.05):
        out.append(x + rng.normal(scale=scale, size=x.shape) * [1, 1, not one.planar])
    moved = out[1].copy()
    moved[one.n_solute :] += one.edge * SIGMA * rng.integers(-2, 3, size=(one.n - one.n_solute, 3)) * [1, 1, not one.planar]
    moved[1 : one.n_solute, 0] += 0.02
    return [*out, moved]


def check(one: Definition) -> None:
    x, system = stored(one.name)
    assert (one.n, one.edge * SIGMA) == (len(x), pytest.approx(system.getDefaultPeriodicBoxVectors()[0][0]._value))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for positions in configurations(one, x):
        context.setPositions(positions)
        state = context.getState(energy=True, forces=True)
        energy, forces = one.energy_and_forces(positions)
        assert state.getPotentialEnergy()._value == pytest.approx(energy, rel=1e-9)
        np.testing.assert_allclose(state.getForces(asNumpy=True)._value, forces, rtol=1e-7, atol=1e-7 * np.abs(forces).max())
        if one.planar:
            assert (state.getForces(asNumpy=True)._value[:, 2] == 0).all()


@pytest.mark.parametrize("one", DEFINITIONS, ids=lambda one: one.name)
def test_energies_and_forces_are_those_of_the_definition(one: Definition) -> None:
    check(one)


@pytest.mark.parametrize("one", DEFINITIONS, ids=lambda one: one.name)
def test_a_solvent_a_little_stiffer_is_noticed(one: Definition) -> None:
    wrong = Definition(one.name, one.n, one.n_solute, one.edge, one.epsilon, lambda r: 1.0001 * one.solvent(r), one.solute, one.planar)
    with pytest.raises(AssertionError):
        check(wrong)


@pytest.mark.parametrize("one", DEFINITIONS, ids=lambda one: one.name)
def test_a_solute_with_one_term_too_many_is_noticed(one: Definition) -> None:
    def solute(i: int, j: int) -> list[Energy]:
        return [*one.solute(i, j), *([one.solvent] if (i, j) == (0, 1) else [])]

    with pytest.raises(AssertionError):
        check(Definition(one.name, one.n, one.n_solute, one.edge, one.epsilon, one.solvent, solute, one.planar))


def test_the_wells_of_the_dimers_are_where_they_should_be() -> None:
    for one, h, w in ((DEFINITIONS[1], 2.0, 2.0), (DEFINITIONS[2], 5 * 0.824, R0 / 2)):
        bond = one.solute(0, 1)[0]
        np.testing.assert_allclose(bond(np.array([R0, R0 + w, R0 + 2 * w])), [0, h, 0], atol=1e-12)
