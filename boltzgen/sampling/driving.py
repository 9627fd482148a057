"""Driven paths of any target whose gradient comes from PyTorch, many walkers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import InputError
from boltzgen.paths import PathResult, PathWalkers, Restraint, Schedule
from boltzgen.sampling.steering import TargetSteering


class TargetDriving(TargetSteering):
    """Driving of the first atoms, or any others, of an analytic target: the reference for engines that run elsewhere.

    O½ V½ R½ [solute: x(k) → x(k+1)] R½ V½ O½ as in :class:`TargetSteering`, for all particles but those of the solute.

    Args:
        target: Target of configurations ``[n, 3]`` with an exact energy.
        solute: Indices of the driven particles.
        variables: ξ, which is only recorded: configurations to values ``[b, k]``.
        step_size: h, in units in which kT = 1.
        friction: γ, per unit of time.
        masses: Mass of every coordinate, broadcast to the event.

    Raises:
        InexactDensityError: If the target is altered.
        InputError: If a number makes no sense or a particle does not exist.
    """

    def __init__(
        self,
        target: Target,
        solute: Sequence[int],
        variables: Callable[[Tensor], Tensor],
        *,
        step_size: float,
        friction: float = 0.0,
        masses: Tensor | Sequence[float] | float = 1.0,
    ) -> None:
        super().__init__(target, variables, Restraint([], ()), step_size=step_size, friction=friction, masses=masses)
        if len(set(solute)) < len(solute) or min(solute) < 0 or max(solute) >= target.event_shape[0]:
            raise InputError(f"expected different particles from 0 to {target.event_shape[0] - 1}, got {list(solute)[:20]}")
        self.solute = tuple(int(atom) for atom in solute)

    def drive(self, walkers: PathWalkers, corners: Tensor, *, steps: Tensor, schedule: Schedule, generator: torch.Generator) -> PathResult:
        """Paths along ``corners`` ``[w, m + 1, k, 3]`` in ``steps`` ``[w]``."""
        x, heat = walkers.x.clone(), torch.zeros(len(walkers.x), dtype=torch.float64)
        v = self._still(self._maxwell(x, generator))
        begin = walkers.u + self._kinetic(v)
        for k in range(int(steps.max())):
            on = torch.nonzero(k < steps).flatten()
            x[on], v[on], gained = self._driven(x[on], v[on], self._along(corners[on], schedule, (k + 1) / steps[on].double()), generator)
            heat[on] += gained
        finite = torch.isfinite(x.flatten(1)).all(1)
        arrived = self.locate(torch.where(finite[:, None, None], x, walkers.x))
        work = arrived.u + self._kinetic(v) - begin - heat
        failed = ~finite | ~torch.isfinite(work)
        failures = {row: "coordinates or energies are not numbers" for row in torch.nonzero(failed).flatten().tolist()}
        return PathResult(x=arrived.x, u=arrived.u, xi=arrived.xi, work=work.masked_fill(failed, torch.inf), n_force=steps + 2,
                          failures=failures)  # fmt: skip

    def _driven(self, x: Tensor, v: Tensor, place: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One palindromic step that leaves the solute at ``place``; also the heat ``[b]``."""
        h, solute = self.step_size, list(self.solute)
        v, first = self._thermalised_solvent(v, generator)
        v = self._still(v - 0.5 * h * self._gradient(x, None) / self.masses)
        x = x + h * v
        x[:, solute] = place
        v = self._still(v - 0.5 * h * self._gradient(x, None) / self.masses)
        v, second = self._thermalised_solvent(v, generator)
        return x, v, first + second

    def _thermalised_solvent(self, v: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """O½ of all but the solute, and the kinetic energy that it adds ``[b]``."""
        new = self._still(self._thermalised(v, generator)[0])
        return new, self._kinetic(new) - self._kinetic(v)

    def _still(self, v: Tensor) -> Tensor:
        """Velocities, zero for the solute."""
        return v.index_fill(1, torch.tensor(self.solute), 0.0)

    def _along(self, corners: Tensor, schedule: Schedule, s: Tensor) -> Tensor:
        """Places of the solute ``[b, k, 3]`` at s ``[b]``."""
        last = corners.shape[1] - 2
        along = schedule.fraction(s) * (last + 1)
        leg, rows = along.floor().clamp(0, last), torch.arange(len(corners))
        start, end = corners[rows, leg.long()], corners[rows, leg.long() + 1]
        return start + (end - start) * (along - leg)[:, None, None]
