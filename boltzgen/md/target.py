"""OpenMM as a target: batched reduced potentials and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import openmm
import torch
from openmm import app, unit
from scipy.spatial import cKDTree
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import ConfigError, EnergyError, InputError, ShapeError
from boltzgen.md.checks import atom_name
from boltzgen.md.contexts import Batch, ContextPool
from boltzgen.md.loading import LoadedSystem, load, without_couplings
from boltzgen.md.platforms import PlatformChoice, choose_platform
from boltzgen.units import thermal_energy

#: Atoms this close, in nm, lie on the same point: 1/r and angles are undefined there.
COINCIDENT_NM = 1e-6

#: Energies above this, in kJ/mol, have forces beyond the range of single precision (weight exp(-1e20) = 0 in any precision).
FORCE_OVERFLOW_ENERGY = 1e20

_TIMED = PlatformChoice()


class OpenMMTarget(Target):
    """The Boltzmann density of an OpenMM system at fixed volume: u(x) = U(x) / kT.

    Energies and forces come from a pool of contexts on threads. Nothing is cached. On the Reference platform energies are those of a
    bare context bit for bit; the CPU platform and GPUs in single or mixed precision compute pair terms in single precision, so their
    energies carry noise of about 1e-6 of the largest term (some 1e-3 kJ/mol for a small peptide).

    Where the energy is +inf (or larger than single precision can hold) u is +inf and its gradient zero. Where atoms lie within
    ``COINCIDENT_NM`` of each other, OpenMM may give NaN, the difference of two infinities; repulsion (r⁻¹²) wins over attraction (r⁻¹),
    so u is +inf there. Any other NaN raises.

    Args:
        system: The system; it is copied, without barostats, thermostats and centre-of-mass removers.
        temperature_kelvin: Temperature in kelvin.
        positions: ``[n, 3]`` in nm, on which platforms are timed.
        platform: What the user asks of the platform.
        labels: One label per particle.
        box: Box vectors ``[3, 3]`` in nm; those of a periodic system by default.
        parameters: Global context parameters that differ from the system's defaults.

    Raises:
        PlatformError: If the platform cannot be used.
        ConfigError: If the temperature is not positive.
    """

    def __init__(
        self,
        system: openmm.System,
        *,
        temperature_kelvin: float,
        positions: np.ndarray,
        platform: PlatformChoice = _TIMED,
        labels: tuple[str, ...] = (),
        box: np.ndarray | None = None,
        parameters: Mapping[str, float] | None = None,
    ) -> None:
        system, self.notes = without_couplings(system)
        n = system.getNumParticles()
        positions = np.array(positions, dtype=np.float64)
        if positions.shape != (n, 3):
            raise ShapeError(f"expected positions [{n}, 3] in nm for this system, got {list(positions.shape)}")
        if system.usesPeriodicBoundaryConditions():
            if box is not None:
                system.setDefaultPeriodicBoxVectors(*np.asarray(box, dtype=np.float64))
            vectors = [vector.value_in_unit(unit.nanometer) for vector in system.getDefaultPeriodicBoxVectors()]
            self.box = torch.tensor(np.array(vectors), dtype=torch.float64)
        self.event_shape = (n, 3)
        self.labels = labels
        self.temperature_kelvin = _positive(temperature_kelvin)
        resolved = choose_platform(system, positions, choice=platform)
        self._pool = ContextPool(
            system, platform_name=resolved.name, properties=resolved.properties, n_contexts=resolved.contexts, parameters=parameters
        )

    @classmethod
    def from_loaded(cls, loaded: LoadedSystem, *, temperature_kelvin: float, platform: PlatformChoice = _TIMED) -> OpenMMTarget:
        """The target of a loaded system (see :func:`boltzgen.md.loading.load`)."""
        labels = tuple(atom_name(atom) for atom in loaded.topology.atoms())
        return cls(loaded.system, temperature_kelvin=temperature_kelvin, positions=loaded.positions, platform=platform, labels=labels,
                   box=loaded.box)  # fmt: skip

    @classmethod
    def from_files(
        cls, topology: Path, system_xml: Path, *, temperature_kelvin: float, platform: PlatformChoice = _TIMED, trust: bool = False
    ) -> OpenMMTarget:
        """The target of a topology file with coordinates and a system XML; ``trust`` as in :func:`boltzgen.md.loading.load`."""
        return cls.from_loaded(load(topology, system_xml, trust=trust), temperature_kelvin=temperature_kelvin, platform=platform)

    @classmethod
    def from_simulation(
        cls, simulation: app.Simulation, *, temperature_kelvin: float | None = None, platform: PlatformChoice = _TIMED
    ) -> OpenMMTarget:
        """The target of a simulation as it stands: its system, context parameters, positions and box.

        The temperature is that of its integrator unless given. The simulation's own context is not used.

        Raises:
            InputError: If the integrator has no temperature and none is given.
        """
        if temperature_kelvin is None:
            if not hasattr(simulation.integrator, "getTemperature"):
                raise InputError(f"a {type(simulation.integrator).__name__} has no temperature; give temperature_kelvin")
            temperature_kelvin = simulation.integrator.getTemperature().value_in_unit(unit.kelvin)
        state = simulation.context.getState(positions=True, parameters=True)
        names = _parameter_names(simulation.system)
        return cls(
            simulation.system,
            temperature_kelvin=temperature_kelvin,
            positions=state.getPositions(asNumpy=True).value_in_unit(unit.nanometer),
            platform=platform,
            labels=tuple(atom_name(atom) for atom in simulation.topology.atoms()),
            box=np.array(state.getPeriodicBoxVectors().value_in_unit(unit.nanometer)),
            parameters={name: value for name, value in state.getParameters().items() if name in names},
        )

    @classmethod
    def from_thermodynamic_state(cls, state: Any, *, positions: Any, platform: PlatformChoice = _TIMED) -> OpenMMTarget:
        """The target of an openmmtools ``ThermodynamicState``, at its temperature and box.

        A state at constant pressure is taken at its box volume: u lacks the constant pV/kT.

        Args:
            state: The state.
            positions: ``[n, 3]``, a quantity or numbers in nm, on which platforms are timed.
            platform: What the user asks of the platform.
        """
        if unit.is_quantity(positions):
            positions = positions.value_in_unit(unit.nanometer)
        system = state.get_system(remove_thermostat=True, remove_barostat=True)
        return cls(system, temperature_kelvin=state.temperature.value_in_unit(unit.kelvin), positions=positions, platform=platform)

    @property
    def n_evaluations(self) -> int:
        """Energy and force evaluations so far, those at other temperatures (:meth:`at`) included."""
        return self._pool.n_evaluations

    @property
    def platform_name(self) -> str:
        """The OpenMM platform in use."""
        return self._pool.platform_name

    @property
    def n_contexts(self) -> int:
        """The number of contexts that compute in parallel."""
        return self._pool.n_contexts

    def reduced_potential(self, x: Tensor) -> Tensor:
        return _ReducedPotential.apply(x, self)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energies, gradients = self._evaluate(x)
        kt = thermal_energy(self.temperature_kelvin)
        return (energies / kt).to(x.device), (gradients / kt).to(device=x.device, dtype=x.dtype)

    def reduced_potentials(self, x: Tensor, states: Sequence[float]) -> Tensor:
        """Reduced potentials at several temperatures in kelvin, ``[K, b]``, from one evaluation; not differentiable."""
        energies, _ = self._evaluate(x)
        return torch.stack([energies / thermal_energy(_positive(kelvin)) for kelvin in states]).to(x.device)

    def at(self, temperature_kelvin: float) -> OpenMMTarget:
        """The same system at another temperature; it shares the contexts and the count of evaluations."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.temperature_kelvin = _positive(temperature_kelvin)
        return other

    def close(self) -> None:
        """Free the contexts, also for the targets that share them."""
        self._pool.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an OpenMMTarget holds live OpenMM contexts and cannot be pickled or copied; make it anew in every process")

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies ``[b]`` in kJ/mol and gradients ``[b, n, 3]`` in kJ/mol/nm on the CPU in float64."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ShapeError(f"expected configurations [b, {self.event_shape[0]}, 3] in nm, got {list(x.shape)}")
        rows = np.ascontiguousarray(x.detach().to(device="cpu", dtype=torch.float64).numpy())
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))
        if len(bad):
            raise EnergyError(f"row {bad[0]}{_and_more(bad)}: the coordinates are not finite numbers; the energy was not computed")
        batch = self._pool.evaluate(rows)
        _require_numbers(batch)
        return torch.from_numpy(batch.energies), torch.from_numpy(np.negative(batch.forces, out=batch.forces))


