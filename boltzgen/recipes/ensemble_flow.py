"""A continuous map between two ensembles of one molecule, over its Cartesian coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.networks.pairs import neighbour_distance
from boltzgen.recipes.state_maps import StateMap
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.one_to_one import OneToOne


@dataclass(frozen=True)
class EnsembleFlowSize:
    """How large a continuous map between two ensembles of a molecule is, and in how many steps it is integrated.

    Attributes:
        n_layers: Layers of the field.
        hidden: Width of its hidden layers; it has half as many scalar moments, and a quarter as many vectors.
        n_radial: Radial functions.
        pair_scales: Whether it also has functions around the own distance of every pair, as wide as it varies in both ensembles.
        training_steps: Runge–Kutta steps while it is trained.
        steps: Steps where works are reported.
    """

    n_layers: int
    hidden: int
    n_radial: int
    pair_scales: bool
    training_steps: int
    steps: int


def ensemble_flow_map(
    xs: Sequence[np.ndarray], *, size: EnsembleFlowSize, labels: Sequence[str] = (), length: float | None = None, generator: torch.Generator
) -> StateMap:
    """A continuous map between two ensembles of one molecule: v(t, x) of an embedded field, which starts at rest, the identity.

    It commutes with rotations, translations, reflections and permutations of atoms of equal labels, and keeps the mean position. Works are
    those of its Runge–Kutta steps where they are one to one.

    Args:
        xs: Training configurations ``[m, n_atoms, 3]`` in nm of both ensembles.
        size: How large it is.
        labels: One per atom, those of equal atoms equal; all differ by default.
        length: Typical distance of neighbours in nm; by default the median of the data.
        generator: Source of the initial weights.
    """
    x0, x1 = (torch.as_tensor(x, dtype=torch.float64) for x in xs)
    n = x0.shape[1]
    names = sorted(set(labels))
    field = EmbeddedField(
        n, 3, length=length or neighbour_distance(x0), labels=[names.index(label) for label in labels] or list(range(n)),
        n_layers=size.n_layers, hidden=size.hidden, n_radial=size.n_radial, n_scalars=max(1, size.hidden // 2),
        n_vectors=max(1, size.hidden // 4), generator=generator,
        statistics=PairStatistics.between(x0, x1) if size.pair_scales else None,
    )  # fmt: skip
    learned = ContinuousTransform(field, FixedStep(size.training_steps), checkpointing=False)
    solver = FixedStep(size.steps)
    return StateMap(OneToOne.of(learned, solver), learned, solver=solver, by_steps=True)
