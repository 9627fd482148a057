"""Monte Carlo moves of the configuration in an OpenMM context, whoever owns it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from boltzgen.core import Distribution
from boltzgen.cvs import CollectiveVariable, CollectiveVariables
from boltzgen.errors import EnergyError, InputError
from boltzgen.md.steering import OpenMMSteering
from boltzgen.paths import Schedule
from boltzgen.sampling.steered import SteeredMove
from boltzgen.units import thermal_energy
from boltzgen.workflows.plugins.densities import FlowSource, MoleculeDensity, flow_source_of, positions_tensor
from boltzgen.workflows.plugins.descriptions import built, described, in_box
from boltzgen.workflows.plugins.distributions import DistributionSource, source_of
from boltzgen.workflows.plugins.engines import shared_engines

logger = logging.getLogger(__name__)

#: Energies of one configuration in two contexts may differ by this much, in kT, and by this share, for rounding.
_SAME_KT, _SAME_SHARE = 0.05, 1e-5
_LARGEST_SEED = 2**31 - 1


class ContextMove(ABC):
    """A move that leaves the Boltzmann density of a context invariant.

    The context holds the Hamiltonian (its system and global parameters), the box and the present configuration; afterwards it holds the
    new one, with fresh Maxwell velocities. The random numbers of move number n come from a torch generator seeded by the hash of
    ``seed``, n, the temperature and the global parameters: a resumed move goes on where it stopped, and copies of a move that serve
    different states, as multistate samplers make them, do not share their noise.

    Args:
        seed: Seed of all random numbers.

    Attributes:
        n_proposed: Moves so far.
        n_accepted: Those accepted.
        n_failed: Those rejected because a path blew up, or a proposal has no energy or density.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = int(seed)
        self.n_proposed = self.n_accepted = self.n_failed = 0

    @abstractmethod
    def move(self, context: openmm.Context, temperature_kelvin: float) -> bool:
        """One move of the configuration in a context; whether it changed."""

    @property
    def statistics(self) -> dict[str, Any]:
        """Counters, by name."""
        return {"n_accepted": self.n_accepted, "n_proposed": self.n_proposed, "n_failed": self.n_failed}

    @statistics.setter
    def statistics(self, value: dict[str, Any]) -> None:
        self.n_accepted, self.n_proposed, self.n_failed = (int(value[name]) for name in ("n_accepted", "n_proposed", "n_failed"))

    @property
    def acceptance(self) -> float:
        """Fraction of the moves that were accepted; NaN before the first."""
        return self.n_accepted / self.n_proposed if self.n_proposed else math.nan

    def __getstate__(self) -> dict[str, Any]:
        return {"seed": self.seed, "statistics": self.statistics}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self.statistics = state["statistics"]

    def _generator(self, context: openmm.Context, temperature_kelvin: float) -> torch.Generator:
        """The generator of the next move."""
        parameters = sorted(dict(context.getParameters()).items())
        key = json.dumps([type(self).__name__, self.seed, self.n_proposed, temperature_kelvin, parameters])
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True))

    def _refresh(self, context: openmm.Context, temperature_kelvin: float, generator: torch.Generator) -> None:
        """Maxwell velocities."""
        seed = int(torch.randint(1, _LARGEST_SEED, (1,), generator=generator))
        context.setVelocitiesToTemperature(temperature_kelvin * unit.kelvin, seed)


