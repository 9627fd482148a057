"""The first stage of a continuous map between two states: flow matching between their training frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from boltzgen.config import Joining
from boltzgen.core import Transform
from boltzgen.errors import InputError
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.training.couplings import Aligned
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.flow_matching import FlowMatching, Frames, straight_with_noise
from boltzgen.transforms.continuous import ContinuousTransform
from boltzgen.workflows.seeds import stream

logger = logging.getLogger(__name__)

#: Rows of numbers that the stage leaves in the log.
_LOOKS = 5


def match_ensembles(
    settings: Joining,
    frames: Sequence[Tensor],
    learned: Transform,
    *,
    store: CheckpointStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> list[Mapping[str, object]]:
    """Teach a field, in place, to carry training frames of A onto those of B, without an energy.

    Frames of a batch are turned onto each other, not mirrored as both ensembles are of one hand, and paired so that they are close.
    Equal atoms keep their numbers: pairs only get longer by that, and both ensembles keep their labelling.

    Args:
        settings: How.
        frames: Training configurations of A and B in nm, ``[m, n, 3]`` each.
        learned: The map.
        store: Where checkpoints of the next stage are written; those of this one lie beside them.
        should_stop: Asked after every step.
        progress: Whether to show a progress bar.

    Returns:
        Rows of numbers to be logged.

    Raises:
        InputError: If the map is not one of a velocity field.
    """
    if not isinstance(learned, ContinuousTransform):
        raise InputError(f"flow matching teaches velocity fields, got a {type(learned).__name__}")
    chosen, training = settings.training.matching, settings.training
    x0, x1 = ((x - x.mean(dim=1, keepdim=True)).to(torch.float32) for x in frames)
    coupling = Aligned(range(x0.shape[1]), reflections=False, across_batch=True)
    objective = FlowMatching(
        learned.field, Frames(x0), x1, batch_size=chosen.batch_size, coupling=coupling, interpolant=straight_with_noise(chosen.noise)
    )
    beside = (
        None if store is None else CheckpointStore(store.folder.with_name(f"{store.folder.name}-matching"), fingerprint=store.fingerprint)
    )
    result = fit(
        learned, objective, generator=stream(settings.seed, 5), should_stop=should_stop, label="matching", progress=progress, store=beside,
        settings=FitSettings(
            steps=chosen.steps, learning_rate=chosen.learning_rate, gradient_clip=training.gradient_clip, ema_decay=training.ema_decay,
            checkpoint_every=training.checkpoint_every, evaluate_every=max(1, chosen.steps // _LOOKS),
        ),
    )  # fmt: skip
    logger.info("matching: %d steps, %d skipped", result.steps, result.skipped)
    return [{"stage": "matching", **row} for row in result.history]
