"""Which sample of the base is led to which configuration, and to which image of it: independent pairs, or optimal transport."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from boltzgen.errors import InputError

#: Pairs samples of the base with configurations: both ``[b, *event]`` in and out, each with its own distribution unchanged.
Coupling = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def independent(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs as they come."""
    return x0, x1


def minibatch_transport(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The batch of base samples reordered so that Σ |x0 − x1|² is least.

    References:
        Tong et al., TMLR 2024, section 3.2; Pooladian et al., ICML 2023.
    """
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square()
    return x0[torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])], x1


class NearestImages:
    """Angles of each configuration in the period that is nearest to its base sample, so that straight paths are shortest arcs.

    Args:
        n_angles: Number of first columns that are angles in rad.

    References:
        Chen & Lipman, Flow matching on general geometries, ICLR 2024, section 3.2 (geodesic paths).
    """

    def __init__(self, n_angles: int) -> None:
        self.n_angles = n_angles

    def __call__(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        start, end = x0[:, : self.n_angles], x1[:, : self.n_angles]
        arcs = torch.remainder(end - start + math.pi, 2 * math.pi) - math.pi
        return x0, torch.cat([start + arcs, x1[:, self.n_angles :]], dim=1)


class Aligned:
    """Each base sample turned, and its equal particles relabelled, so that it lies close to its configuration.

    Hungarian assignment within each kind and the Kabsch rotation take turns, so that |x0 − x1|² falls in every round; it ends in a local
    minimum. Base and data must be invariant to what is minimised over, as they are for a :class:`~boltzgen.distributions.ParticleNormal`
    whose matrix treats equal particles alike: then x0 keeps its distribution, and straight paths get short.

    Args:
        labels: Kind of every particle; those of a kind are exchanged.
        reflections: Whether mirror images may be taken too: only for fields and systems that cannot tell them apart.
        rounds: Assignments.
        across_batch: Whether the aligned base samples are also reordered across the batch (:func:`minibatch_transport`).

    References:
        Klein, Krämer & Noé, Equivariant flow matching, NeurIPS 2023, section 4.2; Kabsch, Acta Cryst. A32, 922 (1976).
    """

    def __init__(self, labels: Sequence[int] | Sequence[str], *, reflections: bool, rounds: int = 3, across_batch: bool = False) -> None:
        if rounds < 1:
            raise InputError(f"expected one round or more, got {rounds}")
        kinds = np.asarray(labels)
        self.groups = [rows for kind in np.unique(kinds) if len(rows := np.flatnonzero(kinds == kind)) > 1]
        self.reflections, self.rounds, self.across_batch = reflections, rounds, across_batch

    def __call__(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        if self.across_batch:
            x0, x1 = minibatch_transport(self._align(x0, x1), x1)
        return self._align(x0, x1), x1

    def _align(self, x0: Tensor, x1: Tensor) -> Tensor:
        centre = x0.mean(dim=1, keepdim=True)
        y, goal = x0 - centre, x1 - x1.mean(dim=1, keepdim=True)
        for _ in range(self.rounds if self.groups else 1):
            y = self._relabelled(y, goal)
            y = y @ rotation_onto(y, goal, reflections=self.reflections)
        return self._relabelled(y, goal) + centre

    def _relabelled(self, y: Tensor, goal: Tensor) -> Tensor:
        order = np.tile(np.arange(y.shape[1]), (len(y), 1))
        for group in self.groups:
            costs = torch.cdist(goal[:, group], y[:, group]).square().double().cpu().numpy()
            order[:, group] = np.stack([group[linear_sum_assignment(cost)[1]] for cost in costs])
        rows = torch.from_numpy(order).to(y.device)
        return y.gather(1, rows.unsqueeze(-1).expand_as(y))


def rotation_onto(y: Tensor, goal: Tensor, *, reflections: bool) -> Tensor:
    """Rotations R ``[b, d, d]`` that minimise Σ_i |y_i R − goal_i|², both ``[b, n, d]`` and centred (Kabsch)."""
    u, _, vh = torch.linalg.svd(y.transpose(1, 2) @ goal)
    if not reflections:
        signs = torch.ones(u.shape[:2], dtype=u.dtype, device=u.device)
        signs[:, -1] = torch.sign(torch.linalg.det(u @ vh))
        u = u * signs.unsqueeze(1)
    return u @ vh
