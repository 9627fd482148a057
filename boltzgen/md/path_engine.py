"""Paths of many walkers on a pool of OpenMM contexts: what steering and driving share."""

from __future__ import annotations

import itertools
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from boltzgen.cvs import CollectiveVariables
from boltzgen.errors import EnergyError, InputError, PlatformError, ShapeError
from boltzgen.md.loading import without_couplings
from boltzgen.md.path_integrator import SteeringIntegrator
from boltzgen.md.path_pool import Pool
from boltzgen.md.platforms import PlatformChoice, ResolvedPlatform, choose_platform
from boltzgen.paths import PathResult, PathWalkers
from boltzgen.units import thermal_energy

#: Constraints are solved to this, or to what single precision can resolve.
TOLERANCE, SINGLE_TOLERANCE = 1e-8, 1e-6

#: A path that leaves constraints unsatisfied by this many times the tolerance has failed: OpenMM's solvers may give up silently.
_UNSOLVED = 1000

#: Steps between looks at whether the run was asked to stop.
_PIECE = 2000


@dataclass(frozen=True)
class Conditions:
    """Under which paths run: the temperature, the box vectors ``[3, 3]`` in nm (None: the system's), and global parameters."""

    temperature_kelvin: float
    box: np.ndarray | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)

    def apply(self, context: openmm.Context) -> None:
        if self.box is not None:
            context.setPeriodicBoxVectors(*self.box)
        for name, value in self.parameters.items():
            context.setParameter(name, value)


@dataclass(frozen=True)
class Path:
    """End of a path, its potential energy, and the kinetic energy gained less the heat, in kJ/mol."""

    x: np.ndarray
    energy: float
    kinetic: float

    @property
    def is_finite(self) -> bool:
        """Whether it is made of numbers."""
        return bool(np.isfinite(self.x).all()) and math.isfinite(self.energy) and math.isfinite(self.kinetic)


class Plan(Protocol):
    """One path: how many steps, and whatever else the integrator needs."""

    @property
    def n_steps(self) -> int:
        """K."""


#: What the paths of an engine are made from.
P = TypeVar("P", bound=Plan)


class PathEngine(ABC, Generic[P]):
    """Paths of many walkers on a pool of contexts, at fixed volume: what steering and driving share.

    Args:
        system: The system with all forces of the paths; see :func:`at_fixed_volume`.
        variables: ξ.
        temperature_kelvin: T in kelvin.
        positions: ``[n, 3]`` in nm, on which platforms are timed.
        timestep_ps: h in ps.
        friction_per_ps: γ in 1/ps.
        platform: What the user asks of the platform, or the one to take.
        box: Box vectors ``[3, 3]`` in nm, or None.
        planar: Whether nothing may leave the plane z = 0.
        seed: Goes into the noise of paths with friction, beside the first velocities that a context is given.
        energy_groups: Bits of the force groups that make up the energy.
    """

    def __init__(
        self,
        system: openmm.System,
        variables: CollectiveVariables,
        *,
        temperature_kelvin: float,
        positions: np.ndarray,
        timestep_ps: float,
        friction_per_ps: float,
        platform: PlatformChoice | ResolvedPlatform,
        box: np.ndarray | None,
        planar: bool,
        seed: int,
        energy_groups: int = 0xFFFFFFFF,
    ) -> None:
        n = system.getNumParticles()
        self.variables, self.event_shape = variables, (n, 3)
        self.timestep_ps, self.planar, self._conditions = float(timestep_ps), planar, Conditions(float(temperature_kelvin))
        self.n_failures = 0
        resolved = platform if isinstance(platform, ResolvedPlatform) else choose_platform(
            system, np.asarray(positions, dtype=np.float64), choice=platform, box=box
        )  # fmt: skip
        masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(n)])
        devices = resolved.properties.get("DeviceIndex", "").split(",")
        slots = [
            self._slot(
                system, resolved.name, dict(resolved.properties) | ({"DeviceIndex": devices[i % len(devices)]} if len(devices) > 1 else {}),
                masses=masses, friction_per_ps=float(friction_per_ps),
                n_variables=len(variables), planar=planar, energy_groups=energy_groups, seed=seed + i,
            )
            for i in range(resolved.contexts)
        ]  # fmt: skip
        self._pool: Pool[Slot[P]] = Pool(slots, serial=resolved.name == "Reference" or len(slots) == 1)
        self.platform_name = resolved.name

    @property
    @abstractmethod
    def _slot(self) -> type[Slot[P]]:
        """What runs one path."""

    @abstractmethod
    def _free(self, n_steps: int) -> P:
        """A path of all atoms without restraint."""

    @property
    def temperature_kelvin(self) -> float:
        """T in kelvin."""
        return self._conditions.temperature_kelvin

    @property
    def constraint_tolerance(self) -> float:
        """To which constraints are solved."""
        return self._pool.slots[0].tolerance

    @property
    def n_contexts(self) -> int:
        """Paths that run at the same time."""
        return len(self._pool.slots)

    @torch.no_grad()
    def locate(self, x: Tensor) -> PathWalkers:
        """Walkers at ``x`` ``[w, n, 3]`` in nm, moved onto the constraints where they are off.

        Raises:
            EnergyError: If a walker has no finite energy.
        """
        rows = self._rows(x)
        found = self._pool.map(lambda slot, row: slot.place(rows[row], self._conditions), len(rows))
        placed = torch.from_numpy(np.stack([positions for positions, _ in found]))
        u = torch.tensor([energy for _, energy in found], dtype=torch.float64) / thermal_energy(self.temperature_kelvin)
        if not bool(torch.isfinite(u).all()):
            raise EnergyError(f"walkers {torch.nonzero(~torch.isfinite(u)).flatten().tolist()} start where the energy is not finite; "
                              "minimise the start, or check it with `boltzgen check`")  # fmt: skip
        return PathWalkers(x=placed, u=u, xi=self.variables(placed))

    def roam(self, walkers: PathWalkers, *, n_steps: int, generator: torch.Generator) -> PathResult:
        """Paths without restraint, of all atoms."""
        return self._run(walkers, [self._free(n_steps)] * len(walkers.x), generator=generator)

    def close(self) -> None:
        """Free the contexts."""
        self._pool.close()

    def _rows(self, x: Tensor) -> np.ndarray:
        if tuple(x.shape[1:]) != self.event_shape:
            raise ShapeError(f"expected configurations [w, {self.event_shape[0]}, 3] in nm, got {list(x.shape)}")
        return np.ascontiguousarray(x.detach().to(device="cpu", dtype=torch.float64).numpy())

    def _run(self, walkers: PathWalkers, plans: Sequence[P], *, generator: torch.Generator, still: Sequence[int] = ()) -> PathResult:
        """Paths, without a restraint's part of the work; atoms ``still`` have no velocities."""
        rows, kt = self._rows(walkers.x), thermal_energy(self.temperature_kelvin)
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).numpy()
        if self.planar:
            noise[:, :, 2] = 0.0
        noise[:, list(still)] = 0.0
        found = self._pool.map(
            lambda slot, row: slot.run(rows[row], noise[row], plans[row], timestep_ps=self.timestep_ps, conditions=self._conditions),
            len(rows),
        )
        x, work, u, failures = walkers.x.clone(), torch.full((len(rows),), torch.inf, dtype=torch.float64), walkers.u.clone(), {}
        for row, path in enumerate(found):
            if isinstance(path, str):
                failures[row] = path
                continue
            x[row] = torch.from_numpy(path.x)
            u[row] = path.energy / kt
            work[row] = u[row] - walkers.u[row] + path.kinetic / kt
        self.n_failures += len(failures)
        n_force = torch.tensor([plan.n_steps + 2 for plan in plans], dtype=torch.int64)
        return PathResult(x=x, u=u, xi=self.variables(x), work=work, n_force=n_force, failures=failures)


