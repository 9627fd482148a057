"""Local moves alternating with non-local ones whose proposal is learned from where the walkers have been; then production, frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from boltzgen.core import Move, MoveInfo, WalkerState
from boltzgen.errors import InputError

Stage = Literal["adaptation", "production"]


class Learner(ABC):
    """What a non-local move proposes from, and how it is learned."""

    @abstractmethod
    def observe(self, state: WalkerState, *, generator: torch.Generator) -> None:
        """Take in where the walkers are now."""

    @abstractmethod
    def learn(self, *, generator: torch.Generator) -> Mapping[str, float]:
        """Learn from all that was observed; numbers to record."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of all that was observed: nothing is learned any more."""

    @abstractmethod
    def move(self) -> Move | None:
        """The non-local move with what was learned last, frozen; None before anything was."""

    @abstractmethod
    def snapshot(self) -> Mapping[str, Any]:
        """Tensors and plain values from which :meth:`restore` goes on."""

    @abstractmethod
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot."""


@dataclass(frozen=True)
class Plan:
    """How long each stage is. A cycle is ``n_local`` local moves and one non-local move of every walker.

    Attributes:
        n_local: Local moves in a cycle.
        n_rounds: Rounds of adaptation; after each the proposal is learned again.
        n_cycles: Cycles in a round.
        n_production: Cycles of production.

    Raises:
        InputError: If a number is negative, or there is no production.
    """

    n_local: int
    n_rounds: int
    n_cycles: int
    n_production: int

    def __post_init__(self) -> None:
        if self.n_local < 0 or self.n_rounds < 0 or self.n_cycles < 1 or self.n_production < 1:
            raise InputError(f"expected numbers of moves, rounds and cycles, and some production, got {self}")

    @property
    def n_adaptation(self) -> int:
        """Cycles of adaptation."""
        return self.n_rounds * self.n_cycles

    @property
    def n_total(self) -> int:
        """All cycles."""
        return self.n_adaptation + self.n_production


@dataclass(frozen=True)
class Cycle:
    """What one cycle did.

    Attributes:
        number: Its number, from 0.
        stage: ``adaptation`` or ``production``.
        round: Its round, from 0; the number of rounds in production.
        visited: The walkers after each local move.
        before: The walkers after all of them, from which the non-local move started.
        state: The walkers at its end.
        local: What every local move did.
        jump: What the non-local move did; None where nothing was learned yet.
        learned: Numbers of the learning that followed it, at the end of a round.
    """

    number: int
    stage: Stage
    round: int
    visited: tuple[WalkerState, ...]
    before: WalkerState
    state: WalkerState
    local: tuple[MoveInfo, ...]
    jump: MoveInfo | None
    learned: Mapping[str, float] | None = None


class AdaptiveSampler:
    """The loop: local moves, observation, a non-local move; learning after every round; then production with everything frozen.

    During adaptation the proposal depends on the walkers' past, so that nothing of it may enter an estimate. In production every move
    leaves the target invariant, whatever was learned.

    Args:
        local: Local move.
        learner: Gives the non-local moves.
        plan: How long each stage is.
        state: Walkers to start from.
        generator: Source of all randomness.

    Attributes:
        n_done: Cycles done.

    References:
        Gabrié, Rotskoff and Vanden-Eijnden, PNAS 119, e2109420119 (2022), algorithm 1.
    """

    def __init__(self, local: Move, learner: Learner, *, plan: Plan, state: WalkerState, generator: torch.Generator) -> None:
        self.local, self.learner, self.plan, self.state, self.generator = local, learner, plan, state, generator
        self.n_done = 0

    @property
    def stage(self) -> Stage:
        """Stage of the next cycle."""
        return "adaptation" if self.n_done < self.plan.n_adaptation else "production"

    @property
    def finished(self) -> bool:
        """Whether all cycles are done."""
        return self.n_done >= self.plan.n_total

    def run(self, keep: Callable[[Cycle], bool]) -> None:
        """Do the cycles that are left; ``keep`` takes each, and says whether to go on."""
        while not self.finished:
            if not keep(self.advance()):
                return

    def advance(self) -> Cycle:
        """One cycle, and the learning that is due after it."""
        number, stage, state = self.n_done, self.stage, self.state
        local, visited = list[MoveInfo](), list[WalkerState]()
        for _ in range(self.plan.n_local):
            state, info = self.local.step(state, generator=self.generator)
            local.append(info)
            visited.append(state)
        if stage == "adaptation":
            self.learner.observe(state, generator=self.generator)
        before, move, jump, learned = state, self.learner.move(), None, None
        if move is not None:
            state, jump = move.step(state, generator=self.generator)
        self.n_done, self.state = number + 1, state
        if stage == "adaptation" and self.n_done % self.plan.n_cycles == 0:
            learned = self.learner.learn(generator=self.generator)
            if self.stage == "production":
                self.learner.forget()
        return Cycle(
            number=number, stage=stage, round=min(number // self.plan.n_cycles, self.plan.n_rounds), visited=tuple(visited), before=before,
            state=state, local=tuple(local), jump=jump, learned=learned,
        )  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        return {"n_done": self.n_done, "generator": self.generator.get_state(), "x": self.state.x, "learner": self.learner.snapshot()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot."""
        self.n_done = int(snapshot["n_done"])
        self.generator.set_state(snapshot["generator"])
        self.learner.restore(snapshot["learner"])
        self.state = self.local.init(snapshot["x"])
