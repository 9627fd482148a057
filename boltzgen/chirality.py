"""Handedness of molecules: stereocentres, one stereoisomer as a target, and mirror-symmetric flows folded onto it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Context, Distribution, Molecule, Target
from boltzgen.errors import InputError, ShapeError


def stereocentres(molecule: Molecule) -> np.ndarray:
    """Atoms with four different neighbours, each with three of them, int64 ``[m, 4]``; the sign of their volume is the handedness.

    Neighbours differ if their elements do, or if anything differs in the graph behind them: labels start as elements and are refined by
    the sorted labels of the neighbours until nothing changes (Weisfeiler & Leman 1968).
    """
    graph = [molecule.neighbours(atom) for atom in range(molecule.n_atoms)]
    labels = _numbered(list(molecule.elements))
    while True:
        refined = _numbered([(labels[atom], tuple(sorted(labels[k] for k in graph[atom]))) for atom in range(len(graph))])
        if len(set(refined)) == len(set(labels)):
            break
        labels = refined
    rows = [
        [atom, *sorted(near, key=lambda k: labels[k])[:3]]
        for atom, near in enumerate(graph)
        if len(near) == 4 and len({labels[k] for k in near}) == 4
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def handedness(x: Tensor, centres: np.ndarray) -> Tensor:
    """−1 or +1 for every centre ``[m, 4]`` of configurations ``[b, n, 3]``: ``[b, m]``, float64; 0 where it is flat."""
    atoms = torch.from_numpy(centres)
    x = x.to(torch.float64)
    arms = x[:, atoms[:, 1:]] - x[:, atoms[:, :1]]
    return torch.sign(torch.linalg.det(arms))


class Stereoisomer(Target):
    """A target restricted to one handedness of every stereocentre: u = +inf for all others.

    Force fields do not know left from right, so that without this both mirror images belong to the target.

    Args:
        target: The original, over configurations ``[n, 3]``.
        centres: Stereocentres ``[m, 4]`` of :func:`stereocentres`.
        like: A configuration ``[n, 3]`` of the handedness that is meant.

    Raises:
        InputError: If a centre of ``like`` is flat.
    """

    def __init__(self, target: Target, centres: np.ndarray, *, like: Tensor) -> None:
        self.target, self.centres, self.signs = target, centres, handedness(like[None], centres)[0]
        if bool((self.signs == 0).any()):
            raise InputError("a stereocentre of the given configuration is flat: its handedness cannot be told")
        self.event_shape, self.labels, self.box, self.is_exact = target.event_shape, target.labels, target.box, target.is_exact

    def contains(self, x: Tensor) -> Tensor:
        """Which configurations ``[b, n, 3]`` are of this stereoisomer, bool ``[b]``."""
        return (handedness(x.detach().cpu(), self.centres) == self.signs).all(dim=1).to(x.device)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return torch.where(self.contains(x), self.target.reduced_potential(x), math.inf)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self.target.value_and_grad(x)
        inside = self.contains(x)
        return torch.where(inside, u, math.inf), torch.where(inside[:, None, None], gradient, 0.0)

    def at(self, temperature_kelvin: float) -> Target:
        moved = Stereoisomer.__new__(Stereoisomer)
        moved.__dict__ |= {**self.__dict__, "target": self.target.at(temperature_kelvin)}
        return moved


class Folded(Distribution):
    """A density that is the same for mirror images, folded onto one of them: samples of the other are mirrored, and q is twice as large.

    With q(−x) = q(x) and one of the two images in the half space H of a handedness, y = x or −x, whichever lies in H, has the
    density q(y) + q(−y) = 2 q(y) on H.

    Args:
        flow: The density, over configurations ``[n, 3]``; it must be even, as flows of O(3)-equivariant fields on ``ParticleNormal`` are.
        centre: One stereocentre ``[4]``.
        sign: Its handedness, −1 or +1.

    Raises:
        ShapeError: If the configurations are not three-dimensional.
    """

    def __init__(self, flow: Distribution, centre: np.ndarray, *, sign: float) -> None:
        super().__init__()
        if len(flow.event_shape) != 2 or flow.event_shape[1] != 3:
            raise ShapeError(f"handedness is one of configurations [n, 3], got {list(flow.event_shape)}")
        self.flow, self.centre, self.sign, self.event_shape = flow, centre[None], sign, flow.event_shape

    @property
    def log_det_error(self) -> float | None:
        return self.flow.log_det_error

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_q = self.flow.sample(n, generator=generator, context=context)
        return torch.where(self._inside(x)[:, None, None], x, -x), log_q + math.log(2.0)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return torch.where(self._inside(x), self.flow.log_prob(x, context) + math.log(2.0), -math.inf)

    def _inside(self, x: Tensor) -> Tensor:
        return (handedness(x.detach().cpu(), self.centre)[:, 0] == self.sign).to(x.device)


def _numbered(labels: list[object]) -> list[int]:
    """Labels as numbers, the same for the same labels, whatever the order of the atoms."""
    order = {label: k for k, label in enumerate(sorted(set(labels), key=repr))}
    return [order[label] for label in labels]
