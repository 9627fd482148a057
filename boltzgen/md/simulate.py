"""Langevin dynamics at one temperature, several independent chains at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import openmm
from openmm import app, unit
from tqdm import tqdm

from boltzgen.errors import EnergyError, InputError, Interrupted
from boltzgen.md.platforms import PlatformChoice, choose_platform
from boltzgen.md.trajectory import Torsion, Trajectory, slowest_inefficiency, time_blocks
from boltzgen.units import thermal_energy

T = TypeVar("T")

#: Steps run before the first frame, as a fraction of those recorded.
EQUILIBRATION = 0.1


@dataclass(frozen=True)
class DynamicsSettings:
    """How independent chains of Langevin dynamics are run and recorded.

    Every chain runs a tenth of its steps before its first frame. Constraints are kept; a barostat must have been removed.

    Attributes:
        n_steps: Recorded steps of every chain (of every replica of a ladder).
        save_every: Steps between frames.
        timestep_ps: Time step in ps; it must also suit the hottest replica.
        friction_per_ps: Friction in 1/ps.
        seed: Seed of velocities, noise and exchanges; bitwise reproducible on the Reference platform.
        n_chains: Independent chains, in parallel threads except on the Reference platform.
        platform: Platform, precision and device; what it leaves open is found by timing.
        box: Box vectors ``[3, 3]`` in nm, or None.

    Raises:
        InputError: If a number makes no sense.
    """

    n_steps: int
    save_every: int
    timestep_ps: float
    friction_per_ps: float
    seed: int
    n_chains: int = 2
    platform: PlatformChoice = field(default_factory=PlatformChoice)
    box: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.save_every < 1 or self.n_chains < 1 or self.n_steps < self.save_every:
            raise InputError(
                f"expected n_steps ≥ save_every ≥ 1 and n_chains ≥ 1, got n_steps={self.n_steps}, save_every={self.save_every}, "
                f"n_chains={self.n_chains}"
            )
        if self.timestep_ps <= 0 or self.friction_per_ps <= 0:
            raise InputError(f"expected a positive time step and friction, got {self.timestep_ps} ps and {self.friction_per_ps} /ps")

    @property
    def n_frames(self) -> int:
        """Frames that every chain records."""
        return self.n_steps // self.save_every

    @property
    def n_burn(self) -> int:
        """Steps before the first frame."""
        return int(EQUILIBRATION * self.n_steps)

    @property
    def length_ps(self) -> float:
        """Recorded time of every chain in ps."""
        return self.n_frames * self.save_every * self.timestep_ps


@dataclass(frozen=True)
class Dynamics:
    """A system that chains can be started on.

    Attributes:
        system: The system, without barostat.
        positions: Start ``[n, 3]`` in nm.
        settings: How it is integrated.
        platform_name: Platform that every chain runs on.
        properties: Its properties.
    """

    system: openmm.System
    positions: np.ndarray
    settings: DynamicsSettings
    platform_name: str
    properties: dict[str, str]

    @property
    def parallel(self) -> bool:
        """Whether chains may run at the same time: all contexts of the Reference platform share one random stream, without a lock."""
        return self.platform_name != "Reference"

    def simulation(self, temperature_kelvin: float, *, seed: int) -> app.Simulation:
        """A seeded simulation at the minimised start; constraints to 1e-8, or to what single precision can resolve.

        Raises:
            EnergyError: If the start has no finite energy, or cannot be minimised.
        """
        integrator = openmm.LangevinMiddleIntegrator(temperature_kelvin, self.settings.friction_per_ps, self.settings.timestep_ps)
        integrator.setRandomNumberSeed(seed)
        integrator.setConstraintTolerance(1e-6 if self.properties.get("Precision") == "single" else 1e-8)
        platform = openmm.Platform.getPlatformByName(self.platform_name)
        simulation = app.Simulation(app.Topology(), self.system, integrator, platform, self.properties)
        if self.settings.box is not None:
            simulation.context.setPeriodicBoxVectors(*self.settings.box)
        simulation.context.setPositions(self.positions)
        try:
            frame(simulation.context.getState(positions=True, energy=True))  # the minimiser would search for ever
            openmm.LocalEnergyMinimizer.minimize(simulation.context)
        except openmm.OpenMMException as error:
            raise blown_up(f"{error}, while minimising") from error
        return simulation


def with_hydrogens_of(system: openmm.System, mass_dalton: float) -> openmm.System:
    """A copy whose hydrogens (particles of 0.5 to 1.5 Da) have another mass; other masses stay.

    Without constraints the density of configurations, exp(−U/kT), holds no mass. With constraints it holds the mass-metric factor of the
    rigid bonds, so that other masses would sample another density.

    Raises:
        InputError: If the system has constraints, or the mass is not positive.
    """
    if system.getNumConstraints():
        raise InputError(
            f"hydrogen_mass: {system.getNumConstraints()} bonds are constrained, and the density of configurations then depends on masses: "
            "leave it out, or make system.xml with the masses that you want"
        )
    if not mass_dalton > 0:
        raise InputError(f"hydrogen_mass: expected a positive mass, got {mass_dalton} Da")
    system = copy.deepcopy(system)
    for i in range(system.getNumParticles()):
        if 0.5 < system.getParticleMass(i)._value < 1.5:
            system.setParticleMass(i, mass_dalton)
    return system


def dynamics(system: openmm.System, positions: np.ndarray, settings: DynamicsSettings) -> Dynamics:
    """The system on the platform asked for, or on the fastest one for it.

    Raises:
        InputError: If positions do not belong to the system.
    """
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    if positions.shape != (system.getNumParticles(), 3) or not np.isfinite(positions).all():
        raise InputError(f"expected finite positions [{system.getNumParticles()}, 3] in nm, got shape {positions.shape}")
    choice = replace(settings.platform, contexts=None if settings.platform.name is None else 1)
    platform = choose_platform(system, positions, choice=choice, box=settings.box)
    return Dynamics(system, positions, settings, platform.name, dict(platform.properties))


def langevin(
    system: openmm.System,
    positions: np.ndarray,
    *,
    temperature_kelvin: float,
    settings: DynamicsSettings,
    torsions: Sequence[Torsion] | None = None,
    progress: bool = True,
) -> Trajectory:
    """Independent chains of Langevin dynamics (LangevinMiddleIntegrator) from one minimised start.

    Args:
        system: The system.
        positions: Start ``[n, 3]`` in nm.
        temperature_kelvin: Temperature in kelvin.
        settings: Steps, frames, seed and platform.
        torsions: Atoms of torsions whose correlation counts; by default one of heavy atoms about every bond that the force field turns.
        progress: Whether to show a progress bar.

    Returns:
        ``n_chains * n_frames`` frames.

    Raises:
        InputError: If positions do not belong to the system.
        EnergyError: If the dynamics blow up.

    References:
        Zhang et al., J. Phys. Chem. A 123, 6056 (2019).
    """
    start, n_frames = dynamics(system, positions, settings), settings.n_frames

    def chain(index: int, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
        noise, velocities = seeds(settings.seed, index, count=2)
        context = start.simulation(temperature_kelvin, seed=noise).context
        context.setVelocitiesToTemperature(temperature_kelvin, velocities)
        stepped(context, settings.n_burn, advance)
        x, u = np.empty((n_frames, *start.positions.shape)), np.empty(n_frames)
        for t in range(n_frames):
            stepped(context, settings.save_every, advance)
            x[t], energy = frame(context.getState(positions=True, energy=True))
            u[t] = energy / thermal_energy(temperature_kelvin)
        return x, u

    total = settings.n_chains * (settings.n_burn + n_frames * settings.save_every)
    results = run_chains(
        chain, n_chains=settings.n_chains, parallel=start.parallel, total=total, label=f"MD {temperature_kelvin:g} K", progress=progress
    )
    return assembled(
        [x for x, _ in results],
        [u for _, u in results],
        temperature_kelvin=temperature_kelvin,
        torsions=heavy_torsions(system) if torsions is None else torsions,
        n_force_evaluations=total + settings.n_chains * n_frames,
        notes=(f"Langevin MD on {start.platform_name}: {settings.n_chains} chains of {settings.length_ps:g} ps",),
    )


def assembled(
    x: list[np.ndarray],
    u: list[np.ndarray],
    *,
    temperature_kelvin: float,
    torsions: Sequence[Torsion],
    n_force_evaluations: int,
    notes: tuple[str, ...] = (),
) -> Trajectory:
    """One trajectory from the frames ``[n, atoms, 3]`` and reduced potentials ``[n]`` of every chain."""
    n_frames = len(u[0])
    all_x, all_u, chain = np.concatenate(x), np.concatenate(u), np.repeat(np.arange(len(u)), n_frames)
    return Trajectory(
        x=all_x,
        u=all_u,
        block=np.tile(time_blocks(n_frames, 10), len(u)),
        chain=chain,
        temperature_kelvin=temperature_kelvin,
        statistical_inefficiency=slowest_inefficiency(all_x, all_u, chain=chain, torsions=torsions),
        n_force_evaluations=n_force_evaluations,
        notes=notes,
    )


def seeds(seed: int, chain: int, *, count: int) -> list[int]:
    """Distinct positive seeds of one chain (OpenMM reads 0 as a request for an arbitrary one)."""
    return [int(s) % (2**31 - 2) + 1 for s in np.random.SeedSequence([seed, chain]).generate_state(count)]


def stepped(context: openmm.Context, n_steps: int, advance: Callable[[int], None]) -> None:
    """Integrate in pieces, so that a run can be stopped and its bar moves.

    Raises:
        EnergyError: If OpenMM reports that coordinates are not numbers.
    """
    for begin in range(0, n_steps, 1000):
        piece = min(1000, n_steps - begin)
        try:
            context.getIntegrator().step(piece)
        except openmm.OpenMMException as error:
            raise blown_up(str(error)) from error
        advance(piece)


def frame(state: openmm.State) -> tuple[np.ndarray, float]:
    """Positions ``[n, 3]`` in nm and potential energy in kJ/mol of a state.

    Raises:
        EnergyError: If one of them is not finite.
    """
    x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole)
    if not (np.isfinite(x).all() and np.isfinite(energy)):
        raise blown_up(f"potential energy {energy} kJ/mol")
    return x, energy


def blown_up(what: str) -> EnergyError:
    """The error for dynamics that left the realm of numbers."""
    return EnergyError(
        f"the simulation blew up ({what}), although it starts with a minimisation; use a smaller time step (0.5 to 1 fs without "
        "constraints), and check the system's parameters and the start with `boltzgen check`"
    )


def run_chains(
    chain: Callable[[int, Callable[[int], None]], T], *, n_chains: int, parallel: bool, total: int, label: str, progress: bool
) -> list[T]:
    """Results of ``chain(index, advance)`` for every chain; the first failure stops the others and is raised.

    Args:
        chain: Runs one chain and calls ``advance(steps)`` as it goes, at which point it may be stopped.
        n_chains: How many.
        parallel: Whether in parallel threads or one after the other.
        total: Steps of all chains, for the progress bar.
        label: What the bar says.
        progress: Whether there is one.

    Returns:
        One result per chain, in order.
    """
    stop, lock = threading.Event(), threading.Lock()
    with tqdm(total=total, desc=label, unit="step", unit_scale=True, disable=not progress) as bar:

        def advance(steps: int) -> None:
            if stop.is_set():
                raise Interrupted("another chain failed or the run was asked to stop")
            with lock:
                bar.update(steps)

        with ThreadPoolExecutor(n_chains if parallel else 1) as pool:
            futures = [pool.submit(chain, index, advance) for index in range(n_chains)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def heavy_torsions(system: openmm.System) -> list[Torsion]:
    """One torsion of heavy atoms (above 4.5 Da, so that repartitioned hydrogens stay out) about every bond in a PeriodicTorsionForce."""
    heavy = [system.getParticleMass(i).value_in_unit(unit.dalton) > 4.5 for i in range(system.getNumParticles())]
    found: dict[tuple[int, int], Torsion] = {}
    for force in system.getForces():
        if isinstance(force, openmm.PeriodicTorsionForce):
            for index in range(force.getNumTorsions()):
                a, b, c, d, *_ = force.getTorsionParameters(index)
                if all(heavy[i] for i in (a, b, c, d)):
                    found.setdefault((min(b, c), max(b, c)), (a, b, c, d))
    return list(found.values())
