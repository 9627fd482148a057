"""Two particles in vacuum whose distance has two wells, with the exact distribution of that distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.cvs import Distance
from boltzgen.units import thermal_energy

MASS, TRAP = 2.0, 100.0
#: Wells at 0.2 and 0.4 nm with a barrier of BARRIER between them, in kJ/mol.
MIDDLE, HALF, BARRIER = 0.3, 0.1, 15.0
BOND = Distance("bond", (0, 1))


@dataclass(frozen=True)
class Dimer:
    """A dimer at a temperature in kelvin, its bond pulled by ``tilt`` kJ/mol/nm."""

    temperature_kelvin: float = 300.0
    tilt: float = 0.0

    @property
    def system(self) -> openmm.System:
        """Its system; the global parameter ``tilt`` is 0 by default."""
        system = openmm.System()
        for _ in range(2):
            system.addParticle(MASS)
        bond = openmm.CustomBondForce(f"{BARRIER}*(((r-{MIDDLE})/{HALF})^2-1)^2 - tilt*r")
        bond.addGlobalParameter("tilt", 0.0)
        bond.addBond(0, 1)
        trap = openmm.CustomExternalForce(f"0.5*{TRAP}*(x^2+y^2+z^2)")
        for i in range(2):
            trap.addParticle(i)
        system.addForce(bond)
        system.addForce(trap)
        return system

    @property
    def topology(self) -> app.Topology:
        """Two atoms with a bond."""
        topology = app.Topology()
        residue = topology.addResidue("DIM", topology.addChain())
        topology.addBond(*(topology.addAtom(name, app.element.neon, residue) for name in ("A", "B")))
        return topology

    def distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances ``[g]`` in nm and their probabilities: p(r) ∝ r² exp(−β(U(r) + k r²/4))."""
        r = np.linspace(0.0, 0.8, 8001)[1:]
        energy = BARRIER * (((r - MIDDLE) / HALF) ** 2 - 1) ** 2 - self.tilt * r + 0.25 * TRAP * r**2
        p = r**2 * np.exp(-energy / thermal_energy(self.temperature_kelvin))
        return r, p / p.sum()

    def expected(self) -> np.ndarray:
        """Exact means of :func:`observables`."""
        r, p = self.distribution()
        return observables(r).T @ p

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Configurations ``[n, 2, 3]`` in nm."""
        r, p = self.distribution()
        way = rng.normal(size=(n, 3))
        way *= (np.interp(rng.random(n), p.cumsum(), r) / np.linalg.norm(way, axis=1))[:, None]
        centre = rng.normal(size=(n, 3)) * np.sqrt(0.5 * thermal_energy(self.temperature_kelvin) / TRAP)
        return np.stack([centre - 0.5 * way, centre + 0.5 * way], axis=1)


def observables(r: np.ndarray) -> np.ndarray:
    """Distance, its square, and whether it is beyond the barrier: ``[n, 3]``."""
    return np.stack([r, r**2, (r > MIDDLE).astype(float)], axis=1)


def distances(x: np.ndarray) -> np.ndarray:
    """Distances ``[n]`` of configurations ``[n, 2, 3]``."""
    return np.linalg.norm(x[:, 1] - x[:, 0], axis=-1)


def positions(x: np.ndarray) -> unit.Quantity:
    """The same as an OpenMM quantity."""
    return x * unit.nanometer
