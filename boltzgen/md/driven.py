"""Driven paths in OpenMM: the atoms of a solute are moved along a given way while the solvent follows its dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openmm
import torch
from torch import Tensor

from boltzgen.cvs import CollectiveVariables
from boltzgen.errors import InputError, ShapeError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.path_engine import Conditions, PathEngine, Slot, at_fixed_volume
from boltzgen.md.path_integrator import SteeringIntegrator
from boltzgen.md.platforms import PlatformChoice, ResolvedPlatform
from boltzgen.paths import PathResult, PathWalkers, Schedule


class DrivenIntegrator(SteeringIntegrator):
    """O½ V½ R½ [solute: x(k) → x(k+1)] R½ V½ O½ of the other atoms, with the heat of their O in ``path_heat`` (kJ/mol).

    Driven atoms stand at from + way · (M h(k/K) − leg) on leg number ``leg`` of M straight legs. They have no velocity, feel no force and
    get no noise. With nothing driven it is plain dynamics of all atoms.

    Args:
        temperature_kelvin: T.
        timestep_ps: h.
        friction_per_ps: γ.
        constrained: Whether the system has constraints.
        planar: Whether noise along z is left out.
    """

    def __init__(self, *, temperature_kelvin: float, timestep_ps: float, friction_per_ps: float, constrained: bool, planar: bool) -> None:
        super().__init__(temperature_kelvin=temperature_kelvin, timestep_ps=timestep_ps, friction_per_ps=friction_per_ps, n_variables=0,
                         constrained=constrained, planar=planar)  # fmt: skip
        for name in ("legs", "leg"):
            self.addGlobalVariable(f"path_{name}", 0)
        for name in ("free", "from", "way"):
            self.addPerDofVariable(f"path_{name}", 1)

    def release(self, driven: np.ndarray) -> None:
        """Let all atoms move but the ``driven`` ones (bool ``[n]``)."""
        plane = 0.0 if self.planar else 1.0
        self.setPerDofVariableByName("path_free", [openmm.Vec3(free, free, free) for free in (~driven).astype(float)])
        if self.friction_per_ps > 0:
            self.setPerDofVariableByName("path_moves", [openmm.Vec3(free, free, plane * free) for free in (~driven).astype(float)])

    def enter(self, leg: int, start: np.ndarray, way: np.ndarray) -> None:
        """Go on along another leg, from ``start`` over ``way``, both ``[n, 3]`` with zeros for atoms that are not driven."""
        self.setGlobalVariableByName("path_leg", leg)
        self.setPerDofVariableByName("path_from", start)
        self.setPerDofVariableByName("path_way", way)

    def _kick(self) -> None:
        self.addComputePerDof("v", "v + path_free*0.5*dt*f/m")
        self._project()

    def _advance(self) -> None:
        super()._advance()
        self.addComputePerDof("x", "select(path_free, x, path_from + path_way*(path_legs*path_progress - path_leg))")


@dataclass(frozen=True)
class _Ways:
    """Corners ``[m + 1, k, 3]`` of the way of the driven atoms in one path; with no atoms it is free."""

    atoms: np.ndarray
    corners: np.ndarray
    schedule: Schedule
    n_steps: int

    def legs(self) -> np.ndarray:
        """Leg on which each step ends, ``[K]``."""
        s = torch.arange(1, self.n_steps + 1, dtype=torch.float64) / self.n_steps
        last = len(self.corners) - 2
        return (self.schedule.fraction(s) * (last + 1)).floor().clamp(0, last).to(torch.int64).numpy()


class DrivenSteering(PathEngine[_Ways]):
    """Engine that drives the atoms of a solute along given ways, the solvent following, in an OpenMM system at fixed volume.

    The work of a path is U(x_K) − U(x_0) + ΔKE − Q with the kinetic energy and the heat of the atoms that are not driven, from energies of
    the full system: it holds the error of the time step, and moves are exact at any time step. ``roam`` moves all atoms. In a periodic box
    a solute must be whole: its bonds are not broken by the box.

    Args:
        system: The system; copied, without barostats, thermostats and motion removers.
        solute: Indices of the driven atoms, in the order in which their ways are given.
        variables: ξ, which is only recorded.
        temperature_kelvin: T in kelvin.
        positions: ``[n, 3]`` in nm, on which platforms are timed.
        timestep_ps: h in ps. Bonds of the solute do not limit it while the solute is driven.
        friction_per_ps: γ in 1/ps, 0 for deterministic paths.
        platform: What the user asks of the platform.
        box: Box vectors ``[3, 3]`` in nm; those of a periodic system by default.
        planar: Whether the system lives in the plane z = 0 and nothing may leave it.
        seed: Goes into the noise of paths with friction, beside the first velocities that a context is given.

    Attributes:
        solute: The driven atoms.
        n_failures: Paths that blew up so far.

    Raises:
        InputError: If a number makes no sense, the solute has constraints or atoms that do not exist, or there are virtual sites.
        PlatformError: If the platform cannot be used.
    """

    def __init__(
        self,
        system: openmm.System,
        solute: Sequence[int],
        variables: CollectiveVariables,
        *,
        temperature_kelvin: float,
        positions: np.ndarray,
        timestep_ps: float,
        friction_per_ps: float = 0.0,
        platform: PlatformChoice | ResolvedPlatform = PlatformChoice(),  # noqa: B008
        box: np.ndarray | None = None,
        planar: bool = False,
        seed: int = 0,
    ) -> None:
        system, self.notes = at_fixed_volume(
            system, positions, temperature_kelvin=temperature_kelvin, timestep_ps=timestep_ps, friction_per_ps=friction_per_ps, box=box
        )
        self.solute = _checked_solute(system, solute)
        super().__init__(
            system, variables, temperature_kelvin=temperature_kelvin, positions=positions, timestep_ps=timestep_ps,
            friction_per_ps=friction_per_ps, platform=platform, box=box, planar=planar, seed=seed,
        )  # fmt: skip

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedSystem,
        solute: Sequence[int],
        variables: CollectiveVariables,
        *,
        temperature_kelvin: float,
        timestep_ps: float,
        friction_per_ps: float = 0.0,
        platform: PlatformChoice = PlatformChoice(),  # noqa: B008
        planar: bool = False,
    ) -> DrivenSteering:
        """The engine of a loaded system (see :func:`boltzgen.md.loading.load`)."""
        return cls(loaded.system, solute, variables, temperature_kelvin=temperature_kelvin, positions=loaded.positions,
                   timestep_ps=timestep_ps, friction_per_ps=friction_per_ps, platform=platform, box=loaded.box, planar=planar)  # fmt: skip

    @property
    def _slot(self) -> type[_DrivenSlot]:
        return _DrivenSlot

    def _free(self, n_steps: int) -> _Ways:
        return _Ways(np.zeros(0, dtype=np.int64), np.zeros((2, 0, 3)), schedule=Schedule(n_steps), n_steps=n_steps)

    def drive(self, walkers: PathWalkers, corners: Tensor, *, steps: Tensor, schedule: Schedule, generator: torch.Generator) -> PathResult:
        """Paths from fresh Maxwell velocities of the solvent while the solute follows the ``corners`` ``[w, m + 1, k, 3]`` in nm.

        ``steps`` ``[w]`` is K of every path.

        Raises:
            ShapeError: If the corners are not those of this solute.
        """
        if corners.ndim != 4 or len(corners) != len(walkers.x) or tuple(corners.shape[2:]) != (len(self.solute), 3):
            raise ShapeError(f"expected ways [{len(walkers.x)}, m + 1, {len(self.solute)}, 3] of the solute, got {list(corners.shape)}")
        plans = [
            _Ways(np.array(self.solute), corners[i].to(torch.float64).numpy(), schedule=schedule, n_steps=int(steps[i]))
            for i in range(len(corners))
        ]
        return self._run(walkers, plans, generator=generator, still=self.solute)


class _DrivenSlot(Slot[_Ways]):
    """One context whose integrator drives some of the atoms."""

    _integrator: DrivenIntegrator

    def _new_integrator(self, temperature_kelvin: float) -> DrivenIntegrator:
        return DrivenIntegrator(temperature_kelvin=temperature_kelvin, timestep_ps=0.001, friction_per_ps=self._friction,
                                constrained=self._constrained, planar=self._planar)  # fmt: skip

    def _walked(self, context: openmm.Context, plan: _Ways, *, timestep_ps: float, conditions: Conditions) -> bool:
        n, none = self._system.getNumParticles(), np.zeros(0)
        self._integrator.begin(
            none, none, schedule=plan.schedule, n_steps=plan.n_steps, temperature_kelvin=conditions.temperature_kelvin,
            timestep_ps=timestep_ps, n_particles=n,
        )  # fmt: skip
        driven = np.zeros(n, dtype=bool)
        driven[plan.atoms] = True
        self._integrator.release(driven)
        self._integrator.setGlobalVariableByName("path_legs", len(plan.corners) - 1)
        legs = plan.legs()
        for leg, n_steps in zip(*np.unique(legs, return_counts=True), strict=True):
            start, way = np.zeros((n, 3)), np.zeros((n, 3))
            start[plan.atoms] = plan.corners[leg]
            way[plan.atoms] = plan.corners[leg + 1] - plan.corners[leg]
            self._integrator.enter(int(leg), start, way)
            if not self._stepped(int(n_steps)):
                return False
        return True


def _checked_solute(system: openmm.System, solute: Sequence[int]) -> tuple[int, ...]:
    atoms, n = [int(atom) for atom in solute], system.getNumParticles()
    if len(atoms) < 3 or len(set(atoms)) < len(atoms) or min(atoms) < 0 or max(atoms) >= n:
        raise InputError(f"expected at least three different atoms of the solute, from 0 to {n - 1}, got {atoms[:20]}")
    inside = set(atoms)
    for i in range(system.getNumConstraints()):
        a, b, _ = system.getConstraintParameters(i)
        if a in inside or b in inside:
            raise InputError(f"atoms {a} and {b} are constrained, and a driven solute is moved as a whole: make the system with "
                             "constraints=None for the solute (rigidWater=True may stay), or leave it out of the solute")  # fmt: skip
    return tuple(atoms)
