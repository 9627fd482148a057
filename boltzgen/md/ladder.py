"""A ladder of temperatures with replica exchange: data that visit the basins which plain dynamics at the target would miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.errors import InputError
from boltzgen.md.exchange import ReproducibleExchange
from boltzgen.md.simulate import (
    DynamicsSettings,
    assembled,
    blown_up,
    dynamics,
    heavy_torsions,
    run_chains,
    seeds,
    stepped,
)
from boltzgen.md.trajectory import Torsion, Trajectory
from boltzgen.units import thermal_energy


class SeededExchange(ReproducibleExchange):
    """Exchange of temperatures.

    Args:
        temperatures_kelvin: Temperatures, ascending.
        simulation: Simulation whose context all replicas share.
        steps: Steps between exchanges.
        rng: Generator of the exchanges.
    """

    def __init__(self, temperatures_kelvin: Sequence[float], simulation: app.Simulation, steps: int, *, rng: np.random.Generator) -> None:
        super().__init__([{"temperature": t * unit.kelvin} for t in temperatures_kelvin], simulation, steps, rng=rng)

    def energies(self) -> np.ndarray:
        """Potential energy of every replica ``[k]`` in kJ/mol, after the last iteration.

        Raises:
            EnergyError: If one is not finite.
        """
        u = np.array([e[0].value_in_unit(unit.kilojoules_per_mole) for e in self.replicaStateEnergy])
        if not np.isfinite(u).all():
            raise blown_up(f"potential energies {u.tolist()} kJ/mol of the replicas")
        return u


class _Recorder:
    """A reporter that sorts the frames of one set by temperature: ``x [k, n, atoms, 3]`` in nm, ``energies [k, n]`` in kJ/mol."""

    def __init__(self, sampler: SeededExchange, *, n_frames: int, save_every: int, advance: Callable[[int], None]) -> None:
        k, n_atoms = len(sampler.states), sampler.simulation.system.getNumParticles()
        self.x, self.energies = np.empty((k, n_frames, n_atoms, 3)), np.empty((k, n_frames))
        self.save_every, self.advance = save_every, advance
        sampler.reporters.append(self)

    def __call__(self, sampler: SeededExchange) -> None:
        self.advance(len(sampler.states) * sampler.stepsPerIteration)
        t, rest = divmod(sampler.currentIteration * sampler.stepsPerIteration, self.save_every)
        if rest == 0:
            self.energies[sampler.replicaStateIndex, t - 1] = sampler.energies()
            for state, conformation in zip(sampler.replicaStateIndex, sampler.replicaConformation, strict=True):
                self.x[state, t - 1] = conformation.getPositions(asNumpy=True).value_in_unit(unit.nanometer)


def _equilibrate(
    sampler: SeededExchange, temperatures: Sequence[float], velocities: Sequence[int], *, n_steps: int, advance: Callable[[int], None]
) -> None:
    """Run every replica at its own temperature from the common start; ``velocities`` are the seeds of their Maxwell velocities."""
    simulation, start = sampler.simulation, sampler.replicaConformation[0]
    for replica, (temperature, seed) in enumerate(zip(temperatures, velocities, strict=True)):
        simulation.context.setState(start)
        simulation.integrator.setTemperature(temperature)
        simulation.context.setVelocitiesToTemperature(temperature, seed)
        stepped(simulation.context, n_steps, advance)
        sampler.replicaConformation[replica] = simulation.context.getState(
            positions=True, velocities=True, parameters=True, integratorParameters=True
        )


def temperature_ladder(
    system: openmm.System,
    positions: np.ndarray,
    *,
    temperatures_kelvin: Sequence[float],
    exchange_every: int,
    settings: DynamicsSettings,
    torsions: Sequence[Torsion] | None = None,
    progress: bool = True,
) -> Trajectory:
    """Independent sets of replicas that exchange temperatures (OpenMM's ReplicaExchangeSampler), from one minimised start.

    The replicas of one set take turns in one context, so that ``n_chains`` sets fill the cores. The steps before the first frame go
    without exchange.

    Args:
        system: The system.
        positions: Start ``[n, 3]`` in nm.
        temperatures_kelvin: Temperatures in kelvin, the target first, ascending.
        exchange_every: Steps between exchanges.
        settings: Steps, frames (``save_every`` is a multiple of ``exchange_every``), seed and platform of every replica; ``n_chains``
            counts the sets.
        torsions: Atoms of torsions whose correlation counts; by default one of heavy atoms about every bond that the force field turns.
        progress: Whether to show a progress bar.

    Returns:
        The target's frames, ``n_chains * n_frames`` of them, with the other temperatures in ``hot``.

    Raises:
        InputError: If a number makes no sense.
        EnergyError: If the dynamics blow up.

    References:
        Sugita and Okamoto, Chem. Phys. Lett. 314, 141 (1999), eqs. 12 and 14.
    """
    temperatures = [float(t) for t in temperatures_kelvin]
    if len(temperatures) < 2 or temperatures[0] <= 0 or (np.diff(temperatures) <= 0).any():
        raise InputError(f"expected two or more positive temperatures, ascending, the target first, got {temperatures}")
    if exchange_every < 1 or settings.save_every % exchange_every:
        raise InputError(f"expected save_every to be a multiple of exchange_every, got {settings.save_every} and {exchange_every}")
    start, n_sets, k = dynamics(system, positions, settings), settings.n_chains, len(temperatures)
    recorded = settings.n_frames * settings.save_every

    def chain(index: int, advance: Callable[[int], None]) -> tuple[_Recorder, SeededExchange]:
        noise, exchanges, *velocities = seeds(settings.seed, index, count=2 + k)
        simulation = start.simulation(temperatures[0], seed=noise)
        sampler = SeededExchange(temperatures, simulation, exchange_every, rng=np.random.default_rng(exchanges))
        recorder = _Recorder(sampler, n_frames=settings.n_frames, save_every=settings.save_every, advance=advance)
        try:
            _equilibrate(sampler, temperatures, velocities, n_steps=settings.n_burn, advance=advance)
            sampler.simulate(recorded // exchange_every)
        except openmm.OpenMMException as error:
            raise blown_up(str(error)) from error
        return recorder, sampler

    total = n_sets * k * (settings.n_burn + recorded)
    n_energies = n_sets * k * recorded // exchange_every
    results = run_chains(
        chain, n_chains=n_sets, parallel=start.parallel, total=total, label=f"ladder of {k} temperatures", progress=progress
    )  # fmt: skip
    attempted = sum(sampler.attempted for _, sampler in results)
    accepted = sum(sampler.accepted for _, sampler in results)
    notes = (
        f"replica exchange on {start.platform_name}: {n_sets} sets of {k} temperatures up to {temperatures[-1]:g} K, "
        f"{settings.length_ps:g} ps each",
        *_poor_exchange(temperatures, accepted / np.maximum(attempted, 1)),
    )
    levels = [
        assembled(
            [recorder.x[level] for recorder, _ in results],
            [recorder.energies[level] / thermal_energy(temperature) for recorder, _ in results],
            temperature_kelvin=temperature,
            torsions=heavy_torsions(system) if torsions is None else torsions,
            n_force_evaluations=(total + n_energies) // k,
        )
        for level, temperature in enumerate(temperatures)
    ]
    return replace(levels[0], hot=tuple(levels[1:]), n_force_evaluations=total + n_energies, notes=notes)


def _poor_exchange(temperatures: Sequence[float], rates: np.ndarray) -> list[str]:
    """A sentence for every gap of the ladder that hardly anything crosses."""
    return [
        f"only {rate:.1%} of the exchanges between {low:g} and {high:g} K were accepted: the target may not see what the hot replicas "
        "visit; put a temperature in between"
        for low, high, rate in zip(temperatures[:-1], temperatures[1:], rates, strict=True)
        if rate < 0.05
    ]
