"""The basins of a configuration of steered paths, as functions of the variables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from boltzgen.config import PathsConfig
from boltzgen.paths import Paths
from boltzgen.workflows.coordinates import within

Membership = Callable[[np.ndarray], np.ndarray]


def memberships(config: PathsConfig) -> dict[str, Membership]:
    """Which values of the variables lie in each basin; both halves of the first variable's range where none is named."""
    if len(config.basins) >= 2:
        return {name: partial(within, box, names=config.names, periods=config.periods) for name, box in config.basin_ranges.items()}
    low, high = config.limits[0]
    middle = 0.5 * (low + high)
    return {"lower half": lambda xi: xi[:, 0] < middle, "upper half": lambda xi: xi[:, 0] >= middle}


def sent_between(paths: Paths, config: PathsConfig) -> np.ndarray:
    """Which paths start in one basin and are sent to another (λ₁ lies there), whatever became of them: bool ``[n]``."""
    found = np.zeros(len(paths), dtype=bool)
    regions = memberships(config)
    for a, in_a in regions.items():
        for b, in_b in regions.items():
            if a != b:
                found |= in_a(paths.xi_start) & in_b(paths.end)
    return found
