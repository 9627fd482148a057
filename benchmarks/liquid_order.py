"""Whether a liquid has crystallised: its largest structure factor."""

from __future__ import annotations

import itertools

import numpy as np

#: Wave numbers looked at, in 2π per edge of the box.
REACH = 12


def largest_structure_factor(x: np.ndarray, edge: float) -> float:
    """Largest S(k) = |Σ exp(i k·x)|²/n over wave vectors of a cubic or square box, up to ``REACH``.

    A crystal has peaks of the order of n, whichever way it lies unless its lattice is incommensurate with the box; a liquid has values that
    scatter exponentially about S(k), the largest of some hundreds near 15.

    Args:
        x: Positions ``[n, 3]``, in any images.
        edge: Of the box, in the same unit.
    """
    one = np.exp(2j * np.pi * np.arange(-REACH, REACH + 1)[:, None, None] * x / edge)  # [2 REACH + 1, n, 3]
    flat = bool((x[:, 2] == 0).all())
    vectors = np.array(list(itertools.product(range(-REACH, REACH + 1), repeat=3)))
    length = (vectors**2).sum(axis=1)
    half = vectors[:, 2] == 0 if flat else vectors[:, 0] >= 0  # S(k) = S(-k)
    vectors = vectors[half & (length > 0) & (length <= REACH**2)] + REACH
    sums = np.einsum("kn,kn,kn->k", one[vectors[:, 0], :, 0], one[vectors[:, 1], :, 1], one[vectors[:, 2], :, 2])
    return float((np.abs(sums) ** 2).max() / len(x))
