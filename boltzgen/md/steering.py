"""Steered paths in OpenMM: a restraint on collective variables moves, and the work is exact."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import openmm
import torch
from torch import Tensor

from boltzgen.cvs import CollectiveVariables
from boltzgen.errors import InputError
from boltzgen.md.cv_forces import center_name, restraint_forces, stiffness_name
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.path_engine import Conditions, Path, PathEngine, Slot, at_fixed_volume
from boltzgen.md.platforms import PlatformChoice, ResolvedPlatform
from boltzgen.paths import PathFilm, PathResult, PathWalkers, Restraint, Schedule
from boltzgen.units import thermal_energy


@dataclass(frozen=True)
class Ends:
    """Where one path starts and ends, and how it gets there; with no stiffness it is free.

    After the steps of ``looks`` what it has become is kept in ``seen``; that changes nothing of the path.
    """

    start: np.ndarray
    way: np.ndarray
    schedule: Schedule
    n_steps: int
    stiffness: np.ndarray
    looks: tuple[int, ...] = ()
    seen: list[Path] = field(default_factory=list)


class _SteeredSlot(Slot[Ends]):
    """One context in which the centre of a restraint moves."""

    def _walked(self, context: openmm.Context, plan: Ends, *, timestep_ps: float, conditions: Conditions) -> bool:
        self._integrator.begin(
            plan.start, plan.way, schedule=plan.schedule, n_steps=plan.n_steps, temperature_kelvin=conditions.temperature_kelvin,
            timestep_ps=timestep_ps, n_particles=self._system.getNumParticles(),
        )  # fmt: skip
        for i in range(self._n_variables):
            context.setParameter(stiffness_name(i), plan.stiffness[i])
            context.setParameter(center_name(i), plan.start[i])
        return self._stepped(plan.n_steps, looks=plan.looks, look=lambda: plan.seen.append(self._so_far(context)))


class OpenMMSteering(PathEngine[Ends]):
    """Steering engine of an OpenMM system at fixed volume.

    Energies at both ends are those of the full system without the restraint, whose energy is computed in float64 from ξ; kinetic energies
    are float64 sums. So the work holds the shadow work of the time step, and moves are exact at any time step, to the precision of the
    platform's energies. Paths of different walkers run in parallel, each in a context of one thread or on its GPU.

    Args:
        system: The system; copied, without barostats, thermostats and motion removers.
        variables: ξ.
        temperature_kelvin: T in kelvin.
        positions: ``[n, 3]`` in nm, on which platforms are timed.
        widths: Width σ = √(kT/κ) to which every variable is held, in its unit.
        timestep_ps: h in ps.
        friction_per_ps: γ in 1/ps, 0 for deterministic paths.
        platform: What the user asks of the platform, or the one to take. A device such as ``0,1`` gives contexts to the GPUs in turn.
        box: Box vectors ``[3, 3]`` in nm; those of a periodic system by default.
        planar: Whether the system lives in the plane z = 0 and nothing may leave it.
        seed: Goes into the noise of paths with friction, beside the first velocities that a context is given.

    Attributes:
        restraint: r(ξ, λ), in kT.
        timestep_ps: h.
        n_failures: Paths that blew up so far.

    Raises:
        InputError: If a number makes no sense, an atom does not exist, or the system has virtual sites.
        PlatformError: If the platform cannot be used.
    """

    def __init__(
        self,
        system: openmm.System,
        variables: CollectiveVariables,
        *,
        temperature_kelvin: float,
        positions: np.ndarray,
        widths: Sequence[float],
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
        group = _free_group(system)
        for force in restraint_forces(variables, group=group):
            system.addForce(force)
        self.restraint = _restraint(widths, variables)
        super().__init__(
            system, variables, temperature_kelvin=temperature_kelvin, positions=positions, timestep_ps=timestep_ps,
            friction_per_ps=friction_per_ps, platform=platform, box=box, planar=planar, seed=seed,
            energy_groups=0xFFFFFFFF & ~(1 << group),
        )  # fmt: skip

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedSystem,
        variables: CollectiveVariables,
        *,
        temperature_kelvin: float,
        widths: Sequence[float],
        timestep_ps: float,
        friction_per_ps: float = 0.0,
        platform: PlatformChoice = PlatformChoice(),  # noqa: B008
        planar: bool = False,
    ) -> OpenMMSteering:
        """The engine of a loaded system (see :func:`boltzgen.md.loading.load`)."""
        return cls(loaded.system, variables, temperature_kelvin=temperature_kelvin, positions=loaded.positions, widths=widths,
                   timestep_ps=timestep_ps, friction_per_ps=friction_per_ps, platform=platform, box=loaded.box, planar=planar)  # fmt: skip

    def with_settings(self, *, widths: Sequence[float] | None = None, timestep_ps: float | None = None) -> OpenMMSteering:
        """The same engine, sharing its contexts, with other widths or another time step."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.restraint = self.restraint if widths is None else _restraint(widths, self.variables)
        other.timestep_ps = self.timestep_ps if timestep_ps is None else float(timestep_ps)
        return other

    def at(
        self, temperature_kelvin: float, *, box: np.ndarray | None = None, parameters: Mapping[str, float] | None = None,
        variables: CollectiveVariables | None = None,
    ) -> OpenMMSteering:  # fmt: skip
        """The same engine, sharing its contexts, in another thermodynamic state.

        Args:
            temperature_kelvin: T in kelvin.
            box: Box vectors ``[3, 3]`` in nm; the system's by default.
            parameters: Global parameters of the system that differ from its defaults; all of them, as contexts remember those of others.
            variables: The same variables in that box, where they take nearest images.
        """
        other = self.with_settings()
        other._conditions = Conditions(float(temperature_kelvin), box, dict(parameters or {}))
        other.variables = self.variables if variables is None else variables
        return other

    @property
    def parameter_names(self) -> frozenset[str]:
        """Global parameters of the system, those of the restraints left out."""
        own = {name(i) for i in range(len(self.variables)) for name in (center_name, stiffness_name)}
        return frozenset(self._pool.slots[0].parameter_names()) - own

    def steer(self, walkers: PathWalkers, start: Tensor, end: Tensor, *, schedule: Schedule, generator: torch.Generator) -> PathResult:
        plans = self._plans(start, end, schedule=schedule)
        result = self._steer(walkers, plans, (start, end), generator=generator)
        return result if schedule.looks is None else self._filmed(walkers, plans, result, start)

    def film(
        self, walkers: PathWalkers, start: Tensor, end: Tensor, *, schedule: Schedule, n_frames: int, generator: torch.Generator
    ) -> tuple[PathResult, list[PathFilm]]:
        """The paths of :meth:`steer`, looked at along the way; with friction under other noise, as OpenMM draws some for every look.

        Every frame costs two evaluations of energy or force more, which ``n_force`` counts.

        Args:
            walkers: Where paths start.
            start: λ₀ ``[w, k]``.
            end: λ₁ ``[w, k]``.
            schedule: How long, and how, the centre moves.
            n_frames: Frames besides the first, evenly spaced; fewer where a path has fewer steps.
            generator: Source of the velocities.

        Returns:
            The ends, and the film of every path.
        """
        plans = self._plans(start, end, schedule=schedule, n_frames=n_frames)
        result = self._filmed(walkers, plans, self._steer(walkers, plans, (start, end), generator=generator), start)
        return replace(result, films=()), list(result.films)

    @property
    def _slot(self) -> type[_SteeredSlot]:
        return _SteeredSlot

    def _free(self, n_steps: int) -> Ends:
        none = np.zeros(len(self.variables))
        return Ends(none, none, Schedule(n_steps), n_steps, none)

    def _plans(self, start: Tensor, end: Tensor, *, schedule: Schedule, n_frames: int = 0) -> list[Ends]:
        way, stiffness = self.restraint.difference(end, start), thermal_energy(self.temperature_kelvin) * self.restraint.stiffness.numpy()
        plans = []
        for i, (n, looks) in enumerate(zip(schedule.steps(way).tolist(), schedule.looked_at(way), strict=True)):
            frames = tuple(np.unique(np.linspace(0, n, n_frames + 1).round().astype(int))[1:].tolist()) if n_frames else looks
            plans.append(Ends(start[i].numpy(), way[i].numpy(), schedule, n, stiffness, looks=frames))
        return plans

    def _steer(self, walkers: PathWalkers, plans: list[Ends], ends: tuple[Tensor, Tensor], *, generator: torch.Generator) -> PathResult:
        result = self._run(walkers, plans, generator=generator)
        rise = self.restraint.energy(result.xi, ends[1]) - self.restraint.energy(walkers.xi, ends[0])
        return replace(result, work=torch.where(torch.isfinite(result.work), result.work + rise, result.work))

    def _filmed(self, walkers: PathWalkers, plans: Sequence[Ends], result: PathResult, start: Tensor) -> PathResult:
        """A result with the films of its paths, and what they cost."""
        films = [self._film(walkers, row, plan, centre=start[row], failure=result.failures.get(row)) for row, plan in enumerate(plans)]
        seen = torch.tensor([len(plan.seen) for plan in plans], dtype=torch.int64)
        return replace(result, n_force=result.n_force + 2 * seen, films=films)

    def _film(self, walkers: PathWalkers, row: int, plan: Ends, *, centre: Tensor, failure: str | None) -> PathFilm:
        """What was seen of a path, up to where it failed."""
        seen, kt = list(itertools.takewhile(lambda path: path.is_finite, plan.seen)), thermal_energy(self.temperature_kelvin)
        s = torch.tensor([0, *plan.looks[: len(seen)]], dtype=torch.float64) / plan.n_steps
        centres = centre + plan.schedule.fraction(s)[:, None] * torch.from_numpy(plan.way)
        x = torch.from_numpy(np.stack([path.x for path in seen])) if seen else walkers.x[:0]
        xi = torch.cat([walkers.xi[row : row + 1], self.variables(x)]) if seen else walkers.xi[row : row + 1]
        gained = torch.tensor([0.0, *((path.energy + path.kinetic) / kt - float(walkers.u[row]) for path in seen)], dtype=torch.float64)
        held = self.restraint.energy(xi, centres)
        return PathFilm(s=s.numpy(), centre=centres.numpy(), xi=xi.numpy(), work=(gained + held - held[0]).numpy(), failure=failure)


def _restraint(widths: Sequence[float], variables: CollectiveVariables) -> Restraint:
    if len(widths) != len(variables) or any(not width > 0 for width in widths):
        raise InputError(f"expected one positive width for each of {', '.join(variables.names)}, got {list(widths)}")
    return Restraint([1.0 / float(width) ** 2 for width in widths], variables.periods)


def _free_group(system: openmm.System) -> int:
    taken = {force.getForceGroup() for force in system.getForces()}
    free = [group for group in range(31, 0, -1) if group not in taken]
    if not free:
        raise InputError("the system uses all of OpenMM's 32 force groups: leave one of 1 to 31 to the restraint")
    return free[0]
