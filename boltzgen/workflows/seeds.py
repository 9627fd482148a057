"""Random numbers of a run: one seed, a stream for every purpose."""

from __future__ import annotations

import numpy as np
import torch


def stream(seed: int, index: int) -> torch.Generator:
    """The generator of purpose ``index`` of a run with this seed; streams do not overlap."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
