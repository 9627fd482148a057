"""Named, tested architectures: the only place where networks, transforms and bases are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Chain, Flow, Inverse, Molecule, Target, Transform
from boltzgen.distributions import GivenAngles, TorusNormal
from boltzgen.errors import InputError, ShapeError
from boltzgen.networks.compiled import CompiledField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.networks.pairs import nearest_images
from boltzgen.networks.radial_field import RadialField
from boltzgen.networks.solvent_field import SolventField
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.coupling import BoundedSplineCoupling, CircularSplineCoupling
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.internal_map import InternalMap, OnAtoms, Turned
from boltzgen.transforms.radial_map import RadialMap
from boltzgen.transforms.triangular import ConditionalTriangular
from boltzgen.transforms.zmatrix import build_zmatrix, check_geometry

#: Added to the variances of the standardised data before their Cholesky factor is taken.
_JITTER = 1e-4

#: Share of the smallest distance between solute and solvent in the data below which a radial map moves nothing.
_NEVER_REACHED = 0.75

#: How far a solute acts in a continuous map, in shortest edges of the box.
_ACTS = 0.9

#: Length of the mean of e^{iτ} from which a torsion τ counts as being in one place.
_TOGETHER = 0.7

#: Sectors of a torsion that are made equally common, and the number of rows below which a sector is not repeated any further.
_SECTORS, _FEWEST_IN_SECTOR = 36, 50


@dataclass(frozen=True)
class InternalCoordinateFlow:
    """A flow over all atoms of one molecule, and the parts that training needs.

    Attributes:
        flow: The flow over configurations ``[n_atoms, 3]`` in nm, in double precision.
        latent: The same learned layers, up to the standardised coordinates y, on a single-precision base: for training.
        torsions: The learned density of the soft torsions alone, ``[n_soft]``: the first layers of ``latent``; None without soft torsions.
        stiff: The other layers of ``latent``: they leave the soft torsions as they are.
        fixed: From y to configurations; nothing to learn.
        domains: Kind, centre and spread of every internal coordinate.
    """

    flow: Flow
    latent: Flow
    torsions: Flow | None
    stiff: Chain
    fixed: Chain
    domains: Domains

    def in_sector(self, x: np.ndarray) -> np.ndarray:
        """Which configurations ``[n, n_atoms, 3]`` the flow can make (its mirror image and labelling), bool ``[n]``."""
        with torch.no_grad():
            q, _ = self.fixed.transforms[-1].inverse(torch.as_tensor(x, dtype=torch.float64))  # type: ignore[operator]
        return self.domains.contains(q.numpy())

    def given(self, torsions: Tensor) -> Flow:
        """The learned density of y at soft torsions drawn from a given set ``[n, n_soft]``; it shares its parameters with ``latent``."""
        return Flow(GivenAngles(torsions, self.domains.n_stiff), self.stiff)

    def to_latent(self, x: np.ndarray) -> Tensor:
        """Standardised coordinates y ``[n, d]``, float32, of configurations ``[n, n_atoms, 3]`` in nm."""
        with torch.no_grad():
            y, _ = self.fixed.inverse(torch.as_tensor(x, dtype=torch.float64))
        return y.to(torch.float32)


@dataclass(frozen=True)
class CouplingSize:
    """How large the learned part of the flow is.

    Attributes:
        torsion_layers: Circular coupling layers over the soft torsions.
        torsion_bins: Bins of their splines.
        stiff_layers: Bounded coupling layers over the stiff coordinates, given the torsions.
        stiff_bins: Bins of their splines.
        hidden: Widths of the hidden layers of every conditioner.
        compiled: Whether splines are compiled for training.
    """

    torsion_layers: int
    torsion_bins: int
    stiff_layers: int
    stiff_bins: int
    hidden: Sequence[int]
    compiled: bool


def learn_domains(molecule: Molecule, x: np.ndarray) -> Domains:
    """Domains of a molecule's internal coordinates from training configurations ``[n, n_atoms, 3]`` in nm.

    Raises:
        TopologyError: If the molecule has no such coordinates, or the data hold two mirror images.
    """
    zmatrix = build_zmatrix(molecule)
    check_geometry(zmatrix, torch.as_tensor(x[:: max(1, len(x) // 100)], dtype=torch.float64))
    coordinates = InternalCoordinates(zmatrix)
    with torch.no_grad():
        q, _ = coordinates.inverse(torch.as_tensor(x, dtype=torch.float64))
    return Domains.from_data(coordinates, zmatrix, q.numpy(), names=molecule.names)


def internal_coordinate_flow(
    molecule: Molecule, domains: Domains, *, size: CouplingSize, data: np.ndarray | None, generator: torch.Generator
) -> InternalCoordinateFlow:
    """Torsions first, then bonds, angles and stiff torsions given the torsions.

    latent → circular spline couplings (soft torsions) → bounded spline couplings (stiff, given the torsions) → conditional
    triangular affine map (stiff, given the torsions) → domains → internal coordinates → configurations.

    Args:
        molecule: The molecule.
        domains: From :func:`learn_domains`.
        size: Size of the learned part.
        data: Training configurations ``[n, n_atoms, 3]`` in nm that set the affine map's start, or None when weights are loaded.
        generator: Source of the initial weights.

    Returns:
        The flow and its parts; at the start its stiff coordinates follow the Gaussian of the data.
    """
    coordinates = InternalCoordinates(build_zmatrix(molecule))
    fixed = Chain(InternalDomains(domains), coordinates)
    n_soft, n_stiff = domains.n_soft, domains.n_stiff
    mean, scale = torch.zeros(n_stiff, dtype=torch.float64), torch.eye(n_stiff, dtype=torch.float64)
    if data is not None:
        with torch.no_grad():
            y, log_det = fixed.inverse(torch.as_tensor(data, dtype=torch.float64))
        stiff = y[torch.isfinite(log_det), n_soft:]
        mean, scale = stiff.mean(dim=0), torch.linalg.cholesky(torch.cov(stiff.T) + _JITTER * scale)
    about_torsions = _torsion_layers(domains, size, generator)
    given_torsions: list[Transform] = _stiff_layers(domains, size, generator)
    given_torsions.append(ConditionalTriangular(n_soft, mean=mean, scale=scale, hidden=size.hidden, generator=generator))
    layers = [*about_torsions, *given_torsions]
    latent = Flow(TorusNormal(n_soft, n_stiff, dtype=torch.float32), Chain(*layers))
    flow = Flow(TorusNormal(n_soft, n_stiff), Chain(*layers, *fixed.transforms), event_shape=(molecule.n_atoms, 3))  # type: ignore[arg-type]
    torsions = Flow(TorusNormal(n_soft, 0, dtype=torch.float32), Chain(*about_torsions)) if n_soft else None
    return InternalCoordinateFlow(flow=flow, latent=latent, torsions=torsions, stiff=Chain(*given_torsions), fixed=fixed, domains=domains)


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
    """

    transform: Transform
    learned: Transform
    fixed_a: Chain = field(default_factory=Chain)
    fixed_b: Chain = field(default_factory=Chain)
    sector_a: Chain = field(default_factory=Chain)
    sector_b: Chain = field(default_factory=Chain)
    atoms: Tensor | None = None
    solver: FixedStep | None = None

    def reported(self, learned: Transform) -> Transform:
        """The map of configurations whose works are reported, with these learned layers in place of its own."""
        if self.solver is not None and isinstance(learned, ContinuousTransform):
            return learned.with_solver(self.solver)
        return Chain(Inverse(self.fixed_a), learned, self.fixed_b)

    def carrying(self, atoms: np.ndarray, *, n_atoms: int) -> StateMap:
        """The same map of some atoms of a larger system, which carries the others. It is trained in Cartesian coordinates."""
        whole = OnAtoms(self.transform, atoms=atoms.tolist(), n_atoms=n_atoms)
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
        layers += [*_torsion_layers(a, size, generator), *_stiff_layers(a, size, generator), triangular]
    learned = Chain(*layers)
    transform = InternalMap(coordinates, Chain(Inverse(domains_a), *layers, domains_b))
    fixed = Chain(domains_a, coordinates), Chain(domains_b, coordinates)
    return StateMap(transform, learned, *fixed, *fixed)


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
    try:
        velocity = SolventField(
            xs[0].shape[1], centre=centre, inner=_NEVER_REACHED * nearest, outer=outer or _ACTS * float(edges.min()),  # type: ignore[union-attr]
            length=length or _neighbour_distance(xs[0], edges), box=edges, n_central=size.n_central, n_radial=size.n_radial,
            n_times=size.n_times,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"a solvent map cannot be made: {error}") from None
    learned = ContinuousTransform(velocity, FixedStep(size.training_steps), checkpointing=False)
    solver = FixedStep(size.steps)
    return StateMap(learned.with_solver(solver), learned, solver=solver)