class _ReducedPotential(torch.autograd.Function):
    """u(x) with the gradient that came with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: OpenMMTarget) -> Tensor:
        u, gradient = target.value_and_grad(x)
        ctx.save_for_backward(gradient)
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0].to(gradient.dtype)[:, None, None] * gradient, None


def _require_numbers(batch: Batch) -> None:
    """Settle rows of infinite energy and coincident atoms in place; raise for any other row that is not a number."""
    energies, forces = batch.energies, batch.forces
    if batch.failures:
        rows = np.array(sorted(batch.failures))
        raise EnergyError(f"row {rows[0]}{_and_more(rows)}: OpenMM failed: {batch.failures[int(rows[0])]}")
    broken_forces = ~np.isfinite(forces).all(axis=(1, 2))
    for row in np.flatnonzero(broken_forces | ~np.isfinite(energies)):
        energy = energies[row]
        coincident = _has_coincident_atoms(batch.x[row])
        if np.isnan(energy) and coincident:
            energies[row] = np.inf
        elif np.isnan(energy):
            raise EnergyError(f"row {row}: the energy is not a number although all coordinates are finite; check the parameters of the "
                              f"system at this configuration")  # fmt: skip
        elif energy == -np.inf:
            raise EnergyError(f"row {row}: the energy is -inf: the system has an attraction without a repulsive core; its Boltzmann "
                              f"density cannot be normalised")  # fmt: skip
        elif energy < FORCE_OVERFLOW_ENERGY and not coincident:
            raise EnergyError(f"row {row}: a force is not a number although the energy is {energy:.6g} kJ/mol; check the parameters of "
                              f"the system at this configuration")  # fmt: skip
        forces[row] = 0.0


def _has_coincident_atoms(x: np.ndarray) -> bool:
    return bool(cKDTree(x).query_pairs(COINCIDENT_NM))


def _parameter_names(system: openmm.System) -> set[str]:
    """Global parameters of a system without its couplings."""
    kept, _ = without_couplings(system)
    context = openmm.Context(kept, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    return set(context.getParameters())


def _and_more(rows: np.ndarray) -> str:
    return f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""


def _positive(temperature_kelvin: float) -> float:
    if not (np.isfinite(temperature_kelvin) and temperature_kelvin > 0):
        raise ConfigError(f"expected a positive temperature in kelvin, got {temperature_kelvin}")
    return float(temperature_kelvin)
