"""Generalised hybrid Monte Carlo in a window: exact at any time step, with the memory of velocities that makes it as quick as dynamics."""

from __future__ import annotations

import copy

import numpy as np
import openmm
from polymer_liquid import KT, PolymerLiquid
from umbrella import Distance

#: Steps of one trajectory.
LENGTH = 12


class HybridWalker:
    """One configuration in an umbrella window that can be moved from window to window.

    Velocities are kept in part, v ← c v + √(1 − c²) ξ with c = exp(−friction · time); then ``LENGTH`` steps of velocity Verlet, accepted
    with min(1, exp(−ΔH)); on rejection the old positions and the reversed velocities. The density of the configurations is exact whatever
    the time step (A. M. Horowitz, Phys. Lett. B 268, 247 (1991)). In the plane velocities have no z component.

    Attributes:
        accepted: Accepted trajectories so far.
        proposed: All trajectories so far.
        evaluations: Force evaluations so far.
    """

    def __init__(self, distance: Distance, *, seed: int) -> None:
        system, x = distance.load()
        self._distance, self._rng = distance, np.random.default_rng(seed)
        self._mass = system.getParticleMass(0)._value
        system = copy.deepcopy(system)
        window = openmm.CustomBondForce(f"{0.5 * distance.stiffness * distance.kt / distance.sigma**2!r}*(r-centre)^2")
        window.addGlobalParameter("centre", float(np.linalg.norm(x[distance.atoms[0]] - x[distance.atoms[1]])))
        window.addBond(*distance.atoms, [])
        system.addForce(window)
        self._step = distance.dt * distance.tau
        platform = openmm.Platform.getPlatformByName("CPU")
        self._context = openmm.Context(system, openmm.VerletIntegrator(self._step), platform, {"Threads": "1"})
        self._context.setPositions(x)
        openmm.LocalEnergyMinimizer.minimize(self._context, 10.0, 100)
        self._memory = np.exp(-distance.friction * distance.dt * LENGTH)
        self._x, self._f, self._u = self._read()
        self._v = self._noise()
        self.accepted = self.proposed = self.evaluations = 0

    @property
    def x(self) -> np.ndarray:
        """Positions ``[n, 3]`` in nm."""
        return self._x

    @property
    def r(self) -> float:
        """The distance in σ."""
        i, j = self._distance.atoms
        return float(np.linalg.norm(self._x[i] - self._x[j])) / self._distance.sigma

    def enter(self, k: int) -> None:
        """Go on in window ``k``."""
        self._context.setPositions(self._x)
        self._context.setParameter("centre", self._distance.centres[k] * self._distance.sigma)
        self._x, self._f, self._u = self._read()

    def move(self) -> None:
        """One trajectory, accepted or not."""
        half = 0.5 * self._step / self._mass
        v = self._memory * self._v + np.sqrt(1 - self._memory**2) * self._noise()
        self._context.setVelocities(v - half * self._f)  # the integrator's velocities are half a step behind
        self._context.getIntegrator().step(LENGTH)
        x, f, u = self._read()
        late = self._context.getState(velocities=True).getVelocities(asNumpy=True)._value + half * f
        rise = (u - self._u + 0.5 * self._mass * ((late**2).sum() - (v**2).sum())) / self._distance.kt
        if np.log(self._rng.random()) < -rise:
            self._x, self._f, self._u, self._v = x, f, u, late
            self.accepted += 1
        else:
            self._context.setPositions(self._x)
            self._v = -v
        self.proposed += 1
        self.evaluations += LENGTH + 1

    def trace(self, n: int) -> np.ndarray:
        """Distances in σ after each of ``n`` trajectories."""
        out = np.empty(n)
        for t in range(n):
            self.move()
            out[t] = self.r
        return out

    def _noise(self) -> np.ndarray:
        v = self._rng.normal(size=self._x.shape) * np.sqrt(self._distance.kt / self._mass)
        return np.asarray(v * [1, 1, 0] if self._distance.planar else v)

    def _read(self) -> tuple[np.ndarray, np.ndarray, float]:
        state = self._context.getState(positions=True, forces=True, energy=True)
        x, f = state.getPositions(asNumpy=True)._value, state.getForces(asNumpy=True)._value
        return np.array(x), np.array(f), float(state.getPotentialEnergy()._value)


class CompiledWalker:
    """The same for the polymer from compiled code, five times as fast (:class:`HybridWalker` has the algorithm and the attributes).

    Args:
        distance: That of the polymer.
        seed: Of everything random.
        liquid: The compiled code.
    """

    def __init__(self, distance: Distance, *, seed: int, liquid: PolymerLiquid | None = None) -> None:
        if distance.system != "polymer_in_solvent":
            raise ValueError(f"expected polymer_in_solvent, got {distance.system}: take the engine openmm")
        self._distance, self._rng, self._liquid = distance, np.random.default_rng(seed), liquid or PolymerLiquid()
        self._x = distance.load()[1] / distance.sigma
        self._v = self._rng.normal(size=self._x.shape) * np.sqrt(KT)
        self._centre = self.r
        self._memory = float(np.exp(-distance.friction * distance.dt * LENGTH))
        self.accepted = self.proposed = self.evaluations = 0

    @property
    def x(self) -> np.ndarray:
        """Positions ``[n, 3]`` in nm."""
        return np.asarray(self._x * self._distance.sigma)

    @property
    def r(self) -> float:
        """The distance in σ."""
        i, j = self._distance.atoms
        return float(np.linalg.norm(self._x[i] - self._x[j]))

    def enter(self, k: int) -> None:
        """Go on in window ``k``."""
        self._centre = float(self._distance.centres[k])

    def trace(self, n: int) -> np.ndarray:
        """Distances in σ after each of ``n`` trajectories."""
        self._x, self._v, distances, accepted = self._liquid.hybrid(
            self._x, self._v, n=n, length=LENGTH, step=self._distance.dt, kept=self._memory, stiffness=self._distance.stiffness * KT,
            centre=self._centre, seed=int(self._rng.integers(2**62)),
        )  # fmt: skip
        self.accepted += accepted
        self.proposed += n
        self.evaluations += n * LENGTH + 1
        if not np.isfinite(distances).all():
            raise RuntimeError(f"the distance is not a number: use a smaller time step than {self._distance.dt:g} tau")
        return distances