def _around(xs: Sequence[np.ndarray], *, centre: int, box: Tensor | None) -> tuple[Tensor | None, float]:
    """Edges of the box in nm, and the least distance of any atom from the central one."""
    edges = None if box is None else torch.diagonal(box)
    if box is not None and edges is not None and not torch.equal(box, torch.diag(edges)):
        raise InputError("a map around a solute needs a rectangular box, and this one is skewed: make the system with a rectangular box")
    if centre >= xs[0].shape[1]:
        raise InputError(f"map.centre: expected an atom from 0 to {xs[0].shape[1] - 1}, got {centre}")
    nearest = []
    for x in xs:
        rows = torch.as_tensor(x, dtype=torch.float64)
        r = nearest_images(rows - rows[:, centre : centre + 1], edges).norm(dim=2)
        nearest.append(float(r[:, torch.arange(r.shape[1]) != centre].min()))
    return edges, min(nearest)


def _neighbour_distance(x: np.ndarray, edges: Tensor | None) -> float:
    """Median distance in nm of an atom from its nearest neighbour, in about a hundred of the configurations ``[n, n_atoms, 3]``."""
    rows = torch.as_tensor(x[:: max(1, len(x) // 100)], dtype=torch.float64)
    r = nearest_images(rows.unsqueeze(2) - rows.unsqueeze(1), edges).norm(dim=3)
    return float((r + torch.diag(torch.full((r.shape[1],), math.inf, dtype=r.dtype))).amin(dim=2).median())


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


def spread_torsions(torsions: Tensor, domains: Domains, *, n: int, generator: torch.Generator) -> Tensor:
    """Soft torsions resampled so that each of them in turn is nearly uniform over what the given ones visit.

    Rare conformations become as common as frequent ones. Symmetric rotors are left alone.

    Args:
        torsions: Soft torsions ``[m, n_soft]`` in rad.
        domains: Their symmetries.
        n: Rows to draw, with replacement.
        generator: Source of randomness.

    Returns:
        Rows of ``torsions``, ``[n, n_soft]``.
    """
    weights = torch.zeros(len(torsions), dtype=torch.float64)
    for column in np.flatnonzero(domains.fold == 1).tolist():
        sector = ((torsions[:, column] + math.pi) / (2 * math.pi) * _SECTORS).long().clamp(0, _SECTORS - 1)
        count = torch.bincount(sector, minlength=_SECTORS)
        weights += 1.0 / count[sector].clamp_min(_FEWEST_IN_SECTOR)
    if not bool(weights.any()):
        weights += 1.0
    return torsions[torch.multinomial(weights, n, replacement=True, generator=generator)]


def _torsion_layers(domains: Domains, size: CouplingSize, generator: torch.Generator) -> list[Transform]:
    """Couplings between the soft torsions; a single torsion gets one unconditional spline."""
    n = domains.n_soft
    if n == 0:
        return []
    layers: list[Transform] = []
    for transformed, rest in _halves(n, size.torsion_layers if n > 1 else 1, generator):
        layers.append(
            CircularSplineCoupling(
                n + domains.n_stiff,
                transformed=transformed,
                fold=domains.fold[transformed].tolist(),
                angles=rest,
                angles_fold=domains.fold[rest].tolist(),
                linear=[],
                bins=size.torsion_bins,
                hidden=size.hidden,
                generator=generator,
                compiled=False,
            )
        )
    return layers


def _stiff_layers(domains: Domains, size: CouplingSize, generator: torch.Generator) -> list[Transform]:
    """Couplings between the stiff coordinates, conditioned on the soft torsions."""
    n = domains.n_soft
    layers: list[Transform] = []
    for transformed, rest in _halves(domains.n_stiff, size.stiff_layers, generator):
        layers.append(
            BoundedSplineCoupling(
                n + domains.n_stiff,
                transformed=[n + k for k in transformed],
                angles=range(n),
                linear=[n + k for k in rest],
                bins=size.stiff_bins,
                hidden=size.hidden,
                generator=generator,
                compiled=size.compiled,
            )
        )
    return layers


def _halves(n: int, n_layers: int, generator: torch.Generator) -> list[tuple[list[int], list[int]]]:
    """Random halves of n columns, each used twice, once either way round."""
    pairs: list[tuple[list[int], list[int]]] = []
    while len(pairs) < n_layers:
        order = torch.randperm(n, generator=generator).tolist()
        half = (n + 1) // 2
        pairs += [(order[:half], order[half:]), (order[half:], order[:half])] if n > 1 else [(order, [])]
    return pairs[:n_layers]


@dataclass(frozen=True)
class FieldSize:
    """Size of a velocity field.

    Attributes:
        length: Typical distance of neighbours in nm.
        n_layers: Layers, in fields that have any number of them.
        hidden: Width of the hidden layers.
        n_radial: Radial functions.
        compiled: Whether to compile it (:class:`~boltzgen.networks.compiled.CompiledField`).
    """

    length: float
    n_layers: int = 2
    hidden: int = 64
    n_radial: int = 16
    compiled: bool = False


def particle_field(
    kind: Callable[..., ParticleField],
    target: Target,
    *,
    size: FieldSize,
    statistics: PairStatistics | None = None,
    generator: torch.Generator,
) -> ParticleField:
    """A velocity field for the particles of a target; particles of equal labels are equal to it.

    Args:
        kind: Class of the field, or a function that makes it.
        target: Target over configurations ``[n, d]``.
        size: Its size.
        statistics: Distances of all pairs in base and data, for an :class:`~boltzgen.networks.embedded_field.EmbeddedField` of a molecule.
        generator: Source of the initial weights.

    Raises:
        InputError: If the target is periodic, and no field here is.
        ShapeError: If it is not one of particles, or has not one label for each.
    """
    if target.box is not None:
        raise InputError("the target is periodic and the velocity fields are not: they would tear molecules apart at the box's faces")
    if len(target.event_shape) != 2 or len(target.labels) not in (0, target.event_shape[0]):
        raise ShapeError(
            f"expected particles [n, d] with one label each or none, got {list(target.event_shape)} and {len(target.labels)} labels"
        )
    n, d = target.event_shape
    names = sorted(set(target.labels))
    labels = [names.index(label) for label in target.labels] or None
    sizes: dict[str, object] = {"n_radial": size.n_radial}
    if statistics is not None:
        sizes["statistics"] = statistics
    if kind is not RadialField:
        sizes["hidden"] = size.hidden
    if kind not in (RadialField, GradientField):
        sizes["n_layers"] = size.n_layers
    field = kind(n, d, length=size.length, labels=labels, **sizes, generator=generator)  # type: ignore[call-arg]
    return CompiledField(field) if size.compiled else field