class Slot(ABC, Generic[P]):
    """One context with its integrator, made when first needed and made again after it failed."""

    def __init__(
        self, system: openmm.System, platform_name: str, properties: dict[str, str], *, masses: np.ndarray, friction_per_ps: float,
        n_variables: int, planar: bool, energy_groups: int, seed: int,
    ) -> None:  # fmt: skip
        self._system, self._platform_name, self._properties = system, platform_name, properties
        self._masses, self._friction = masses[:, None], friction_per_ps
        self._n_variables, self._planar, self._groups, self._seed = n_variables, planar, energy_groups, seed
        self._constrained = system.getNumConstraints() > 0
        self.tolerance = SINGLE_TOLERANCE if properties.get("Precision") == "single" else TOLERANCE
        pairs = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
        self._ends = np.array([pair[:2] for pair in pairs], dtype=np.int64).reshape(-1, 2)
        self._lengths = np.array([pair[2].value_in_unit(unit.nanometer) for pair in pairs])
        self._slowness = np.where(masses > 0, 1 / np.sqrt(np.where(masses > 0, masses, 1.0)), 0.0)[:, None]
        self._context: openmm.Context | None = None
        self._seeded = False
        self.stopped = False

    def free(self) -> None:
        """Let go of the context."""
        self._context = None

    def parameter_names(self) -> list[str]:
        """Global parameters of the context."""
        return list(self._ready(Conditions(1.0)).getParameters())

    def place(self, x: np.ndarray, conditions: Conditions) -> tuple[np.ndarray, float]:
        """Positions on the constraints, and their energy in kJ/mol without restraint."""
        context = self._ready(conditions)
        context.setPositions(x)
        if self._constrained:
            context.applyConstraints(self.tolerance)
        state = context.getState(positions=True, energy=True, groups=self._groups)
        return _positions(state), state.getPotentialEnergy()._value

    def run(self, x: np.ndarray, noise: np.ndarray, plan: P, *, timestep_ps: float, conditions: Conditions) -> Path | str:
        """One path, or why it failed."""
        context = self._ready(conditions)
        try:
            if self._friction > 0 and not self._seeded:
                self._seed_from(noise, context, conditions)
            context.setPositions(x)
            v = noise * self._slowness * math.sqrt(thermal_energy(conditions.temperature_kelvin))
            context.setVelocities(v)
            if self._constrained:
                context.applyVelocityConstraints(self.tolerance)
                v = _velocities(context.getState(velocities=True))
            self._begun = v
            if not self._walked(context, plan, timestep_ps=timestep_ps, conditions=conditions):
                return "stopped"
            path = self._so_far(context)
        except openmm.OpenMMException as error:
            self._context = None
            return str(error)
        if not path.is_finite:
            self._context = None
            return "coordinates or energies are not numbers"
        if self._constrained and self._unsolved(path.x) > _UNSOLVED * self.tolerance:
            return "constraints could not be satisfied"
        return path

    def _unsolved(self, x: np.ndarray) -> float:
        """Largest relative error of a constraint."""
        first, second = self._ends.T
        return float(np.abs(np.linalg.norm(x[second] - x[first], axis=1) / self._lengths - 1).max())

    def _seed_from(self, noise: np.ndarray, context: openmm.Context, conditions: Conditions) -> None:
        """Seed the noise along paths by that of the velocities: no resume and no failure repeats it."""
        self._integrator.setRandomNumberSeed(1 + (zlib.crc32(noise.tobytes()) ^ self._seed) % (2**31 - 2))
        context.reinitialize()
        conditions.apply(context)
        self._seeded = True

    def _so_far(self, context: openmm.Context) -> Path:
        """What the present path has become."""
        state = context.getState(positions=True, velocities=True, energy=True, groups=self._groups)
        heat = self._integrator.getGlobalVariableByName("path_heat") if self._friction > 0 else 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # of a path that blew up
            kinetic = 0.5 * float((self._masses * (_velocities(state) ** 2 - self._begun**2)).sum()) - heat
        return Path(_positions(state), state.getPotentialEnergy()._value, kinetic)

    @abstractmethod
    def _walked(self, context: openmm.Context, plan: P, *, timestep_ps: float, conditions: Conditions) -> bool:
        """Run a path from where the context is; False if it was asked to stop."""

    def _stepped(self, n_steps: int, *, looks: Sequence[int] = (), look: Callable[[], None] = lambda: None) -> bool:
        """Run the steps in pieces, with a look after some; False if asked to stop."""
        for begin, end in itertools.pairwise(sorted({*range(0, n_steps, _PIECE), *looks, n_steps})):
            if self.stopped:
                return False
            self._integrator.step(end - begin)
            if end in looks:
                look()
        return True

    def _new_integrator(self, temperature_kelvin: float) -> SteeringIntegrator:
        return SteeringIntegrator(
            temperature_kelvin=temperature_kelvin, timestep_ps=0.001, friction_per_ps=self._friction,
            n_variables=self._n_variables, constrained=self._constrained, planar=self._planar,
        )  # fmt: skip

    def _ready(self, conditions: Conditions) -> openmm.Context:
        if self._context is None:
            integrator = self._integrator = self._new_integrator(conditions.temperature_kelvin)
            integrator.setConstraintTolerance(self.tolerance)
            integrator.setRandomNumberSeed(self._seed + 1)  # a context on the Reference platform seeds the noise of all others there
            self._seeded = False
            try:
                platform = openmm.Platform.getPlatformByName(self._platform_name)
                self._context = openmm.Context(self._system, integrator, platform, self._properties)
            except openmm.OpenMMException as error:
                raise PlatformError(f"platform {self._platform_name} cannot run steered paths of this system: {error}") from error
        conditions.apply(self._context)
        return self._context


