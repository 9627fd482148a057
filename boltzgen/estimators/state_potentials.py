"""Reduced potentials of samples of several states in all of these states, with what an error bar needs to know of the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from boltzgen.core import Role, require_exact_rows
from boltzgen.errors import EnergyError, InputError, ShapeError
from boltzgen.estimators.bootstrap import INEFFICIENCIES_IN_A_UNIT, numbered
from boltzgen.estimators.mbar_equations import log_mixture, solve_mbar
from boltzgen.estimators.timeseries import statistical_inefficiency
from boltzgen.estimators.works import MAX_NAN_SHARE

#: Shares of a row that vary by less than this say nothing of its memory.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class StatePotentials:
    """Reduced potentials u_k(x_n), in kT, of samples of K states; without a map, or pulled back by maps to one space.

    Attributes:
        u: Reduced potential of every sample in every state ``[K, N]``, float64; +inf is weight zero.
        state: State that every sample was drawn from ``[N]``, ascending. A state without samples is known by reweighting alone.
        units: Independent unit of every sample ``[N]``, labels 0 to m − 1. Samples of several states may share units.
        chain: Chain of every sample within its state ``[N]``, from 0.
        time: When it was drawn, counted along its chain ``[N]``, from 0.
        role: ``train`` or ``evaluate``; estimators refuse rows that trained a map.
        n_nan: Rows left out because an energy was not a number.
        log_det_error: Error of the Jacobians in nats; None where one is only estimated.
        is_exact: False when an energy is that of an altered target.
    """

    u: np.ndarray
    state: np.ndarray
    units: np.ndarray
    chain: np.ndarray
    time: np.ndarray
    role: Role
    n_nan: int = 0
    log_det_error: float | None = 0.0
    is_exact: bool = True

    @classmethod
    def of(
        cls,
        u: Sequence[np.ndarray],
        *,
        role: Role,
        log_det_error: float | None,
        is_exact: bool = True,
        chain: Sequence[np.ndarray] | None = None,
        time: Sequence[np.ndarray] | None = None,
    ) -> StatePotentials:
        """Check potentials and count what is not a number; every row is its own unit until :meth:`blocked`.

        Args:
            u: For every state, the reduced potentials of its samples in all states ``[K, n_k]`` in kT; n_k = 0 is allowed but for state 0.
            role: Whether these rows trained a map.
            log_det_error: Error of the Jacobians in nats; 0 without maps.
            is_exact: Whether all targets are.
            chain: For every state, the chain of every sample ``[n_k]``, from 0; one chain by default.
            time: For every state, when each sample was drawn, in frames of its chain ``[n_k]``; one after the other by default.

        Raises:
            ShapeError: If shapes do not belong together.
            InputError: If state 0, or all states but one, have no samples.
            EnergyError: If an energy is −inf, more than 0.1 % of the rows of a state are NaN, or a row is impossible in its own state.
        """
        parts = [np.asarray(part, dtype=np.float64) for part in u]
        if any(part.ndim != 2 or len(part) != len(parts) for part in parts):
            raise ShapeError(f"expected potentials [{len(parts)}, n] for each of {len(parts)} states, got {[part.shape for part in parts]}")
        counts = [part.shape[1] for part in parts]
        if len(parts) < 2 or not counts[0] or np.count_nonzero(counts) < 2:
            raise InputError(f"expected samples of state 0 and of another one at least, got {counts} samples")
        kept = [_numbers(part, k) for k, part in enumerate(parts)]
        chains = [np.zeros(n, dtype=np.int64) for n in counts] if chain is None else [np.asarray(one, dtype=np.int64) for one in chain]
        times = [_order(one) for one in chains] if time is None else [np.asarray(one) for one in time]
        if [one.shape for one in chains] != [(n,) for n in counts] or [one.shape for one in times] != [(n,) for n in counts]:
            raise ShapeError(f"expected a chain and a time for every sample: {counts} of them")
        n_kept = [int(rows.sum()) for rows in kept]
        chained, timed = (np.concatenate([one[rows] for one, rows in zip(many, kept, strict=True)]) for many in (chains, times))
        return cls(
            u=np.concatenate([part[:, rows] for part, rows in zip(parts, kept, strict=True)], axis=1),
            state=np.repeat(np.arange(len(parts)), n_kept), units=np.arange(sum(n_kept)), chain=chained, time=timed, role=role,
            n_nan=sum(counts) - sum(n_kept), log_det_error=log_det_error, is_exact=is_exact,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.state)

    @property
    def n_k(self) -> np.ndarray:
        """Samples of every state ``[K]``."""
        return np.bincount(self.state, minlength=len(self.u))

    def rows(self, chosen: np.ndarray) -> StatePotentials:
        """Some of the rows, bool ``[N]``."""
        units = numbered(self.units[chosen])
        return replace(self, u=self.u[:, chosen], state=self.state[chosen], units=units, chain=self.chain[chosen], time=self.time[chosen])

    def halves(self) -> tuple[StatePotentials, StatePotentials]:
        """The first and the second half in time of every chain."""
        early = np.zeros(len(self), dtype=bool)
        for entries in self._chains():
            early[entries] = self.time[entries] < self.time[entries].mean()
        return self.rows(early), self.rows(~early)

    def blocked(self, *, at_least: Sequence[float] | None = None, together: bool = False) -> StatePotentials:
        """The same rows in units of consecutive ones of a chain, five times as long as their memory.

        Args:
            at_least: For every state, a statistical inefficiency in frames that these potentials may not show, that of the slowest
                coordinate for instance.
            together: Whether chains of the same number exchanged their configurations, so that what one state saw another one saw soon
                after: a unit then holds the rows of all states at these times, and is as long as the longest memory of a state asks for.

        Raises:
            InputError: If a state then has one unit.
            NoOverlapError: If states are not tied together, so that shares mean nothing.
        """
        memory = np.maximum(self.statistical_inefficiencies(), 1.0 if at_least is None else np.asarray(at_least))
        if together:
            memory = np.full(len(self.u), memory.max())
        units = np.empty(len(self), dtype=np.int64)
        for entries in self._chains():
            k, first, span = self.state[entries[0]], self.time[entries].min(), np.ptp(self.time[entries]) + 1
            if together:
                times = self.time[self.chain == self.chain[entries[0]]]
                first, span = times.min(), np.ptp(times) + 1
            n_units = max(1, int(span // math.ceil(INEFFICIENCIES_IN_A_UNIT * memory[k])))
            part = (self.time[entries] - first) * n_units // span
            units[entries] = (self.chain[entries[0]] * len(self.u) + (0 if together else k)) * (len(self) + 1) + part
        made = replace(self, units=numbered(units))
        for k in np.unique(self.state):
            if len(np.unique(made.units[self.state == k])) < 2:
                raise InputError(
                    f"the {int(self.n_k[k])} samples of state {k} form one independent unit, of {INEFFICIENCIES_IN_A_UNIT * memory[k]:.0f} "
                    "frames at least: expected 2 or more; sample longer"
                )
        return made

    def statistical_inefficiencies(self) -> np.ndarray:
        """Frames of every state worth one independent frame ``[K]``, of how rows are shared out among the states (p_k of MBAR), which is
        bounded and is all that estimates depend on; 1 for states without samples or with constant shares."""
        f, sampled = solve_mbar(self.u, self.state, np.ones(len(self))), self.n_k > 0
        log_n = np.log(self.n_k[sampled])
        shares = np.exp((log_n + f[sampled])[:, None] - self.u[sampled] - log_mixture(self.u[sampled], self.n_k[sampled], f[sampled]))
        found = np.ones(len(self.u))
        for entries in self._chains():
            series = [share for share in shares[:, entries] if np.ptp(share) > _CONSTANT]
            k = self.state[entries[0]]
            found[k] = max([found[k], *(statistical_inefficiency(one) for one in series)])
        return found

    def strata(self) -> list[np.ndarray]:
        """Rows of states that share no unit with others, in groups that are drawn on their own."""
        group = np.arange(len(self.u))
        first = np.full(int(self.units.max()) + 1, -1)
        for k in range(len(self.u)):
            mine = np.unique(self.units[self.state == k])
            for other in np.unique(first[mine][first[mine] >= 0]):
                group[group == group[other]] = group[k]
            first[mine] = k
        of_row = group[self.state]
        return [np.flatnonzero(of_row == one) for one in np.unique(of_row)]

    def require_exact(self) -> StatePotentials:
        """These potentials, if a statistically exact number may rest on them.

        Raises:
            TrainingDataError: If the rows trained a map.
            InexactDensityError: If a Jacobian or an energy is not exact.
        """
        require_exact_rows(self.role, is_exact=self.is_exact, log_det_error=self.log_det_error)
        return self

    def _chains(self) -> list[np.ndarray]:
        """Rows of every chain of every state."""
        label = self.state * (int(self.chain.max()) + 1) + self.chain
        return [np.flatnonzero(label == one) for one in np.unique(label)]

    @property
    def note(self) -> str:
        """What a reader must know of the rows, or an empty string."""
        return f"{self.n_nan} rows with energies that were not a number are left out" if self.n_nan else ""


def _numbers(u: np.ndarray, k: int) -> np.ndarray:
    """Rows of state ``k`` whose energies are all numbers, bool ``[n]``."""
    bad = np.isnan(u).any(axis=0)
    if bad.sum() > MAX_NAN_SHARE * u.shape[1]:
        raise EnergyError(
            f"{int(bad.sum())} of {u.shape[1]} samples of state {k} have energies that are NaN, rows {np.flatnonzero(bad)[:10].tolist()}: "
            f"at most {100 * MAX_NAN_SHARE:g} % may have; find out why their energies fail"
        )
    if np.isneginf(u).any():
        raise EnergyError(f"sample {int(np.argwhere(np.isneginf(u))[0, 1])} of state {k} has an energy of -inf")
    if np.isposinf(u[k]).any():
        raise EnergyError(
            f"sample {int(np.argmax(np.isposinf(u[k])))} of state {k} has infinite energy in this state: it cannot come from it"
        )
    return ~bad


def _order(chain: np.ndarray) -> np.ndarray:
    """Number of every row within its chain."""
    found = np.empty(len(chain), dtype=np.int64)
    for one in np.unique(chain):
        found[chain == one] = np.arange(int((chain == one).sum()))
    return found
