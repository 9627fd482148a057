"""What every job of an adaptive loop shares: cycles recorded in pieces, run with checkpoints, resumed without losing one."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from boltzgen.errors import CheckpointError, Interrupted
from boltzgen.sampling.adaptive import AdaptiveSampler, Cycle
from boltzgen.training.checkpoints import CheckpointStore, Snapshot
from boltzgen.workflows.interrupts import StopRequest
from boltzgen.workflows.run_folder import RunFolder

#: Seconds between checkpoints.
CHECKPOINT_SECONDS = 20.0
#: Cycles of production between questions whether it may end: how long a run is depends on nothing but its numbers.
ASK_EVERY = 20


@dataclass
class CycleRecorder(ABC):
    """Collects cycles and writes them as numbered pieces.

    Attributes:
        folder: The run folder.
        save_every: Cycles between stored configurations.
        cycles: Cycles that are not written yet.
    """

    folder: RunFolder
    save_every: int
    cycles: list[Cycle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place.mkdir(exist_ok=True)

    @property
    def place(self) -> Path:
        """Folder of the pieces."""
        return self.folder.path / "cycles"

    @abstractmethod
    def arrays(self, cycles: list[Cycle]) -> dict[str, np.ndarray]:
        """The arrays of a piece; their first axes are joined over pieces."""

    def add(self, cycle: Cycle) -> None:
        """Take in one cycle."""
        self.cycles.append(cycle)

    def flush(self) -> None:
        """Write what was collected, before the checkpoint that follows it."""
        if self.cycles:
            name = f"{self.place.name}/{self.cycles[0].stage}-{self.cycles[-1].number + 1:08d}.npz"
            self.folder.write_npz(name, self.arrays(self.cycles))
            self.cycles = []

    def forget_after(self, n_done: int) -> None:
        """Delete pieces of cycles that the checkpoint does not know: they will be done again."""
        for path in self.place.glob("*-*.npz"):
            if int(path.stem.rpartition("-")[2]) > n_done:
                os.unlink(path)

    def joined(self, stage: str) -> dict[str, np.ndarray]:
        """All pieces of a stage, joined.

        Raises:
            CheckpointError: If a piece cannot be read, or there is none.
        """
        loaded = []
        for path in sorted(self.place.glob(f"{stage}-*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    loaded.append({name: file[name] for name in file.files})
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"{path} is corrupt ({error}): start this run again with --overwrite") from error
        if not loaded:
            raise CheckpointError(f"{self.place} holds no cycles of {stage}")
        return {name: np.concatenate([piece[name] for piece in loaded]) for name in loaded[0]}


def never() -> bool:
    """The rule that ends no production early, and is not asked."""
    return False


def run_cycles(
    sampler: AdaptiveSampler,
    recorder: CycleRecorder,
    *,
    fingerprint: str,
    should_stop: StopRequest | Callable[[], bool],
    enough: Callable[[], bool] = never,
    progress: bool = True,
) -> None:
    """Run all cycles that are left, from the checkpoint where there is one, with checkpoints every 20 seconds and between the stages.

    Args:
        sampler: The loop, ready to start.
        recorder: Takes its cycles.
        fingerprint: Hash of whatever a checkpoint depends on.
        should_stop: Asked after every cycle; a checkpoint is written before the run stops for it.
        enough: Asked after every 20 cycles of production, all of which are written then: whether to end it early.
        progress: Whether to show a progress bar.

    Raises:
        Interrupted: If asked to stop; the run can be resumed.
        CheckpointError: If the checkpoint is corrupt, or belongs to another system or configuration.
    """
    store = CheckpointStore(recorder.folder.checkpoints / "sampling", fingerprint=fingerprint)
    snapshot = store.load()
    if snapshot is not None:
        sampler.restore(snapshot.state)
    recorder.forget_after(sampler.n_done)
    saved = time.monotonic()
    bar = tqdm(total=sampler.plan.n_total, initial=sampler.n_done, desc=sampler.stage, unit="cycle", disable=not progress)

    def keep(cycle: Cycle) -> bool:
        nonlocal saved
        recorder.add(cycle)
        bar.set_description(cycle.stage)
        bar.update()
        at_border = sampler.n_done in (sampler.plan.n_adaptation, sampler.plan.n_total)
        if not (at_border or _asks(sampler, enough) or should_stop() or time.monotonic() - saved > CHECKPOINT_SECONDS):
            return True
        recorder.flush()
        store.save(Snapshot(step=sampler.n_done, weights={}, state=sampler.snapshot(), meta={}))
        saved = time.monotonic()
        if should_stop():
            raise Interrupted(f"stopped after cycle {sampler.n_done} of {sampler.plan.n_total}; resume to go on from there")
        return not (_asks(sampler, enough) and enough())

    with bar:
        if not (_asks(sampler, enough) and enough()):
            sampler.run(keep)


def _asks(sampler: AdaptiveSampler, enough: Callable[[], bool]) -> bool:
    """Whether it is asked, after the cycles that are done, if production may end."""
    done = sampler.n_done - sampler.plan.n_adaptation
    return enough is not never and done > 0 and done % ASK_EVERY == 0
