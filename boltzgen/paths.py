"""The vocabulary of steered paths: restraint, schedule, walkers, what a path gives back, and the engines that run paths.

A path carries a collective variable ξ from near λ₀ to near λ₁ by a moving restraint. On the extended space (x, λ) with
π̂(x, λ) ∝ exp(−u(x) − r(ξ(x), λ)) the integral over λ is the same for every x, so that the x-marginal is exp(−u) exactly, for any ξ.
Everything is reduced: energies in kT, r = ½ Σ kᵢ (ξᵢ − λᵢ)², or Σ kᵢ (P/2π)² (1 − cos(2π (ξᵢ − λᵢ)/P)) where ξᵢ has a period P.

References:
    Schönle, Gabrié, Lelièvre and Stoltz, arXiv 2405.18160; Nilmeier et al., PNAS 108, E1009 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import WalkerState
from boltzgen.errors import InputError, ShapeError

Periods = tuple[float | None, ...]


class Restraint:
    """The energy r(ξ, λ) that ties collective variables to their centres.

    Args:
        stiffness: k of every variable, in kT per its unit squared.
        periods: Period of every variable, None where it has none.

    Raises:
        InputError: If a stiffness is not positive or the numbers differ.
    """

    def __init__(self, stiffness: Sequence[float], periods: Periods) -> None:
        self.stiffness = torch.tensor([float(k) for k in stiffness], dtype=torch.float64)
        self.periods = tuple(periods)
        if len(self.stiffness) != len(self.periods) or not bool((self.stiffness > 0).all() & self.stiffness.isfinite().all()):
            raise InputError(f"expected one positive stiffness for each of {len(self.periods)} variables, got {list(stiffness)}")
        self._turn = torch.tensor([math.inf if period is None else period for period in periods], dtype=torch.float64)
        self._periodic = self._turn.isfinite()

    @property
    def n_variables(self) -> int:
        """Number of collective variables."""
        return len(self.periods)

    def wrapped(self, values: Tensor) -> Tensor:
        """Values ``[b, k]`` with the periodic ones in [−P/2, P/2)."""
        if not self._periodic.any():
            return values
        turn = torch.where(self._periodic, self._turn, 1.0).to(values)
        return torch.where(self._periodic, torch.remainder(values + 0.5 * turn, turn) - 0.5 * turn, values)

    def difference(self, end: Tensor, start: Tensor) -> Tensor:
        """``end − start`` ``[b, k]``, by the shortest arc where periodic."""
        return self.wrapped(end - start)

    def energy(self, xi: Tensor, centre: Tensor) -> Tensor:
        """r(ξ, λ) ``[b]`` in kT of values and centres ``[b, k]``, differentiable."""
        apart = xi.to(torch.float64) - centre
        per_turn = torch.where(self._periodic, self._turn, 1.0) / (2 * math.pi)
        rise = torch.where(self._periodic, per_turn**2 * (1 - torch.cos(apart / per_turn)), 0.5 * apart**2)
        return (self.stiffness * rise).sum(1)

    def draw(self, xi: Tensor, *, generator: torch.Generator) -> Tensor:
        """Centres λ ``[b, k]`` distributed as exp(−r(ξ, λ)) at given ξ: normal, or von Mises where periodic."""
        noise = torch.randn(xi.shape, generator=generator, dtype=torch.float64) * self.stiffness.rsqrt()
        if self._periodic.any():
            rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
            per_turn = (self._turn / (2 * math.pi))[self._periodic]
            kappa = (self.stiffness[self._periodic] * per_turn**2).numpy()
            turned = torch.from_numpy(rng.vonmises(0.0, kappa, size=(len(xi), len(kappa))))
            noise[:, self._periodic] = per_turn * turned
        return self.wrapped(xi + noise)


@dataclass(frozen=True)
class Schedule:
    """How a path's centre moves: λ(s) = λ₀ + (λ₁ − λ₀) h(s), h(s) = s + c sin(2πs)/(2π), in K equal steps of s.

    h(1 − s) = 1 − h(s) for every c, so that the way back is the way there. c = −1 starts and ends at rest, c > 0 slows down halfway.

    Attributes:
        n_steps: K.
        bend: c, from −1 to 1.
        span: Distance of every variable for which a path takes ``n_steps``: others take ``n_steps`` |Δ/span| (at least 1), with the
            Euclidean norm over the variables. None: all take ``n_steps``.
        looks: Distance of every variable that the centre goes at most between two looks at a path; None: nobody looks.

    Raises:
        InputError: If a number is out of range.
    """

    n_steps: int
    bend: float = 0.0
    span: tuple[float, ...] | None = None
    looks: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        lengths = (*(self.span or ()), *(self.looks or ()))
        if self.n_steps < 1 or not -1.0 <= self.bend <= 1.0 or any(not length > 0 for length in lengths):
            raise InputError(f"expected n_steps >= 1, -1 <= bend <= 1 and positive spans and looks, got {self}")

    def fraction(self, s: Tensor) -> Tensor:
        """h(s)."""
        return s + self.bend * torch.sin(2 * math.pi * s) / (2 * math.pi)

    def steps(self, difference: Tensor) -> Tensor:
        """Steps of paths over ``difference`` ``[b, k]``: int64 ``[b]``. The same for the way back."""
        if self.span is None:
            return torch.full((len(difference),), self.n_steps, dtype=torch.int64)
        relative = (difference.to(torch.float64) / torch.tensor(self.span, dtype=torch.float64)).norm(dim=1)
        return (self.n_steps * relative).ceil().clamp(min=1).to(torch.int64)

    def looked_at(self, difference: Tensor) -> list[tuple[int, ...]]:
        """Steps between the ends after which paths over ``difference`` ``[b, k]`` are looked at: the same from both ends."""
        if self.looks is None:
            return [()] * len(difference)
        far = (difference.to(torch.float64) / torch.tensor(self.looks, dtype=torch.float64)).norm(dim=1)
        return [_mirrored(n, 2 * math.ceil(0.5 * m)) for n, m in zip(self.steps(difference).tolist(), far.tolist(), strict=True)]


def _mirrored(n_steps: int, m: int) -> tuple[int, ...]:
    """About ``m`` steps, evenly spaced between 0 and ``n_steps``; K − k is one of them where k is."""
    first = {round(j * n_steps / (m + 1)) for j in range(1, m // 2 + 1)} - {0}
    return tuple(sorted(first | {n_steps - k for k in first}))


@dataclass(frozen=True, kw_only=True)
class PathWalkers(WalkerState):
    """Walkers with the values ``xi`` ``[w, k]`` of their collective variables."""

    xi: Tensor


@dataclass(frozen=True)
class PathResult:
    """Ends of a set of paths.

    Attributes:
        x: Configurations ``[w, *event]`` in nm; those of the start where a path failed.
        u: Their reduced potentials ``[w]``, without restraint.
        xi: Their collective variables ``[w, k]``.
        work: H_{λ₁}(x_K, v_K) − H_{λ₀}(x₀, v₀) − Q ``[w]`` in kT, +inf where a path failed.
        n_force: Force evaluations of every path, energies included, int64 ``[w]``.
        failures: Why a path failed, by walker.
        films: Every path at its start and at the looks of the schedule; empty where it asks for none.
    """

    x: Tensor
    u: Tensor
    xi: Tensor
    work: Tensor
    n_force: Tensor
    failures: dict[int, str] = field(default_factory=dict)
    films: Sequence[PathFilm] = ()


@dataclass(frozen=True)
class PathFilm:
    """One path, looked at between its ends.

    Attributes:
        s: Share of its steps that are done ``[f]``, from 0; to 1 unless it failed.
        centre: λ(s) ``[f, k]``, without jumps where periodic.
        xi: ξ ``[f, k]``.
        work: H_{λ(s)} − H_{λ₀} − Q so far ``[f]`` in kT, the error of the time step included.
        failure: Why it failed, None where it did not.
    """

    s: np.ndarray
    centre: np.ndarray
    xi: np.ndarray
    work: np.ndarray
    failure: str | None = None


class SteeringEngine(Protocol):
    """Runs paths of reversible dynamics under a moving restraint: O½ V½ R½ [λ] R½ V½ O½, K times."""

    restraint: Restraint

    def locate(self, x: Tensor) -> PathWalkers:
        """Walkers at ``x`` ``[w, *event]`` in nm."""

    def steer(self, walkers: PathWalkers, start: Tensor, end: Tensor, *, schedule: Schedule, generator: torch.Generator) -> PathResult:
        """Paths from fresh Maxwell velocities while the centre moves from ``start`` to ``end``, both ``[w, k]``.

        They are looked at as the schedule asks, which counts as force evaluations and changes nothing else of paths without friction.
        """

    def roam(self, walkers: PathWalkers, *, n_steps: int, generator: torch.Generator) -> PathResult:
        """Paths of the same dynamics without restraint."""


class DrivingEngine(Protocol):
    """Runs paths on which the atoms of a solute are moved and the others follow: O½ V½ R½ [solute] R½ V½ O½, K times."""

    solute: tuple[int, ...]

    def locate(self, x: Tensor) -> PathWalkers:
        """Walkers at ``x`` ``[w, *event]`` in nm."""

    def drive(self, walkers: PathWalkers, corners: Tensor, *, steps: Tensor, schedule: Schedule, generator: torch.Generator) -> PathResult:
        """Paths from fresh Maxwell velocities of the other atoms while the solute is moved.

        The solute goes through ``corners`` ``[w, m + 1, k, 3]`` in nm, at the fraction h of m straight legs, in ``steps`` ``[w]``.
        """

    def roam(self, walkers: PathWalkers, *, n_steps: int, generator: torch.Generator) -> PathResult:
        """Paths of the same dynamics of all atoms."""


@dataclass(frozen=True)
class _Table:
    """Columns of as many rows each."""

    _OF: ClassVar[str]

    def arrays(self) -> dict[str, Any]:
        """The columns by name, as they are stored."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def rows(self, chosen: np.ndarray) -> Self:
        """Some of the rows, by a mask or by their numbers."""
        return type(self)(**{name: column[chosen] for name, column in self.arrays().items()})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several tables, in order.

        Raises:
            InputError: If there is none.
        """
        if not parts:
            raise InputError(f"expected at least one table of {cls._OF}, got none")
        return cls(**{item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(cls)})


@dataclass(frozen=True)
class Paths(_Table):
    """Every path that was tried, accepted or not, one row each.

    Attributes:
        start: λ₀ ``[n, k]``.
        end: λ₁ ``[n, k]``.
        xi_start: ξ(x₀) ``[n, k]``.
        xi_end: ξ(x_K) ``[n, k]``, of the proposed configuration, whatever became of it; NaN where the path failed.
        log_proposal_ratio: ln ρ(λ₁) − ln ρ(λ₀) ``[n]``.
        work: Work of the path ``[n]`` in kT, +inf where it failed.
        accepted: bool ``[n]``.
        walker: Which walker, int64 ``[n]``.
        time: Number of the move, int64 ``[n]``; moves of one time are of different walkers.
        n_force: Force evaluations ``[n]``.
    """

    _OF: ClassVar[str] = "paths"

    start: np.ndarray
    end: np.ndarray
    xi_start: np.ndarray
    xi_end: np.ndarray
    log_proposal_ratio: np.ndarray
    work: np.ndarray
    accepted: np.ndarray
    walker: np.ndarray
    time: np.ndarray
    n_force: np.ndarray

    def __post_init__(self) -> None:
        lengths = {item.name: len(getattr(self, item.name)) for item in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ShapeError(f"expected as many rows everywhere, got {lengths}")

    def __len__(self) -> int:
        return len(self.work)

    @property
    def w(self) -> np.ndarray:
        """work + ln ρ(λ₁) − ln ρ(λ₀) ``[n]``: a path is accepted with probability min(1, e^{−w})."""
        return self.work + self.log_proposal_ratio

    @property
    def failed(self) -> np.ndarray:
        """Which paths blew up, bool ``[n]``."""
        return np.isnan(self.xi_end).any(axis=1)


@dataclass(frozen=True)
class Looks(_Table):
    """Paths on their way, one row for each look; those that failed are left out, and so are the ends.

    Attributes:
        walker: Walker of the path, int64 ``[m]``.
        time: Number of its move, int64 ``[m]``.
        centre: λ ``[m, k]``.
        xi: ξ ``[m, k]``.
        work: H_λ − H_{λ₀} − Q so far ``[m]`` in kT.
    """

    _OF: ClassVar[str] = "looks"

    walker: np.ndarray
    time: np.ndarray
    centre: np.ndarray
    xi: np.ndarray
    work: np.ndarray

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.arrays().items()}
        if len(set(lengths.values())) != 1:
            raise ShapeError(f"expected as many rows everywhere, got {lengths}")

    def __len__(self) -> int:
        return len(self.work)

    @classmethod
    def none(cls, n_variables: int) -> Looks:
        """No looks."""
        nobody, nowhere = np.zeros(0, dtype=np.int64), np.zeros((0, n_variables))
        return cls(nobody, nobody, nowhere, nowhere, np.zeros(0))

    @classmethod
    def of(cls, result: PathResult, *, time: int) -> Looks:
        """What was seen of the paths of one move."""
        k = result.xi.shape[1]
        seen = [(row, film) for row, film in enumerate(result.films) if film.failure is None and row not in result.failures]
        walker = np.repeat(np.array([row for row, _ in seen], dtype=np.int64), [len(film.s) - 1 for _, film in seen])
        columns = {name: [getattr(film, name)[1:] for _, film in seen] for name in ("centre", "xi", "work")}
        centre, xi = (np.concatenate([np.zeros((0, k)), *columns[name]]) for name in ("centre", "xi"))
        return cls(
            walker=walker, time=np.full(len(walker), time), centre=centre, xi=xi, work=np.concatenate([np.zeros(0), *columns["work"]])
        )
