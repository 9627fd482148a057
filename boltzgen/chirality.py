"""Handedness of molecules with labelled atoms, and mirror-symmetric flows folded onto one hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Context, Distribution, Molecule
from boltzgen.errors import InputError, ShapeError

#: Elements whose three-coordinate atoms do not turn inside out: sulfoxides, phosphines.
_STIFF = ("S", "P")


@dataclass(frozen=True)
class Handedness:
    """The signs of the volumes that atoms span with their neighbours.

    Force fields do not know left from right, nor how equal hydrogens are numbered: every mirror image and every numbering has the same
    energy, although dynamics visits one only. With labelled atoms a handedness tells them apart.

    Attributes:
        centres: Atoms, each with three neighbours, int64 ``[m, 4]``.
        signs: −1 or +1 for every centre, float64 ``[m]``.
    """

    centres: np.ndarray
    signs: Tensor

    @classmethod
    def of(cls, molecule: Molecule, x: Tensor) -> Handedness:
        """That of a configuration ``[n, 3]``: of every atom with four neighbours, a methyl carbon too, and of S and P with three.

        Dynamics at ordinary temperatures inverts none of them.

        Raises:
            InputError: If a centre is flat.
        """
        rows = []
        for atom in range(molecule.n_atoms):
            near = molecule.neighbours(atom)
            if len(near) == 4 or (len(near) == 3 and molecule.elements[atom] in _STIFF):
                rows.append([atom, *near[:3]])
        centres = np.array(rows, dtype=np.int64).reshape(-1, 4)
        signs = handedness(x[None], centres)[0]
        if bool((signs == 0).any()):
            name = molecule.names[centres[int((signs == 0).nonzero()[0]), 0]]
            raise InputError(f"{name} and three of its neighbours lie in a plane: its handedness cannot be told")
        return cls(centres, signs)

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


class Folded(Distribution):
    """A density that is the same for mirror images, folded onto one hand: samples of the other are mirrored, and q is twice as large.

    With q(−x) = q(x) and one of the two images in the half space H of a handedness at one centre, y = x or −x, whichever lies in H, has
    the density q(y) + q(−y) = 2 q(y) on H.

    Args:
        flow: The density, over configurations ``[n, 3]``; it must be even, as flows of mirrored fields on ``ParticleNormal`` are.
        hand: The handedness; its first centre decides.

    Raises:
        ShapeError: If the configurations are not three-dimensional.
        InputError: If there is no centre.
    """

    def __init__(self, flow: Distribution, hand: Handedness) -> None:
        super().__init__()
        if len(flow.event_shape) != 2 or flow.event_shape[1] != 3:
            raise ShapeError(f"handedness is one of configurations [n, 3], got {list(flow.event_shape)}")
        if not len(hand.centres):
            raise InputError("without a centre there is no handedness to fold onto")
        self.flow, self.hand, self.event_shape = flow, hand, flow.event_shape

    @property
    def log_det_error(self) -> float | None:
        return self.flow.log_det_error

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_q = self.flow.sample(n, generator=generator, context=context)
        return torch.where(self.hand.agrees(x)[:, :1, None], x, -x), log_q + math.log(2.0)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return torch.where(self.hand.agrees(x)[:, 0], self.flow.log_prob(x, context) + math.log(2.0), -math.inf)
