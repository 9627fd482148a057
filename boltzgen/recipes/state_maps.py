"""Maps between two states of the same atoms, and the parts that training needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Chain, Inverse, Molecule, Transform
from boltzgen.errors import InputError
from boltzgen.networks.pairs import nearest_images, neighbour_distance
from boltzgen.networks.solvent_field import SolventField
from boltzgen.recipes.molecule import CouplingSize, learn_domains, stiff_layers, torsion_layers
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.internal_map import InternalMap, OnAtoms, Turned
from boltzgen.transforms.low_rank import LowRankAffine
from boltzgen.transforms.one_to_one import OneToOne
from boltzgen.transforms.radial_map import RadialMap
from boltzgen.transforms.triangular import ConditionalTriangular
from boltzgen.transforms.zmatrix import build_zmatrix

#: Share of the smallest distance between solute and solvent in the data below which a radial map moves nothing.
_NEVER_REACHED = 0.75

#: Configurations behind the typical distance of neighbours in a box.
_LOOKED_AT = 100

#: How far a solute acts in a continuous map, in shortest edges of the box.
_ACTS = 0.9

#: Length of the mean of e^{iτ} from which a torsion τ counts as being in one place.
_TOGETHER = 0.7


@dataclass(frozen=True)
class StateMap:
    """A map between two states of the same atoms, and the parts that training needs.

    Attributes:
        transform: The map of configurations ``[n_atoms, 3]`` in nm from A to B, in double precision.
        learned: The same in standardised coordinates, y of A to y of B; the identity at the start.
        fixed_a: From y to configurations of A; nothing to learn.
        fixed_b: Likewise of B.
        sector_a: Describes the mapped atoms of A; its inverse has no finite log determinant outside the sector of the map's coordinates.
        sector_b: Likewise of B.
        atoms: Mapped atoms; all of them for None.
        solver: Steps of a continuous map where works are reported; ``learned`` is trained in others.
        by_steps: Whether these works are those of the steps themselves (:class:`~boltzgen.transforms.one_to_one.OneToOne`).
    """

    transform: Transform
    learned: Transform
    fixed_a: Chain = field(default_factory=Chain)
    fixed_b: Chain = field(default_factory=Chain)
    sector_a: Chain = field(default_factory=Chain)
    sector_b: Chain = field(default_factory=Chain)
    atoms: Tensor | None = None
    solver: FixedStep | None = None
    by_steps: bool = False

    def reported(self, learned: Transform) -> Transform:
        """The map of configurations whose works are reported, with these learned layers in place of its own."""
        if self.solver is not None and isinstance(learned, ContinuousTransform):
            return OneToOne.of(learned, self.solver) if self.by_steps else learned.with_solver(self.solver)
        return Chain(Inverse(self.fixed_a), learned, self.fixed_b)

    def carrying(self, atoms: np.ndarray, *, n_atoms: int, after: Sequence[Transform] = ()) -> StateMap:
        """The same map of some atoms of a larger system, which carries the others. It is trained in Cartesian coordinates.

        Args:
            atoms: The mapped atoms, ascending.
            n_atoms: Number of all atoms.
            after: Maps of all atoms that follow it (:func:`~boltzgen.recipes.surroundings.surroundings_layers`).
        """
        whole: Transform = OnAtoms(self.transform, atoms=atoms.tolist(), n_atoms=n_atoms)
        whole = Chain(whole, *after) if after else whole
        return StateMap(whole, whole, Chain(), Chain(), self.sector_a, self.sector_b, torch.from_numpy(atoms))


def internal_coordinate_map(
    molecule: Molecule, a: Domains, b: Domains, *, size: CouplingSize | None, turn: Tensor | None = None, generator: torch.Generator
) -> StateMap:
    """A map between two states of one molecule in internal coordinates, at fixed placement.

    configurations of A → internal coordinates → standardised with the centres and spreads of A → circular spline couplings of the
    soft torsions → bounded spline couplings and a triangular affine map of the rest, given the torsions → centres and spreads of
    B → configurations of B. Before training it shifts and scales every stiff coordinate, and keeps torsions.

    Args:
        molecule: The molecule, without constraints.
        a: Domains of A (:func:`learn_domains`).
        b: Domains of B, with the same soft torsions (:func:`matched_domains`).
        size: Size of the learned part; None leaves it out: shift and scale alone.
        turn: Angles in rad that are added to the soft torsions first (:func:`turn_between`), ``[n_soft]``; none by default.
        generator: Source of the initial weights.

    Raises:
        InputError: If bonds are constrained, or the soft torsions differ.
    """
    if a.soft.tolist() != b.soft.tolist() or a.fold.tolist() != b.fold.tolist() or a.intervals.tolist() != b.intervals.tolist():
        raise InputError("the two states differ in which torsions turn freely: make their domains with matched_domains")
    coordinates = InternalCoordinates(build_zmatrix(molecule))
    domains_a, domains_b = InternalDomains(a), InternalDomains(b)
    layers: list[Transform] = [] if turn is None else [Turned(turn)]
    if size is not None:
        mean, scale = torch.zeros(a.n_stiff, dtype=torch.float64), torch.eye(a.n_stiff, dtype=torch.float64)
        triangular = ConditionalTriangular(a.n_soft, mean=mean, scale=scale, hidden=size.hidden, generator=generator)
        layers += [*torsion_layers(a, size, generator, mixed=True), *stiff_layers(a, size, generator), triangular]
    learned = Chain(*layers)
    transform = InternalMap(coordinates, Chain(Inverse(domains_a), *layers, domains_b))
    fixed = Chain(domains_a, coordinates), Chain(domains_b, coordinates)
    return StateMap(transform, learned, *fixed, *fixed)


def low_rank_map(
    molecule: Molecule, domains: Domains, *, size: CouplingSize, rank: int, turn: Tensor | None = None, generator: torch.Generator
) -> StateMap:
    """A map between two states of one large molecule in internal coordinates, at fixed placement, that starts as the identity.

    configurations → internal coordinates → standardised with the centres and spreads of both states together → circular spline
    couplings of the soft torsions → bounded spline couplings and a low-rank affine map of the rest, shifts and scales given the
    torsions that are no rotors → the way back. Centres and spreads of each state by itself, which :func:`internal_coordinate_map`
    starts from, are noise where hundreds of coordinates meet a few hundred independent frames.

    Args:
        molecule: The molecule, without constraints.
        domains: Domains of both states together (:func:`learn_domains`).
        size: Size of the couplings.
        rank: Directions of the linear map.
        turn: Angles in rad that are added to the soft torsions first (:func:`turn_between`), ``[n_soft]``; none by default.
        generator: Source of the initial weights.

    Raises:
        InputError: If bonds are constrained.
    """
    coordinates, both = InternalCoordinates(build_zmatrix(molecule)), InternalDomains(domains)
    layers: list[Transform] = [] if turn is None else [Turned(turn)]
    free = np.flatnonzero(domains.fold == 1).tolist()
    linear = LowRankAffine(domains.n_soft, domains.n_stiff, rank=rank, given=free, hidden=size.hidden, generator=generator)
    layers += [*torsion_layers(domains, size, generator, mixed=True), *stiff_layers(domains, size, generator), linear]
    transform, fixed = InternalMap(coordinates, Chain(Inverse(both), *layers, both)), Chain(both, coordinates)
    return StateMap(transform, Chain(*layers), fixed, fixed, fixed, fixed)


def radial_solvent_map(
    xs: Sequence[np.ndarray], *, centre: int, outer: float | None = None, box: Tensor | None = None, n_bins: int = 16
) -> StateMap:
    """A map between two states of a solute of one particle in its solvent: solvent moves along the line to the solute.

    Args:
        xs: Training configurations ``[n, n_atoms, 3]`` in nm of both states, which tell how near solvent comes.
        centre: The solute.
        outer: Distance in nm beyond which nothing moves; half the shortest edge of the box by default.
        box: Vectors of the box in nm ``[3, 3]``, None without one.
        n_bins: Bins of the spline.

    Raises:
        InputError: If the central atom does not exist, there is neither a box nor an outer distance, it reaches beyond half the box, or the
            box is not rectangular.
    """
    if outer is None and box is None:
        raise InputError("without a periodic box a radial map has to be told how far it reaches: give map.outer")
    edges, nearest = _around(xs, centre=centre, box=box)
    reach = outer or 0.5 * float(edges.min())  # type: ignore[union-attr]
    learned = RadialMap(xs[0].shape[1], centre=centre, inner=_NEVER_REACHED * nearest, outer=reach, box=edges, n_bins=n_bins)
    return StateMap(learned, learned)


@dataclass(frozen=True)
class SolventSize:
    """How large a continuous map of solvent is, and in how many steps it is integrated.

    Attributes:
        n_central: Functions of the distance from the solute.
        n_radial: Functions of the distance of neighbours.
        n_times: Functions of time.
        training_steps: Runge–Kutta steps while it is trained.
        steps: Steps where works are reported.
    """

    n_central: int
    n_radial: int
    n_times: int
    training_steps: int
    steps: int


def solvent_flow_map(
    xs: Sequence[np.ndarray],
    *,
    size: SolventSize,
    centre: int,
    outer: float | None = None,
    length: float | None = None,
    box: Tensor | None = None,
) -> StateMap:
    """A continuous map between two states of a solute of one particle in its solvent, in which neighbours push each other too.

    Args:
        xs: Training configurations ``[n, n_atoms, 3]`` in nm of both states, which tell how near solvent comes.
        size: How large it is.
        centre: The solute.
        outer: Distance in nm up to which the solute acts; 0.9 of the shortest edge of the box by default.
        length: Typical distance of neighbours in nm; by default the median of the data.
        box: Vectors of the box in nm ``[3, 3]``, None without one.

    Raises:
        InputError: If the central atom does not exist, there is neither a box nor an outer distance, it reaches too far, or the box is
            not rectangular.
    """
    if outer is None and box is None:
        raise InputError("without a periodic box a solvent map has to be told how far the solute acts: give map.outer")
    edges, nearest = _around(xs, centre=centre, box=box)
    typical = neighbour_distance(torch.as_tensor(xs[0], dtype=torch.float64), edges=edges, most=_LOOKED_AT)
    try:
        velocity = SolventField(
            xs[0].shape[1], centre=centre, inner=_NEVER_REACHED * nearest, outer=outer or _ACTS * float(edges.min()),  # type: ignore[union-attr]
            length=length or typical, box=edges, n_central=size.n_central, n_radial=size.n_radial,
            n_times=size.n_times,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"a solvent map cannot be made: {error}") from None
    learned = ContinuousTransform(velocity, FixedStep(size.training_steps), checkpointing=False)
    solver = FixedStep(size.steps)
    return StateMap(learned.with_solver(solver), learned, solver=solver)


def edges_of(box: Tensor | None) -> Tensor | None:
    """Edges ``[3]`` of a rectangular box given by its vectors ``[3, 3]`` in nm.

    Raises:
        InputError: If it is not rectangular.
    """
    edges = None if box is None else torch.diagonal(box)
    if box is not None and edges is not None and not torch.equal(box, torch.diag(edges)):
        raise InputError("a map around a solute needs a rectangular box, and this one is skewed: make the system with a rectangular box")
    return edges


def _around(xs: Sequence[np.ndarray], *, centre: int, box: Tensor | None) -> tuple[Tensor | None, float]:
    """Edges of the box in nm, and the least distance of any atom from the central one."""
    edges = edges_of(box)
    if centre >= xs[0].shape[1]:
        raise InputError(f"map.centre: expected an atom from 0 to {xs[0].shape[1] - 1}, got {centre}")
    nearest = []
    for x in xs:
        rows = torch.as_tensor(x, dtype=torch.float64)
        r = nearest_images(rows - rows[:, centre : centre + 1], edges).norm(dim=2)
        nearest.append(float(r[:, torch.arange(r.shape[1]) != centre].min()))
    return edges, min(nearest)


def matched_domains(molecule: Molecule, xs: Sequence[np.ndarray], *, hot: Sequence[np.ndarray] = ()) -> list[Domains]:
    """Domains of several states of a molecule that agree in kind: soft in all where soft in one; centres and spreads are of each.

    Args:
        molecule: The molecule.
        xs: Training configurations ``[n, n_atoms, 3]`` in nm of every state.
        hot: Hotter configurations, which show more of what turns freely.

    Raises:
        TopologyError: If the molecule has no such coordinates, or the data hold two mirror images.
    """
    everything = learn_domains(molecule, np.concatenate([*xs, *hot]))
    coordinates = InternalCoordinates(build_zmatrix(molecule))
    found = []
    for x in xs:
        with torch.no_grad():
            q, _ = coordinates.inverse(torch.as_tensor(x, dtype=torch.float64))
        found.append(everything.recentred(q.numpy()))
    return found


def turn_between(molecule: Molecule, domains: Domains, x: np.ndarray, y: np.ndarray) -> Tensor:
    """Angles that lead the circular means of soft torsions of one state to those of another, in rad ``[n_soft]``.

    Torsions that are spread out in a state have no mean worth the name: they are left alone, as rotors are.

    Args:
        molecule: The molecule.
        domains: Its domains.
        x: Configurations ``[n, n_atoms, 3]`` in nm of the first state.
        y: Configurations of the second.
    """
    coordinates, means = InternalCoordinates(build_zmatrix(molecule)), []
    together = torch.from_numpy(domains.fold) == 1
    for rows in (x, y):
        with torch.no_grad():
            q, _ = coordinates.inverse(torch.as_tensor(rows, dtype=torch.float64))
        torsions = q[:, torch.from_numpy(domains.soft)]
        sine, cosine = torsions.sin().mean(dim=0), torsions.cos().mean(dim=0)
        means.append(torch.atan2(sine, cosine))
        together &= torch.hypot(sine, cosine) > _TOGETHER
    turn = torch.remainder(means[1] - means[0] + math.pi, 2 * math.pi) - math.pi
    return torch.where(together, turn, 0.0)