def at_fixed_volume(
    system: openmm.System, positions: np.ndarray, *, temperature_kelvin: float, timestep_ps: float, friction_per_ps: float,
    box: np.ndarray | None,
) -> tuple[openmm.System, tuple[str, ...]]:  # fmt: skip
    """A copy of a system as paths run it, without barostats, thermostats and motion removers, and what was left out.

    Raises:
        InputError: If a number makes no sense, or the system has virtual sites.
        ShapeError: If the positions are of another system.
    """
    system, notes = without_couplings(system)
    if box is not None and system.usesPeriodicBoundaryConditions():
        system.setDefaultPeriodicBoxVectors(*np.asarray(box, dtype=np.float64))
    n = system.getNumParticles()
    if np.shape(positions) != (n, 3):
        raise ShapeError(f"expected positions [{n}, 3] in nm for this system, got {list(np.shape(positions))}")
    if not (timestep_ps > 0 and friction_per_ps >= 0 and temperature_kelvin > 0):
        raise InputError(f"expected positive temperature and time step and a friction of 0 or more, got {temperature_kelvin} K, "
                         f"{timestep_ps} ps and {friction_per_ps} /ps")  # fmt: skip
    if any(system.isVirtualSite(i) for i in range(n)):
        raise InputError("the system has virtual sites, which steered paths do not move yet: use a water model without them (TIP3P)")
    return system, notes


def _positions(state: openmm.State) -> np.ndarray:
    return state.getPositions(asNumpy=True)._value


def _velocities(state: openmm.State) -> np.ndarray:
    return state.getVelocities(asNumpy=True)._value
