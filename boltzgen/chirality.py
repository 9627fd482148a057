"""Handedness of molecules with labelled atoms, and flows that are the same for its images, folded onto one hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Context, Distribution, Molecule
from boltzgen.errors import InputError, ShapeError

#: Elements whose three-coordinate atoms do not turn inside out: sulfoxides, phosphines.
_STIFF = ("S", "P")
#: Difference of energies, in kT, that counts as none.
_SAME = 1e-3


@dataclass(frozen=True)
class Handedness:
    """The signs of the volumes that atoms span with their neighbours.

    Force fields do not know left from right, nor how equal hydrogens are numbered: every mirror image and every numbering has the same
    energy, although dynamics visits one only. With labelled atoms a handedness tells them apart.

    Atoms that are equal to the energy (equal labels), such as the hydrogens of a methyl group, can be exchanged to turn the hand of their
    centre: the same molecule, numbered otherwise.

    Attributes:
        centres: Atoms, each with three neighbours, int64 ``[m, 4]``; where two neighbours are equal they are the first two.
        signs: −1 or +1 for every centre, float64 ``[m]``.
        exchangeable: Whether the first two neighbours of a centre are equal, bool ``[m]``.
    """

    centres: np.ndarray
    signs: Tensor
    exchangeable: np.ndarray

    @classmethod
    def of(cls, molecule: Molecule, x: Tensor, *, labels: Sequence[str] = ()) -> Handedness:
        """That of a configuration ``[n, 3]``: of every atom with four neighbours, a methyl carbon too, and of S and P with three.

        Dynamics at ordinary temperatures inverts none of them.

        Args:
            molecule: Elements and bonds.
            x: Its configuration.
            labels: One per atom, those of equal atoms equal (:func:`equal_hydrogens`); all differ by default.

        Raises:
            InputError: If a centre is flat.
        """
        rows, exchangeable = [], []
        labels = labels or molecule.names
        for atom in range(molecule.n_atoms):
            near = molecule.neighbours(atom)
            if len(near) == 4 or (len(near) == 3 and molecule.elements[atom] in _STIFF):
                equal = next(((a, b) for a, b in itertools.combinations(near, 2) if labels[a] == labels[b]), ())
                rows.append([atom, *equal, *(other for other in near if other not in equal)][:4])
                exchangeable.append(bool(equal))
        centres = np.array(rows, dtype=np.int64).reshape(-1, 4)
        signs = handedness(x[None], centres)[0]
        if bool((signs == 0).any()):
            name = molecule.names[centres[int((signs == 0).nonzero()[0]), 0]]
            raise InputError(f"{name} and three of its neighbours lie in a plane: its handedness cannot be told")
        return cls(centres, signs, np.array(exchangeable, dtype=bool))

    @property
    def anchor(self) -> int | None:
        """The first centre that no exchange turns, which a mirror image is told by; None if there is none."""
        fixed = np.flatnonzero(~self.exchangeable)
        return int(fixed[0]) if len(fixed) else None

    def folded(self, x: Tensor, *, mirror: bool) -> Tensor:
        """The image of configurations ``[b, n, 3]`` that has this handedness where exchanges, and a mirror if allowed, can give it."""
        if mirror and self.anchor is not None:
            x = torch.where(self.agrees(x)[:, self.anchor, None, None], x, -x)
        right, x = self.agrees(x), x.clone()
        for k in np.flatnonzero(self.exchangeable):
            wrong, pair = torch.nonzero(~right[:, k]), torch.from_numpy(self.centres[k, 1:3]).to(x.device)
            x[wrong, pair] = x[wrong, pair.flip(0)]
        return x

    def n_images(self, *, mirror: bool) -> int:
        """How many images of a configuration are folded onto one."""
        return int(2 ** self.turned(mirror=mirror).sum())

    def turned(self, *, mirror: bool) -> np.ndarray:
        """Centres that folding gives this handedness, bool ``[m]``: by exchanges and, where mirror images are folded, the anchor."""
        turned = self.exchangeable.copy()
        if mirror and self.anchor is not None:
            turned[self.anchor] = True
        return turned

    def agrees(self, x: Tensor) -> Tensor:
        """Which centres of configurations ``[b, n, 3]`` have this handedness, bool ``[b, m]``."""
        return (handedness(x.detach().cpu(), self.centres) == self.signs).to(x.device)

    def contains(self, x: Tensor) -> Tensor:
        """Which configurations ``[b, n, 3]`` have it at every centre, bool ``[b]``."""
        return self.agrees(x).all(dim=1)


def handedness(x: Tensor, centres: np.ndarray) -> Tensor:
    """−1 or +1 for every centre ``[m, 4]`` of configurations ``[b, n, 3]``: ``[b, m]``, float64; 0 where it is flat."""
    atoms = torch.from_numpy(centres)
    x = x.to(torch.float64)
    return torch.sign(torch.linalg.det(x[:, atoms[:, 1:]] - x[:, atoms[:, :1]]))


def equal_hydrogens(molecule: Molecule, u: Callable[[Tensor], Tensor], x: Tensor) -> tuple[str, ...]:
    """Labels of the atoms; those of hydrogens of one atom are equal where the energy does not know which of them is which.

    Args:
        molecule: Elements, bonds and names.
        u: Reduced potential of configurations ``[b, n, 3]``: ``[b]``.
        x: A configuration ``[n, 3]`` without symmetry, where it is asked.
    """
    labels, one = list(molecule.names), np.arange(molecule.n_atoms)
    for atom in range(molecule.n_atoms):
        hydrogens = [near for near in molecule.neighbours(atom) if molecule.elements[near] == "H" and len(molecule.neighbours(near)) == 1]
        if len(hydrogens) < 2:
            continue
        orders = [one, *(np.where(one == a, b, np.where(one == b, a, one)) for a, b in itertools.pairwise(hydrogens))]
        energies = u(torch.stack([x[torch.from_numpy(order)] for order in orders]))
        if float((energies - energies[0]).abs().max()) < _SAME:
            for hydrogen in hydrogens:
                labels[hydrogen] = labels[hydrogens[0]]
    return tuple(labels)


class Folded(Distribution):
    """A density that is the same for all images of a configuration, folded onto one handedness.

    Images are made by exchanging two equal neighbours of a centre, which turns its hand alone, and by the mirror, which turns all. Of the
    2^m images of a configuration by m exchanges one has the right hand at all m centres; with the mirror, and a centre that no exchange
    turns, it is one of 2^(m+1). A sample is replaced by that image y, and with q the same for all images its density is q(y) times
    their number.

    Args:
        flow: The density, over configurations ``[n, 3]``. It must be the same for all images, as flows of fields on ``ParticleNormal`` are
            that were given the labels of the equal atoms, and are mirrored.
        hand: The handedness.
        mirror: Whether mirror images are folded.

    Raises:
        ShapeError: If the configurations are not three-dimensional.
        InputError: If there is nothing to fold.
    """

    def __init__(self, flow: Distribution, hand: Handedness, *, mirror: bool = True) -> None:
        super().__init__()
        if len(flow.event_shape) != 2 or flow.event_shape[1] != 3:
            raise ShapeError(f"handedness is one of configurations [n, 3], got {list(flow.event_shape)}")
        if hand.n_images(mirror=mirror) == 1:
            raise InputError("without a centre that an exchange or the mirror turns there is nothing to fold")
        self.flow, self.hand, self.mirror, self.event_shape = flow, hand, mirror, flow.event_shape
        self._log_images = math.log(hand.n_images(mirror=mirror))

    @property
    def log_det_error(self) -> float | None:
        return self.flow.log_det_error

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_q = self.flow.sample(n, generator=generator, context=context)
        return self.hand.folded(x, mirror=self.mirror), log_q + self._log_images

    def sample_signed(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x, log_q, sign = self.flow.sample_signed(n, generator=generator, context=context)
        return self.hand.folded(x, mirror=self.mirror), log_q + self._log_images, sign

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        inside = self.hand.agrees(x)[:, torch.from_numpy(self.hand.turned(mirror=self.mirror))].all(dim=1)
        return torch.where(inside, self.flow.log_prob(x, context) + self._log_images, -math.inf)
