"""The training loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from boltzgen.core import Objective
from boltzgen.errors import CheckpointError, DomainError, EnergyError, Interrupted, SolverError
from boltzgen.training.checkpoints import CheckpointStore, Snapshot

Model = TypeVar("Model", bound=nn.Module)
HeldOut = Callable[[Any], Mapping[str, float]]

#: Steps in a row without a finite gradient after which training is given up.
MAX_BAD_STEPS = 50


@dataclass(frozen=True)
class FitSettings:
    """How to minimise.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak of the cosine schedule.
        gradient_clip: Largest norm of the gradient.
        ema_decay: Decay per step of the running average of the weights; the average is what is kept.
        checkpoint_every: Steps between checkpoints.
        evaluate_every: Steps between held-out evaluations.
        warmup: Steps of linear warm-up.
        patience: Held-out evaluations without improvement after which to stop; None never stops early.
    """

    steps: int
    learning_rate: float
    gradient_clip: float
    ema_decay: float
    checkpoint_every: int
    evaluate_every: int
    warmup: int = 50
    patience: int | None = None


@dataclass(frozen=True)
class FitResult:
    """What training did.

    Attributes:
        steps: Steps done.
        history: One row of named numbers for every evaluation, with ``step`` and ``seconds``.
        stopped_early: Whether the held-out loss stopped improving.
        skipped: Steps left out because their gradient was not finite.
    """

    steps: int
    history: tuple[Mapping[str, float], ...]
    stopped_early: bool
    skipped: int


def fit(
    flow: Model,
    objective: Objective[Model],
    *,
    settings: FitSettings,
    generator: torch.Generator,
    held_out: HeldOut | None = None,
    keep: Callable[[int, Any], None] | None = None,
    store: CheckpointStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    label: str = "training",
    progress: bool = True,
) -> FitResult:
    """Minimise an objective with Adam; afterwards the flow, or any other model, holds the averaged weights.

    With ``patience`` it holds the averaged weights of the evaluation with the smallest ``held_out_loss``. A loop resumed from its
    checkpoint goes through the same states as one that was never stopped.

    Args:
        flow: Flow to train, in place.
        objective: Loss.
        settings: Steps, rates and intervals.
        generator: Source of all randomness; its state is part of the checkpoint.
        held_out: Numbers on held-out data; ``held_out_loss`` decides about early stopping.
        keep: Called at every evaluation with the step and the averaged model.
        store: Where checkpoints are written and looked for.
        should_stop: Asked after every step; True saves a checkpoint and raises.
        label: Text of the progress bar.
        progress: Whether to show it.

    Returns:
        History and counts.

    Raises:
        Interrupted: If ``should_stop`` said so.
        EnergyError: If gradients stay infinite or NaN.
        CheckpointError: If the checkpoint found is corrupt or foreign.
    """
    loop = _Loop(flow, settings, generator)
    snapshot = store.load() if store else None
    if snapshot is not None:
        loop.restore(snapshot)
    with tqdm(total=settings.steps, initial=loop.step, desc=label, unit="step", disable=not progress) as bar:
        while loop.step < settings.steps and not loop.stopped_early:
            loop.advance(objective)
            if loop.step % settings.evaluate_every == 0 or loop.step == settings.steps:
                bar.set_postfix(loop.evaluate(held_out))
                if keep is not None:
                    keep(loop.step, loop.ema.module)
            bar.update()
            interrupted = should_stop()
            if store and (interrupted or loop.step % settings.checkpoint_every == 0 or loop.step == settings.steps or loop.stopped_early):
                store.save(loop.snapshot())
            if interrupted:
                raise Interrupted(f"stopped in {label} after step {loop.step} of {settings.steps}; resume to go on from there")
    flow.load_state_dict(loop.best if settings.patience is not None and loop.best else loop.ema.module.state_dict())
    return FitResult(steps=loop.step, history=tuple(loop.history), stopped_early=loop.stopped_early, skipped=loop.skipped)


class _Loop(Generic[Model]):
    """Everything that changes from step to step.

    Attributes:
        sums: Sums of the objective's numbers over the ``since`` steps that were taken since the last evaluation.
        bad: Steps skipped in a row.
        stale: Evaluations without improvement in a row.
    """

    def __init__(self, flow: Model, settings: FitSettings, generator: torch.Generator) -> None:
        self.flow, self.settings, self.generator = flow, settings, generator
        self.optimiser = torch.optim.Adam(flow.parameters(), lr=settings.learning_rate)
        self.ema = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.step, self.skipped, self.bad, self.stale = 0, 0, 0, 0
        self.stopped_early = False
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        self.history: list[dict[str, float]] = []
        self.sums: dict[str, float] = {}
        self.trouble = ""
        self.since = 0
        self.seconds, self.started = 0.0, time.monotonic()

    def advance(self, objective: Objective[Model]) -> None:
        """One step of the optimiser."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate()
        self.optimiser.zero_grad()
        try:
            loss, numbers = objective(self.flow, generator=self.generator)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.flow.parameters(), self.settings.gradient_clip)
            finite = bool(torch.isfinite(norm) and torch.isfinite(loss.detach()))
        except (
            DomainError,
            EnergyError,
            SolverError,
        ) as error:  # a sample so far out that it has no energy: like a gradient that is not finite
            numbers, finite, self.trouble = {}, False, f" ({error})"
        self.step += 1
        if finite:
            self.optimiser.step()
            self.ema.update_parameters(self.flow)
            self.bad = 0
            for name, value in numbers.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.since += 1
        else:
            self.skipped += 1
            self.bad += 1
            if self.bad >= MAX_BAD_STEPS:
                raise EnergyError(
                    f"training diverged: the gradient was not finite in {self.bad} steps in a row, up to step {self.step}{self.trouble}; "
                    "lower the learning rate, or train longer on data before using energies"
                )

    def evaluate(self, held_out: HeldOut | None) -> Mapping[str, float]:
        """Add a row to the history, judge early stopping, and return what to show."""
        row = {"step": float(self.step), "seconds": self.seconds + time.monotonic() - self.started}
        row |= {name: total / self.since for name, total in self.sums.items()}
        self.sums, self.since = {}, 0
        if held_out is not None:
            row |= held_out(self.ema.module)
        self.history.append(row)
        if self.settings.patience is not None and "held_out_loss" in row:
            if row["held_out_loss"] < self.best_loss:
                self.best_loss, self.stale = row["held_out_loss"], 0
                self.best = copy.deepcopy(self.ema.module.state_dict())
            else:
                self.stale += 1
                self.stopped_early = self.stale >= self.settings.patience
        return {name: round(value, 3) for name, value in row.items() if name not in ("step", "seconds")}

    def snapshot(self) -> Snapshot:
        """Everything needed to go on from here."""
        weights = {f"flow.{k}": v.detach().clone() for k, v in self.flow.state_dict().items()}
        weights |= {f"ema.{k}": v.detach().clone() for k, v in self.ema.state_dict().items()}
        weights |= {f"best.{k}": v.detach().clone() for k, v in self.best.items()}
        meta: dict[str, Any] = {name: getattr(self, name) for name in _COUNTERS}
        meta |= {"history": self.history, "sums": self.sums, "seconds": self.seconds + time.monotonic() - self.started}
        meta["best_loss"] = self.best_loss if math.isfinite(self.best_loss) else None
        state = {"optimiser": self.optimiser.state_dict(), "generator": self.generator.get_state()}
        return Snapshot(step=self.step, weights=weights, state=state, meta=meta)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""
        parts: dict[str, dict[str, Tensor]] = {"flow": {}, "ema": {}, "best": {}}
        for name, tensor in snapshot.weights.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        try:
            self.flow.load_state_dict(parts["flow"])
            self.ema.load_state_dict(parts["ema"])
            self.optimiser.load_state_dict(snapshot.state["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint after step {snapshot.step} belongs to another flow; resume with the configuration it was made with, or "
                f"delete it to start this stage again ({' '.join(str(error).split()[:30])})"
            ) from error
        self.best = parts["best"]
        self.generator.set_state(snapshot.state["generator"])
        for name in _COUNTERS:
            setattr(self, name, snapshot.meta[name])
        self.history, self.sums, self.seconds = list(snapshot.meta["history"]), dict(snapshot.meta["sums"]), snapshot.meta["seconds"]
        self.best_loss = math.inf if snapshot.meta["best_loss"] is None else snapshot.meta["best_loss"]
        self.started = time.monotonic()

    def _learning_rate(self) -> float:
        done = self.step / max(self.settings.steps, 1)
        warm = min(1.0, (self.step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        return self.settings.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * done))


_COUNTERS = ("step", "skipped", "bad", "stale", "stopped_early", "since")