class SteeredPath(ContextMove):
    """Steer collective variables to proposed values, out of equilibrium, and accept or reject the path exactly.

    At constant pressure a path runs at the present volume V. The joint density of configuration and volume, exp(−β(U(x; V) + pV)) times
    a function of V, is at given V that of the canonical ensemble in this box: a move that leaves every one of those invariant leaves the
    joint density invariant. The volume itself is moved by others.

    Args:
        cvs: Collective variables ξ. Those with a box take that of the context.
        proposal: Density ρ of their values: a file of a saved distribution, or one that is written down, such as ``normal_mixture(...)``.
        n_steps: Steps of a path.
        widths: Width σ = √(kT/κ) to which every variable is held, in its unit.
        timestep: An OpenMM quantity.
        friction: γ, an OpenMM quantity; 0, deterministic paths, by default.
        bend: Of the schedule (:class:`boltzgen.paths.Schedule`).
        span: Distance of every variable for which a path takes ``n_steps``; all take ``n_steps`` by default.
        seed: Seed of all random numbers.
        keep_works: How many of the latest works are kept, and stored with every state of the move.

    Attributes:
        works: w of the latest paths, in order, +inf where one failed: accepted with probability min(1, e^{−w}).

    Raises:
        InputError: If a number makes no sense.

    References:
        See :class:`boltzgen.sampling.steered.SteeredMove`.
    """

    def __init__(
        self,
        cvs: Sequence[CollectiveVariable],
        proposal: DistributionSource | str | Path,
        *,
        n_steps: int,
        widths: Sequence[float],
        timestep: unit.Quantity,
        friction: unit.Quantity = 0.0 / unit.picosecond,
        bend: float = 0.0,
        span: Sequence[float] | None = None,
        seed: int = 0,
        keep_works: int = 256,
    ) -> None:
        super().__init__(seed=seed)
        self.cvs = CollectiveVariables(cvs)
        self.proposal = source_of(proposal)
        self.schedule = Schedule(n_steps, bend=bend, span=None if span is None else tuple(float(length) for length in span))
        self.widths = [float(width) for width in widths]
        self.timestep_ps = float(timestep.value_in_unit(unit.picosecond))
        self.friction_per_ps = float(friction.value_in_unit(unit.picosecond**-1))
        if len(self.widths) != len(self.cvs) or not all(width > 0 for width in self.widths):
            raise InputError(f"expected one positive width for each of {', '.join(self.cvs.names)}, got {self.widths}")
        if not (self.timestep_ps > 0 and self.friction_per_ps >= 0 and keep_works >= 0):
            raise InputError(f"expected a positive time step, and a friction and keep_works of 0 or more, got {self.timestep_ps} ps, "
                             f"{self.friction_per_ps} /ps and {keep_works}")  # fmt: skip
        self.works: deque[float] = deque(maxlen=keep_works)
        self._distribution: Distribution | None = None

    @torch.no_grad()
    def move(self, context: openmm.Context, temperature_kelvin: float) -> bool:
        """One path.

        Raises:
            CheckpointError: If the file of the proposal is not what it was.
            EnergyError: If the start has no finite energy, or another one in the context of paths.
            InputError: If a variable or the system cannot be steered.
        """
        generator = self._generator(context, temperature_kelvin)
        engine = self._engine(context, temperature_kelvin)
        if context.getSystem().getNumConstraints():
            context.applyConstraints(engine.constraint_tolerance)
        state = context.getState(positions=True, energy=True)
        walkers = engine.locate(positions_tensor(state))
        _require_same_energy(float(walkers.u), state.getPotentialEnergy()._value / thermal_energy(temperature_kelvin))
        if self._distribution is None:
            self._distribution = self.proposal.load()
        after, info = SteeredMove(engine, self._distribution, schedule=self.schedule).step(walkers, generator=generator)
        accepted = bool(info.accepted)
        if accepted:
            context.setPositions(after.x[0].numpy())
        self._refresh(context, temperature_kelvin, generator)
        self._count(accepted, -float(info.log_ratio), info.result.failures.get(0))
        return accepted

    @property
    def statistics(self) -> dict[str, Any]:
        """Counters and the latest works, by name."""
        return {**super().statistics, "works": list(self.works)}

    @statistics.setter
    def statistics(self, value: dict[str, Any]) -> None:
        ContextMove.statistics.fset(self, value)  # type: ignore[attr-defined]
        self.works = deque(value["works"], maxlen=self.works.maxlen)

    def __getstate__(self) -> dict[str, Any]:
        schedule = {"n_steps": self.schedule.n_steps, "bend": self.schedule.bend,
                    "span": None if self.schedule.span is None else list(self.schedule.span)}  # fmt: skip
        return {
            **super().__getstate__(), "cvs": [described(cv) for cv in self.cvs], "proposal": self.proposal.to_dict(), "schedule": schedule,
            "widths": list(self.widths), "timestep_ps": self.timestep_ps, "friction_per_ps": self.friction_per_ps,
            "keep_works": self.works.maxlen,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        schedule = state["schedule"]
        self.works = deque(maxlen=state["keep_works"])
        super().__setstate__(state)
        self.cvs = CollectiveVariables(built(description) for description in state["cvs"])
        self.proposal = source_of(state["proposal"])
        self.schedule = Schedule(schedule["n_steps"], bend=schedule["bend"], span=schedule["span"] and tuple(schedule["span"]))
        self.widths, self.timestep_ps, self.friction_per_ps = state["widths"], state["timestep_ps"], state["friction_per_ps"]
        self._distribution = None

    def _engine(self, context: openmm.Context, temperature_kelvin: float) -> OpenMMSteering:
        """The shared engine of this system, under the conditions of the context."""
        engine = shared_engines.engine(context, self.cvs, friction_per_ps=self.friction_per_ps)
        parameters = {name: value for name, value in dict(context.getParameters()).items() if name in engine.parameter_names}
        box, variables = None, self.cvs
        if context.getSystem().usesPeriodicBoundaryConditions():
            box = np.array(context.getState().getPeriodicBoxVectors(asNumpy=True)._value)
            variables = in_box(self.cvs, box)
        engine = engine.at(temperature_kelvin, box=box, parameters=parameters, variables=variables)
        return engine.with_settings(widths=self.widths, timestep_ps=self.timestep_ps)

    def _count(self, accepted: bool, w: float, failure: str | None) -> None:
        self.n_proposed += 1
        self.n_accepted += accepted
        self.works.append(w)
        if failure is not None:
            self.n_failed += 1
            if math.log10(self.n_failed).is_integer():
                logger.warning(
                    "%d of %d steered paths blew up and were rejected (%s): take a smaller time step, or larger widths", self.n_failed,
                    self.n_proposed, failure,
                )  # fmt: skip


class FlowProposal(ContextMove):
    """Propose all coordinates of a molecule from a flow, independently of where it is, and accept or reject exactly.

    x' ~ q is accepted with probability min(1, w(x')/w(x)), w = exp(−u)/q, u at the temperature and parameters of the context, whatever the
    flow was trained for. A configuration that the flow cannot make (another mirror image, or labelling) is never left by this move.

    Args:
        flow: Folder of a finished run, or a saved or written-down distribution over all 3n coordinates.
        n_proposals: Proposals of one move, drawn at once and tried one after the other.
        seed: Seed of all random numbers.

    Attributes:
        n_outside: Proposals that met a configuration which the flow cannot make.

    Raises:
        InputError: If there is no flow.

    References:
        Tierney, Ann. Statist. 22, 1701 (1994), independence chains; Noé et al., Science 365, eaaw1147 (2019).
    """

    def __init__(self, flow: FlowSource | DistributionSource | str | Path, *, n_proposals: int = 1, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.flow = flow_source_of(flow)
        if n_proposals < 1:
            raise InputError(f"expected at least one proposal, got {n_proposals}")
        self.n_proposals, self.n_outside = int(n_proposals), 0
        self._density: MoleculeDensity | None = None

    @torch.no_grad()
    def move(self, context: openmm.Context, temperature_kelvin: float) -> bool:
        """``n_proposals`` proposals.

        Raises:
            CheckpointError: If the file of the flow is not what it was.
            EnergyError: If the start has no finite energy.
            InputError: If the flow does not describe the system.
        """
        generator = self._generator(context, temperature_kelvin)
        if self._density is None:
            self._density = self.flow.load()
        density, kt = self._density, thermal_energy(temperature_kelvin)
        density.require_fits(context.getSystem())
        state = context.getState(positions=True, energy=True)
        x, u = positions_tensor(state), state.getPotentialEnergy()._value / kt
        if not math.isfinite(u):
            raise EnergyError(f"the present configuration has energy {u} kT: minimise the start")
        log_w = -u - float(density.metric_potential(x)) - float(density.log_prob(x))
        proposals, log_q = density.draw(self.n_proposals, generator=generator)
        thresholds = torch.rand(self.n_proposals, generator=generator, dtype=torch.float64).log()
        moved = False
        for y, log_q_y, threshold in zip(proposals, log_q.tolist(), thresholds.tolist(), strict=True):
            y = density.frame.place(y, x[0], generator=generator)[None]
            log_w_y = -math.inf if math.isnan(log_q_y) else -self._potential(context, y, kt) - float(density.metric_potential(y)) - log_q_y
            accepted = threshold < log_w_y - log_w
            self.n_proposed += 1
            self.n_accepted += accepted
            self.n_failed += log_w_y == -math.inf
            self.n_outside += log_w == math.inf
            if accepted:
                x, log_w, moved = y, log_w_y, True
        context.setPositions(x[0].numpy())
        self._refresh(context, temperature_kelvin, generator)
        return moved

    @property
    def statistics(self) -> dict[str, Any]:
        """Counters, by name."""
        return {**super().statistics, "n_outside": self.n_outside}

    @statistics.setter
    def statistics(self, value: dict[str, Any]) -> None:
        ContextMove.statistics.fset(self, value)  # type: ignore[attr-defined]
        self.n_outside = int(value["n_outside"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "flow": self.flow.to_dict(), "n_proposals": self.n_proposals}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.flow, self.n_proposals = flow_source_of(state["flow"]), state["n_proposals"]
        self._density = None

    @staticmethod
    def _potential(context: openmm.Context, x: Tensor, kt: float) -> float:
        """Reduced potential of one configuration; +inf where OpenMM finds none."""
        try:
            context.setPositions(x[0].numpy())
            u = context.getState(energy=True).getPotentialEnergy()._value / kt
        except openmm.OpenMMException:
            return math.inf
        return math.inf if math.isnan(u) else u


def _require_same_energy(steered: float, own: float) -> None:
    if not abs(steered - own) <= _SAME_KT + _SAME_SHARE * abs(own):
        raise EnergyError(f"the configuration has energy {own:.6g} kT in the sampler's context and {steered:.6g} kT in that of the steered "
                          f"paths: its states differ by more than global parameters, which a steered path cannot follow")  # fmt: skip
