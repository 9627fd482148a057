"""Maps between two ensembles with the frames that train and judge them: one map, or two that judge each other's half."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from boltzgen.config import Joining
from boltzgen.core import Chain, Transform
from boltzgen.md.loading import LoadedSystem
from boltzgen.recipes import StateMap
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.workflows.joining import Ensemble, exact_enough, train_map
from boltzgen.workflows.tfep_analysis import Judged
from boltzgen.workflows.tfep_maps import make_map


@dataclass(frozen=True)
class Fold:
    """Two ensembles, split into frames that train a map and frames that judge it, and the map.

    Attributes:
        name: Ends the names of its files: empty for the first.
        ends: A and B.
        pieces: The map; None for plain perturbation.
    """

    name: str
    ends: tuple[Ensemble, Ensemble]
    pieces: StateMap | None

    @property
    def transform(self) -> Transform:
        """The map of configurations from A to B."""
        return Chain() if self.pieces is None else self.pieces.transform

    def train(
        self,
        settings: Joining,
        *,
        store: CheckpointStore | None = None,
        keep: Callable[[int, Any], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        progress: bool = True,
    ) -> list[Mapping[str, object]]:
        """Train the map in place (:func:`~boltzgen.workflows.joining.train_map`); rows of numbers to be logged."""
        if self.pieces is None:
            return []
        rows = train_map(settings, self.ends, self.pieces, store=store, keep=keep, should_stop=should_stop, progress=progress)
        return [{**row, "stage": f"{row['stage']}{self.name}"} for row in rows]

    def judged(self, settings: Joining, transforms: Sequence[Transform]) -> Judged:
        """Maps of this fold, with works that are exact enough, and the frames that judge them."""
        return Judged(self.ends, exact_enough(settings, self.ends, transforms))


def make_folds(settings: Joining, loaded: Sequence[LoadedSystem], ends: Sequence[Ensemble], *, box: Tensor | None) -> tuple[Fold, ...]:
    """Untrained maps and their data: one map whose frames are split as they come, or the two of cross-fitting.

    With cross-fitting every half of the data is judged by a map that saw the other half only, so that all frames count
    (:meth:`~boltzgen.estimators.works.Works.joined`). The folds are in the order of the times of their held-out frames.

    Args:
        settings: What the map is, and whether to cross-fit.
        loaded: Both systems.
        ends: Both ensembles.
        box: Vectors of the box in nm ``[3, 3]``, or None.

    Raises:
        InputError, TopologyError: If the atoms have no such map.
    """
    if settings.map.kind == "identity":
        return (Fold("", (ends[0], ends[1]), None),)
    basins = any(end.walled is not None for end in ends)
    splits = [[end.exchanged() for end in ends], ends] if settings.training.cross_fitting else [ends]
    folds = []
    for number, split in enumerate(splits, start=1):
        known = [(one, end.training) for one, end in zip(loaded, split, strict=True)]
        finite = [end.walled or end.target for end in split]
        pieces = make_map(settings, known, box=box, targets=finite, between_basins=basins)
        a, b = (end.in_sector(sector, pieces.atoms) for end, sector in zip(split, (pieces.sector_a, pieces.sector_b), strict=True))
        folds.append(Fold("" if number == 1 else f"-{number}", (a, b), pieces))
    return tuple(folds)
