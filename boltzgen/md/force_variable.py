"""A collective variable that is the energy of a user's own OpenMM force."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import ArrayLike
from openmm import unit as openmm_unit
from torch import Tensor

from boltzgen.cvs import CollectiveVariable
from boltzgen.errors import EnergyError, InputError
from boltzgen.md.contexts import ContextPool


class ForceVariable(CollectiveVariable):
    """A variable whose value, in its unit, is the energy of a force in kJ/mol, and whose gradient is minus its forces.

    Values of a force with a period P are taken to [−P/2, P/2), whatever turn its energies are in. They are computed one configuration at a
    time by an OpenMM context of its own, on the Reference platform by default (double precision), and have first derivatives only.

    Args:
        name: What the user calls it.
        force: Any force, such as a ``CustomCVForce``; a copy is kept.
        n_particles: Number of particles of the system, virtual sites included.
        period: Its period in ``unit``, None where it has none.
        unit: Its unit.
        box: Box vectors ``[3, 3]`` in nm, needed where the force uses periodic boundary conditions.
        platform: OpenMM platform that computes it.

    Raises:
        InputError: If OpenMM cannot make a context of the force and that many particles, or a periodic force has no box.
    """

    def __init__(
        self,
        name: str,
        force: openmm.Force,
        *,
        n_particles: int,
        period: float | None = None,
        unit: str = "1",
        box: ArrayLike | None = None,
        platform: str = "Reference",
    ) -> None:
        super().__init__(name, range(n_particles))
        self.unit, self.period = unit, None if period is None else float(period)
        self._force = openmm.XmlSerializer.clone(force)
        self._force.setForceGroup(0)
        self.platform = platform
        self.box = None if box is None else np.array(box, dtype=np.float64)
        self._system = openmm.System()
        for _ in range(n_particles):
            self._system.addParticle(1.0)
        if force.usesPeriodicBoundaryConditions() and box is None:
            raise InputError(f"the force of {name!r} uses periodic boundary conditions and was given no box")
        if box is not None:
            self._system.setDefaultPeriodicBoxVectors(*np.array(box, dtype=np.float64))
        self._system.addForce(self.copy_of_force())
        self._pool: ContextPool | None = None
        try:
            openmm.Context(self._system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        except openmm.OpenMMException as error:
            raise InputError(f"OpenMM cannot compute the force of {name!r} for a system of {n_particles} particles: {error}") from error

    def copy_of_force(self) -> openmm.Force:
        """A force of its own for another system."""
        return openmm.XmlSerializer.clone(self._force)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}  # contexts live in one process

    def values_and_gradients(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and gradients.

        Args:
            x: Configurations ``[b, n, 3]`` in nm.

        Returns:
            ``[b]`` in ``unit`` and ``[b, n, 3]`` in ``unit`` per nm, float64.

        Raises:
            EnergyError: If a value is not a number or cannot be computed; it names the row.
        """
        if self._pool is None:
            self._pool = ContextPool(self._system, platform_name=self.platform, properties={}, n_contexts=1)
        batch = self._pool.evaluate(np.ascontiguousarray(x, dtype=np.float64))
        bad = np.flatnonzero(~np.isfinite(batch.energies))
        if len(bad):
            said = batch.failures.get(int(bad[0]), "the energy of its force is not a finite number")
            raise EnergyError(f"{self.name!r} cannot be computed in row {bad[0]}: {said}")
        turns = 0.0 if self.period is None else self.period * np.floor(batch.energies / self.period + 0.5)
        return batch.energies - turns, -batch.forces

    def _value(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.atoms):
            raise InputError(f"{self.name!r} was made for {len(self.atoms)} particles, got configurations of {x.shape[1]}")
        return _Energy.apply(x, self)


class _Energy(torch.autograd.Function):
    """Energy of a force, with minus the forces as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, variable: ForceVariable) -> Tensor:
        values, gradients = variable.values_and_gradients(x.detach().cpu().numpy())
        ctx.save_for_backward(torch.from_numpy(gradients).to(x))
        return torch.from_numpy(values).to(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return grad[:, None, None] * gradients, None


def variable_of_cvpack(cv: openmm.Force, *, n_particles: int, box: ArrayLike | None = None) -> ForceVariable:
    """A collective variable of the package cvpack.

    Args:
        cv: A cvpack object: a force with ``getName``, ``getUnit`` and ``getPeriodicBounds`` (None, or a lower and an upper bound).
        n_particles: Number of particles of the system.
        box: Box vectors ``[3, 3]`` in nm, where it uses periodic boundary conditions.

    Raises:
        InputError: If the object lacks one of those methods.
    """
    missing = [method for method in ("getName", "getUnit", "getPeriodicBounds") if not hasattr(cv, method)]
    if missing or not isinstance(cv, openmm.Force):
        lacks = f"lacks {', '.join(missing)}" if missing else "is no openmm.Force"
        raise InputError(f"expected a collective variable of cvpack, got a {type(cv).__name__}, which {lacks}; give a plain OpenMM force "
                         f"to ForceVariable, with its period and unit")  # fmt: skip
    unit, bounds = cv.getUnit(), cv.getPeriodicBounds()
    period = None
    if bounds is not None:
        low, high = bounds.value_in_unit(unit)
        period = float(high - low)
    return ForceVariable(cv.getName(), cv, n_particles=n_particles, period=period, unit=_unit_text(unit), box=box)


def _unit_text(unit: Any) -> str:
    """boltzgen's name of a unit: nm, rad, 1, or OpenMM's symbol."""
    known = {openmm_unit.nanometer: "nm", openmm_unit.radian: "rad", openmm_unit.dimensionless: "1"}
    return next((text for candidate, text in known.items() if unit == candidate), unit.get_symbol())
