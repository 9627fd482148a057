"""The palindromic integrator of steered paths."""

from __future__ import annotations

import math

import numpy as np
import openmm

from boltzgen.md.cv_forces import center_name
from boltzgen.paths import Schedule
from boltzgen.units import thermal_energy


class SteeringIntegrator(openmm.CustomIntegrator):
    """O½ V½ R½ [λ_k → λ_{k+1}] R½ V½ O½, with the path_heat Q of all O in the global variable ``heat`` (kJ/mol).

    O½ is v ← c v + √((1 − c²) kT/m) η with c = e^{−γh/2}, left out where γ = 0. With constraints, velocities are projected after every O,
    V and R, and R½ is one RATTLE step. The centres λ are context parameters that follow λ₀ + Δ (s + c sin(2πs)/(2π)), s = k/K. Nothing
    updates the context state: no barostat or motion remover acts within a path.

    Args:
        temperature_kelvin: T.
        timestep_ps: h.
        friction_per_ps: γ.
        n_variables: Number of restrained variables.
        constrained: Whether the system has constraints.
        planar: Whether noise along z is left out.
    """

    def __init__(
        self, *, temperature_kelvin: float, timestep_ps: float, friction_per_ps: float, n_variables: int, constrained: bool, planar: bool
    ) -> None:
        super().__init__(timestep_ps)
        self.friction_per_ps, self.constrained, self.n_variables, self.planar = friction_per_ps, constrained, n_variables, planar
        for name in ("step_number", "n_steps", "bend", "progress", "heat", "before", "after"):
            self.addGlobalVariable(f"path_{name}", 0)
        for i in range(n_variables):
            self.addGlobalVariable(f"path_start_{i}", 0)
            self.addGlobalVariable(f"path_way_{i}", 0)
        if constrained:
            self.addPerDofVariable("path_x_free", 0)
        if friction_per_ps > 0:
            self.addGlobalVariable("path_kt", thermal_energy(temperature_kelvin))
            self.addGlobalVariable("path_kept", 1)
            self.addPerDofVariable("path_moves", 1)
        self._thermalise()
        self._kick()
        if constrained:
            self._drift("0.5*dt")
            self._advance()
            self._drift("0.5*dt")
        else:  # both halves are one: no force is asked for in between
            self._advance()
            self._drift("dt")
        self._kick()
        self._thermalise()

    def begin(
        self, start: np.ndarray, way: np.ndarray, *, schedule: Schedule, n_steps: int, temperature_kelvin: float, timestep_ps: float,
        n_particles: int,
    ) -> None:  # fmt: skip
        """Set up one path of ``n_steps`` from ``start`` over ``way`` ``[k]``."""
        self.setStepSize(timestep_ps)
        values = {"path_step_number": 0, "path_n_steps": n_steps, "path_bend": schedule.bend, "path_heat": 0}
        values |= {f"path_start_{i}": a for i, a in enumerate(start)} | {f"path_way_{i}": d for i, d in enumerate(way)}
        if self.friction_per_ps > 0:
            values["path_kt"] = thermal_energy(temperature_kelvin)
            values["path_kept"] = math.exp(-0.5 * self.friction_per_ps * timestep_ps)
            if self.planar:
                self.setPerDofVariableByName("path_moves", [openmm.Vec3(1, 1, 0)] * n_particles)
        for name, value in values.items():
            self.setGlobalVariableByName(name, float(value))

    def _thermalise(self) -> None:
        if self.friction_per_ps == 0:
            return
        self.addComputeSum("path_before", "0.5*m*v*v")
        self.addComputePerDof("v", "path_kept*v + path_moves*sqrt((1-path_kept*path_kept)*path_kt/m)*gaussian")
        self._project()
        self.addComputeSum("path_after", "0.5*m*v*v")
        self.addComputeGlobal("path_heat", "path_heat + path_after - path_before")

    def _kick(self) -> None:
        self.addComputePerDof("v", "v + 0.5*dt*f/m")
        self._project()

    def _drift(self, length: str) -> None:
        self.addComputePerDof("x", f"x + {length}*v")
        if self.constrained:
            self.addComputePerDof("path_x_free", "x")
            self.addConstrainPositions()
            self.addComputePerDof("v", f"v + (x - path_x_free)/({length})")
            self._project()

    def _project(self) -> None:
        if self.constrained:
            self.addConstrainVelocities()

    def _advance(self) -> None:
        self.addComputeGlobal("path_step_number", "path_step_number + 1")
        self.addComputeGlobal("path_progress", f"s + path_bend*sin({2 * math.pi!r}*s)/{2 * math.pi!r}; s=path_step_number/path_n_steps")
        for i in range(self.n_variables):
            self.addComputeGlobal(center_name(i), f"path_start_{i} + path_way_{i}*path_progress")
