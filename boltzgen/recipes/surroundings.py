"""Layers that make a map of one molecule depend on what is around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Molecule, Transform
from boltzgen.errors import InputError
from boltzgen.networks.pairs import nearest_images
from boltzgen.networks.surroundings import Surroundings
from boltzgen.recipes.state_maps import edges_of
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.surrounded import SurroundedShape
from boltzgen.transforms.zmatrix import build_zmatrix

#: How far surroundings are seen in nm where nothing else is said: the first neighbours of small atoms and part of the second.
_REACH = 0.7

#: Where the first function of distance has its centre, in distances of which one in ten nearest neighbours is closer.
_NEAREST, _CLOSE = 0.8, 0.1

#: Configurations that distances and spreads are learned from.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class SurroundingsSize:
    """How large the part of a map is that depends on carried atoms.

    Attributes:
        reach: How far they are seen in nm; None takes 0.7, or half the shortest edge of the box where that is less.
        n_functions: Functions of their distance.
        hidden: Widths of the hidden layers of every perceptron.
    """

    reach: float | None
    n_functions: int
    hidden: Sequence[int]


def surroundings_layers(
    molecule: Molecule,
    domains: Domains,
    xs: Sequence[np.ndarray],
    *,
    atoms: np.ndarray,
    kinds: Sequence[str],
    box: Tensor | None,
    size: SurroundingsSize,
    generator: torch.Generator,
) -> list[Transform]:
    """Layers on all atoms that turn soft torsions, then shift and stretch the other coordinates of one molecule, given the other atoms.

    Each keeps what the other moves. They start as the identity.

    Args:
        molecule: The molecule, without constraints.
        domains: Its domains.
        xs: Training configurations ``[n, n_atoms, 3]`` in nm of both states, which tell how near other atoms come and how they vary.
        atoms: The molecule's atoms among all, ascending.
        kinds: Kind of every atom, such as its element.
        box: Vectors of the box in nm ``[3, 3]``, None without one.
        size: How large they are.
        generator: Source of the initial weights.

    Raises:
        InputError: If there are no other atoms, they are seen too far or not at all, or the box is not rectangular.
    """
    coordinates, edges = InternalCoordinates(build_zmatrix(molecule)), edges_of(box)
    x = torch.as_tensor(np.concatenate([some[:: max(1, 2 * len(some) // _LOOKED_AT)] for some in xs]), dtype=torch.float64)
    others = np.setdiff1d(np.arange(x.shape[1]), atoms)
    if not len(others):
        raise InputError("map.surroundings: no atoms are carried, the map moves all of them; expected several molecules, or leave it out")
    reach = size.reach or (_REACH if edges is None else min(_REACH, 0.5 * float(edges.min())))
    labels = np.unique([kinds[int(atom)] for atom in others], return_inverse=True)[1].tolist()
    inner = _NEAREST * _close(x, atoms, others, edges)
    made: list[Transform] = []
    for moved, reference in _columns(coordinates, domains, x[:, atoms]):
        try:
            around = Surroundings(len(atoms), labels, inner=inner, cutoff=reach, n_functions=size.n_functions, box=edges)
        except ValueError as error:
            raise InputError(f"map.reach: the surroundings cannot be seen: {error}") from None
        layer = SurroundedShape(
            coordinates, InternalDomains(domains), around, atoms=atoms.tolist(), n_atoms=x.shape[1], moved=moved, reference=reference,
            length=float(domains.spread[: len(domains.bonds)].mean()), hidden=size.hidden, generator=generator,
        )  # fmt: skip
        layer.standardise(x)
        made.append(layer)
    return made


def _columns(coordinates: InternalCoordinates, domains: Domains, x: Tensor) -> list[tuple[range, Tensor]]:
    """Columns that each layer moves, and their typical values: soft torsions at their circular means, others at their centres."""
    n_soft, stiff = domains.n_soft, torch.zeros(domains.n_stiff, dtype=torch.float64)
    with torch.no_grad():
        torsions = coordinates.inverse(x)[0][:, torch.from_numpy(domains.soft)]
    means = torch.atan2(torsions.sin().mean(dim=0), torsions.cos().mean(dim=0))
    every = [(range(n_soft), means), (range(n_soft, n_soft + domains.n_stiff), stiff)]
    return [(moved, reference) for moved, reference in every if len(moved)]


def _close(x: Tensor, atoms: np.ndarray, others: np.ndarray, edges: Tensor | None) -> float:
    """Distance in nm within which one in ten atoms of the molecule has another atom, in about a hundred of the configurations."""
    few = x[:: max(1, len(x) // 100)]
    r = nearest_images(few[:, atoms].unsqueeze(2) - few[:, others].unsqueeze(1), edges).norm(dim=3)
    return float(r.amin(dim=2).quantile(_CLOSE))
