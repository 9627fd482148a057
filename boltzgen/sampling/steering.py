"""Steered paths of any target whose gradient comes from PyTorch, many walkers side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import InexactDensityError, InputError
from boltzgen.paths import PathFilm, PathResult, PathWalkers, Restraint, Schedule


class TargetSteering:
    """Steering of an analytic target: the reference for engines that run elsewhere.

    One step of length h, from forces f = −∇(u + r(ξ, λ)) and c = e^{−γh/2}:

        O½: v ← c v + √((1 − c²)/m) η;  V½: v ← v + ½ h f/m;  R½: x ← x + ½ h v;  λ_k → λ_{k+1};  R½;  V½;  O½

    With Q the kinetic energy gained in all O, work = ΔH − Q. O is reversible with respect to Maxwell; V and R keep volume and reverse
    under v → −v; the step is a palindrome and the schedule symmetric: the path from λ₁ to λ₀ retraces it, P_F/P_R = e^{−Q}, at any h.

    Args:
        target: Target with an exact energy.
        variables: ξ: configurations ``[b, *event]`` to values ``[b, k]``, differentiable.
        restraint: r.
        step_size: h, in units in which kT = 1 (nm √(mass unit / kT)).
        friction: γ, per unit of time; 0 for deterministic paths.
        masses: Mass of every coordinate, broadcast to the event; 1 by default.

    Raises:
        InexactDensityError: If the target is altered.
        InputError: If a number makes no sense.

    References:
        Schönle, Gabrié, Lelièvre and Stoltz, arXiv 2405.18160; Nilmeier et al., PNAS 108, E1009 (2011), eqs. 8–14.
    """

    def __init__(
        self,
        target: Target,
        variables: Callable[[Tensor], Tensor],
        restraint: Restraint,
        *,
        step_size: float,
        friction: float = 0.0,
        masses: Tensor | Sequence[float] | float = 1.0,
    ) -> None:
        if not target.is_exact:
            raise InexactDensityError("the target is clipped or regularised: walkers would not sample the system; use the exact target")
        if not step_size > 0 or not friction >= 0:
            raise InputError(f"expected a positive step and a friction of zero or more, got {step_size} and {friction}")
        self.target, self.variables, self.restraint = target, variables, restraint
        self.step_size, self.friction = step_size, friction
        self.masses = torch.as_tensor(masses, dtype=torch.float64)

    def locate(self, x: Tensor) -> PathWalkers:
        x = x.detach().to(torch.float64)
        with torch.no_grad():
            return PathWalkers(x=x, u=self.target.reduced_potential(x), xi=self.variables(x))

    def roam(self, walkers: PathWalkers, *, n_steps: int, generator: torch.Generator) -> PathResult:
        return self._run(walkers, None, steps=torch.full((len(walkers.x),), n_steps), schedule=Schedule(n_steps), generator=generator)

    def steer(self, walkers: PathWalkers, start: Tensor, end: Tensor, *, schedule: Schedule, generator: torch.Generator) -> PathResult:
        steps = schedule.steps(self.restraint.difference(end, start))
        return self._run(walkers, (start, end), steps=steps, schedule=schedule, generator=generator)

    def _run(
        self, walkers: PathWalkers, ends: tuple[Tensor, Tensor] | None, *, steps: Tensor, schedule: Schedule, generator: torch.Generator
    ) -> PathResult:
        x, v = walkers.x.clone(), self._maxwell(walkers.x, generator)
        begin = self._hamiltonian(walkers.u, walkers.xi, v, None if ends is None else ends[0])
        heat = torch.zeros(len(x), dtype=torch.float64)
        seen: list[list[tuple[float, Tensor, Tensor, Tensor]]] = [[] for _ in x]
        due: dict[int, list[int]] = {}  # steps after which paths are looked at, and which
        for row, looks in enumerate([] if ends is None else schedule.looked_at(self.restraint.difference(ends[1], ends[0]))):
            for step in looks:
                due.setdefault(step, []).append(row)
        for k in range(int(steps.max())):
            on = torch.nonzero(k < steps).flatten()
            centres = [self._centre(ends, schedule, on, (k + late) / steps[on].to(torch.float64)) for late in (0, 1)]
            x[on], v[on], gained = self._step(x[on], v[on], *centres, generator=generator)
            heat[on] += gained
            for row in due.get(k + 1, ()):
                one, s = torch.tensor([row]), (k + 1) / steps[row : row + 1].to(torch.float64)
                here, centre = self.locate(x[one]), self._centre(ends, schedule, one, s)
                work = self._hamiltonian(here.u, here.xi, v[one], centre) - begin[one] - heat[one]
                assert centre is not None
                seen[row].append((float(s), centre[0], here.xi[0], work))
        finite = torch.isfinite(x.flatten(1)).all(1)
        arrived = self.locate(torch.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, walkers.x))
        work = self._hamiltonian(arrived.u, arrived.xi, v, None if ends is None else ends[1]) - begin - heat
        failed = ~finite | ~torch.isfinite(work)
        work = work.masked_fill(failed, torch.inf)
        failures = {row: "coordinates or energies are not numbers" for row in torch.nonzero(failed).flatten().tolist()}
        films = [] if ends is None or schedule.looks is None else [
            _film(ends[0][row], walkers.xi[row], some, failures.get(row)) for row, some in enumerate(seen)
        ]  # fmt: skip
        n_force = steps + 2 + 2 * torch.tensor([len(some) for some in seen])
        return PathResult(x=arrived.x, u=arrived.u, xi=arrived.xi, work=work, n_force=n_force, failures=failures, films=films)

    def _step(
        self, x: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One palindromic step; also the heat ``[b]``."""
        half = 0.5 * self.step_size
        v, first = self._thermalised(v, generator)
        v = v - half * self._gradient(x, before) / self.masses
        x = x + half * v  # λ moves here
        x = x + half * v
        v = v - half * self._gradient(x, after) / self.masses
        v, second = self._thermalised(v, generator)
        return x, v, first + second

    def _thermalised(self, v: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """O½ and the kinetic energy that it adds ``[b]``."""
        if self.friction == 0:
            return v, torch.zeros(len(v), dtype=torch.float64)
        kept = math.exp(-0.5 * self.friction * self.step_size)
        new = kept * v + math.sqrt(1 - kept**2) * self._maxwell(v, generator)
        return new, self._kinetic(new) - self._kinetic(v)

    def _gradient(self, x: Tensor, centre: Tensor | None) -> Tensor:
        _, gradient = self.target.value_and_grad(x)
        if centre is None:
            return gradient
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (pull,) = torch.autograd.grad(self.restraint.energy(self.variables(leaf), centre).sum(), leaf)
        return gradient + pull

    def _centre(self, ends: tuple[Tensor, Tensor] | None, schedule: Schedule, on: Tensor, s: Tensor) -> Tensor | None:
        if ends is None:
            return None
        start, end = ends[0][on], ends[1][on]
        return start + schedule.fraction(s)[:, None] * self.restraint.difference(end, start)

    def _hamiltonian(self, u: Tensor, xi: Tensor, v: Tensor, centre: Tensor | None) -> Tensor:
        total = u + self._kinetic(v)
        return total if centre is None else total + self.restraint.energy(xi, centre)

    def _kinetic(self, v: Tensor) -> Tensor:
        return 0.5 * (self.masses * v.square()).flatten(1).sum(1)

    def _maxwell(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64) / self.masses.sqrt()


def _film(start: Tensor, xi: Tensor, seen: Sequence[tuple[float, Tensor, Tensor, Tensor]], failure: str | None) -> PathFilm:
    s, centres, values, works = zip((0.0, start, xi, torch.zeros(1, dtype=torch.float64)), *seen, strict=True)
    return PathFilm(np.array(s), torch.stack(centres).numpy(), torch.stack(values).numpy(), torch.cat(works).numpy(), failure)
