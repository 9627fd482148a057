"""Where walkers start: structures of the same atoms, and local moves before anything counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from boltzgen.core import Move, MoveInfo, WalkerState
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.structure_files import read_coordinates
from boltzgen.workflows.run_folder import RunFolder

logger = logging.getLogger(__name__)

#: Share of accepted moves, in the last half, below which the user is told.
_FEW = 0.2


def start_positions(files: Sequence[Path], loaded: LoadedSystem) -> list[np.ndarray]:
    """Positions ``[n, 3]`` in nm of every file; those of the system where there is none.

    Raises:
        InputError: If a file has other atoms, or cannot be read.
    """
    found = []
    for path in files:
        positions = read_coordinates(path).positions
        if positions is None or positions.shape != loaded.positions.shape:
            got = "none" if positions is None else str(len(positions))
            raise InputError(f"walkers.files: expected positions of {len(loaded.positions)} atoms in {path}, got {got}")
        found.append(positions)
    return found or [loaded.positions]


def in_turn(positions: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Positions of ``count`` walkers ``[w, n, 3]``, which take those given in turn."""
    return np.stack([positions[i % len(positions)] for i in range(count)])


def stored_starts(folder: RunFolder, *, fingerprint: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of ``starts.npz`` of a run, made and written where it is not there.

    Raises:
        CheckpointError: If those in the folder belong to another system or configuration.
    """
    path = folder.path / "starts.npz"
    if not path.exists():
        folder.write_npz(path.name, {**make(), "fingerprint": np.array(fingerprint)})
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    if str(found.pop("fingerprint", "")) != fingerprint:
        raise CheckpointError(f"the walkers in {path} belong to another system or configuration; start again with --overwrite")
    return found


def equilibrated(
    move: Move, state: WalkerState, *, n_moves: int, generator: torch.Generator, advice: str
) -> tuple[WalkerState, list[MoveInfo]]:
    """Walkers after ``n_moves`` local moves, and what these did; a warning with ``advice`` where few of the last half are accepted."""
    infos = []
    for _ in range(n_moves):
        state, info = move.step(state, generator=generator)
        infos.append(info)
    late = [float(info.accepted.double().mean()) for info in infos[n_moves // 2 :]]
    if late and np.mean(late) < _FEW:
        logger.warning("only %.0f %% of the local moves are accepted: %s", 100 * np.mean(late), advice)
    return state, infos
