"""Every public transform, target, distribution, objective and field, one line each: what is registered here is under the contract tests.

A line is a name and a function that makes the object (the same each time) together with what the contract needs:
transforms a few latent rows ``z``, targets a few configurations ``x``, distributions the box ``[d, 2]``, d ≤ 2, that holds
their mass, objectives a flow, fields the dimensions they live in and whether they are equivariant to reflections.
``test_contract_*.py`` fails when a public class is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from nflows.transforms import LULinear
from torch import Tensor

from boltzgen.core import Chain, Context, Distribution, Flow, Inverse, Objective, Target, Transform
from boltzgen.distributions import GivenAngles, NormalMixture, ParticleNormal, TorusNormal
from boltzgen.mixtures import Flat, Mixture
from boltzgen.networks.egnn import EGNN
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.hollow_field import HollowField
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.networks.radial_field import RadialField
from boltzgen.networks.surroundings import Surroundings
from boltzgen.networks.tensor_field import TensorField
from boltzgen.networks.torus_field import TorusField
from boltzgen.targets.analytic import DoubleWell, Gaussian, GaussianMixture, VonMisesProduct
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster, LennardJonesCluster
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.targets.views import Counted, Regularised, Restricted, Tempered
from boltzgen.training.couplings import NearestImages
from boltzgen.training.flow_matching import DenoisingScore, FlowMatching
from boltzgen.training.objectives import ForwardKL, LogVariance, OfPart, ReverseKL, WeightedSum
from boltzgen.training.targeted import EndState, TargetedPerturbation
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.coupling import BoundedSplineCoupling, CircularSplineCoupling, NflowsAdapter
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.internal_map import InternalMap, OnAtoms, Turned
from boltzgen.transforms.low_rank import LowRankAffine
from boltzgen.transforms.one_to_one import OneToOne
from boltzgen.transforms.radial_map import RadialMap
from boltzgen.transforms.rescaled import Rescaled
from boltzgen.transforms.surrounded import SurroundedShape
from boltzgen.transforms.triangular import ConditionalTriangular
from boltzgen.transforms.zmatrix import build_zmatrix
from tests import molecules


class Exponential(Transform):
    """x = exp(s z), elementwise with trainable s: the simplest transform with a Jacobian that varies."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.linspace(-0.5, 0.5, size, dtype=torch.float64))

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        exponent = self.log_scale.exp() * z
        return exponent.exp(), (exponent + self.log_scale).sum(1)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return x.log() / self.log_scale.exp(), -(x.log() + self.log_scale).sum(1)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=seeded(), dtype=torch.float64)


def internal() -> tuple[InternalCoordinates, Tensor]:
    """Methanol near a sensible geometry."""
    transform = InternalCoordinates(build_zmatrix(molecules.methanol()))
    q = torch.full((5, transform.n_internal), 0.1, dtype=torch.float64)
    q[:, transform.angle_columns] = 1.9
    q[:, transform.torsion_columns] = torch.tensor([0.4, 2.1, -2.0], dtype=torch.float64)
    return transform, q + noise(*q.shape, scale=0.02)


def internal_domains() -> tuple[InternalDomains, Tensor]:
    coordinates, q = internal()
    names = tuple(f"atom {i}" for i in range(6))
    domains = Domains.from_data(coordinates, coordinates.zmatrix, q.numpy(), names=names)
    return InternalDomains(domains), noise(5, q.shape[1])


def internal_map() -> tuple[InternalMap, Tensor]:
    """A map of methanol's internal coordinates, on configurations in any placement."""
    coordinates, q = internal()
    layer = BoundedSplineCoupling(
        q.shape[1], transformed=(0, 5, 9), angles=(10, 11), linear=(1, 6), bins=4, hidden=(8,), generator=seeded(), compiled=False
    )
    domains, _ = internal_domains()
    x, _ = coordinates(q)
    turn = torch.linalg.qr(noise(3, 3)).Q
    return InternalMap(coordinates, Chain(Inverse(domains), layer, domains)), x @ (turn * torch.linalg.det(turn)) + noise(5, 1, 3)


def on_atoms() -> tuple[OnAtoms, Tensor]:
    transform, x = internal_map()
    carried = noise(5, 2, 3)
    return OnAtoms(transform, atoms=(1, 2, 3, 5, 6, 7), n_atoms=8), torch.cat([carried[:, :1], x[:, :3], carried[:, 1:], x[:, 3:]], dim=1)


def surrounded(*, torsions: bool = False) -> tuple[SurroundedShape, Tensor]:
    """Methanol among three atoms of two kinds in a box, one of them seen as an image: its stiff coordinates move, or its torsion."""
    transform, x = internal_map()
    domains, _ = internal_domains()
    n_soft, size = domains.n_soft, transform.coordinates.n_internal
    moved = range(n_soft) if torsions else range(n_soft, size)
    around = Surroundings(6, (1, 8, 1), inner=0.2, cutoff=0.9, n_functions=4, box=torch.tensor([1.9, 2.0, 2.1], dtype=torch.float64))
    layer = SurroundedShape(
        transform.coordinates, domains, around, atoms=(1, 2, 3, 5, 6, 7), n_atoms=9, moved=moved, length=0.01, hidden=(8,),
        reference=torch.full((len(moved),), 0.4 if torsions else 0.0), generator=seeded(),
    )  # fmt: skip
    carried = x[:, :1] + torch.tensor([[0.35, 0.1, 0.0], [-0.1, -1.7, 0.1], [0.0, 0.2, 0.5]]) + 0.05 * noise(5, 3, 3)
    x = torch.cat([carried[:, :1], x[:, :3], carried[:, 1:2], x[:, 3:], carried[:, 2:]], dim=1)
    layer.standardise(x)
    return layer, x


def radial_map() -> tuple[RadialMap, Tensor]:
    """Atoms around a central one in a box, some of them seen as images, one beyond the reach and one nearer than anything moves."""
    x = 0.3 * noise(5, 6, 3) + torch.tensor([[0.0, 0, 0], [0.6, 0, 0], [0, 1.5, 0], [0, 0.4, 0.3], [1.0, 1.0, 0.9], [0.1, 0, 0.05]])
    return RadialMap(6, centre=0, inner=0.2, outer=1.0, box=torch.tensor([2.0, 2.2, 2.4]), n_bins=5), x


def triangular() -> tuple[ConditionalTriangular, Tensor]:
    scale = torch.eye(3, dtype=torch.float64) + 0.3 * torch.ones(3, 3, dtype=torch.float64).tril()
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    return ConditionalTriangular(2, mean=mean, scale=scale, hidden=(8,), generator=seeded()), noise(5, 5)


def low_rank(given: Sequence[int] = (1,)) -> tuple[LowRankAffine, Tensor]:
    layer = LowRankAffine(2, 4, rank=2, given=given, hidden=(8,), generator=seeded())
    with torch.no_grad():
        for parameter in layer.parameters():  # away from the identity, where it starts
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(3))
    return layer, noise(5, 6)


def circular() -> tuple[CircularSplineCoupling, Tensor]:
    layer = CircularSplineCoupling(
        4, transformed=(0, 2), fold=(1, 3), angles=(1,), linear=(3,), bins=5, hidden=(8,), generator=seeded(), compiled=False
    )
    return layer, noise(6, 4)


def bounded() -> tuple[BoundedSplineCoupling, Tensor]:
    layer = BoundedSplineCoupling(4, transformed=(1, 3), angles=(0,), linear=(2,), bins=5, hidden=(8,), generator=seeded(), compiled=False)
    return layer, noise(6, 4, scale=3.0)


def continuous(n_steps: int = 24) -> tuple[ContinuousTransform, Tensor]:
    field = RadialField(3, 2, length=2.0, n_radial=4, n_times=2)
    return ContinuousTransform(field, FixedStep(n_steps)), noise(3, 3, 2)


TRANSFORMS: dict[str, Callable[[], tuple[Transform, Tensor]]] = {
    "Chain": lambda: (Chain(Exponential(3), Inverse(Exponential(3)), Exponential(3)), noise(5, 3)),
    "Inverse": lambda: (Inverse(Exponential(3)), noise(5, 3).exp()),
    "InternalCoordinates": internal,
    "InternalDomains": internal_domains,
    "InternalMap": internal_map,
    "OnAtoms": on_atoms,
    "SurroundedShape": surrounded,
    "SurroundedShape of torsions": lambda: surrounded(torsions=True),
    "Turned": lambda: (Turned(torch.tensor([0.5, -2.0])), noise(5, 4)),
    "RadialMap": radial_map,
    "Rescaled": lambda: (Rescaled([0.5, -1.0, 0.0], [2.0, 0.3, 1.0], order=[2, 0, 1]), noise(5, 3)),
    "ConditionalTriangular": triangular,
    "LowRankAffine": low_rank,
    "CircularSplineCoupling": circular,
    "BoundedSplineCoupling": bounded,
    "ContinuousTransform": continuous,
    "OneToOne": lambda: (OneToOne.of(continuous()[0], FixedStep(1)), continuous()[1]),
    "NflowsAdapter": lambda: (NflowsAdapter(LULinear(3, identity_init=True)), noise(5, 3)),
}


def constrained() -> tuple[ConstrainedTarget, Tensor]:
    molecule = molecules.graph("OHH", [(0, 1), (0, 2)], constraints={(0, 1): 0.1, (0, 2): 0.1})
    return ConstrainedTarget(Gaussian(torch.zeros(3, 3), covariance=torch.eye(9)), molecule), noise(4, 3, 3)


def openmm_target() -> tuple[Target, Tensor]:
    from boltzgen.md.platforms import PlatformChoice
    from boltzgen.md.target import OpenMMTarget

    folder = molecules.SYSTEMS / "alanine_dipeptide_vacuum"
    reference = PlatformChoice(name="Reference")
    target = OpenMMTarget.from_files(folder / "topology.pdb", folder / "system.xml", temperature_kelvin=300.0, platform=reference)
    x = molecules.read("alanine_dipeptide_vacuum")[1]
    return target, x + noise(3, 22, 3, scale=0.002)


def double_well() -> Target:
    return DoubleWell(2)


TARGETS: dict[str, Callable[[], tuple[Target, Tensor]]] = {
    "Gaussian": lambda: (Gaussian(noise(2), covariance=torch.tensor([[1.0, 0.3], [0.3, 0.5]])), noise(4, 2)),
    "GaussianMixture": lambda: (
        GaussianMixture(noise(2, 2), covariances=0.5 * torch.eye(2).repeat(2, 1, 1), heights=torch.tensor([1.0, 2.0])),
        noise(4, 2),
    ),
    "DoubleWell": lambda: (double_well(), noise(4, 2)),
    "VonMisesProduct": lambda: (VonMisesProduct(noise(2), concentration=torch.tensor([1.0, 3.0])), noise(4, 2)),
    "DoubleWellCluster": lambda: (DoubleWellCluster(), noise(5, 4, 2, scale=2.0)),
    "LennardJonesCluster": lambda: (LennardJonesCluster(5), noise(5, 5, 3, scale=2.0)),
    "CoulombGas": lambda: (CoulombGas(4, 2), noise(5, 4, 2)),
    "Tempered": lambda: (Tempered(double_well(), factor=0.5), noise(4, 2)),
    "Regularised": lambda: (Regularised(double_well(), u_cut=2.0, u_max=50.0), noise(4, 2, scale=2.0)),
    "Regularised, wide": lambda: (Regularised(double_well(), u_cut=2.0, u_max=500.0, scale=30.0), noise(4, 2, scale=2.0)),
    "Counted": lambda: (Counted(double_well()), noise(6, 2)),
    "Restricted": lambda: (Restricted(double_well(), lambda x: x[:, 0] > 0), noise(6, 2)),
    "PulledBack": lambda: (PulledBack(double_well(), Exponential(2).requires_grad_(False), event_shape=(2,)), noise(4, 2, scale=0.5)),
    "ConstrainedTarget": constrained,
    "OpenMMTarget": openmm_target,
}

CIRCLE, LINE = (-math.pi, math.pi), (-9.0, 9.0)

DISTRIBUTIONS: dict[str, Callable[[], tuple[Distribution, np.ndarray]]] = {
    "TorusNormal": lambda: (TorusNormal(1, 1), np.array([CIRCLE, LINE])),
    "TorusNormal of angles": lambda: (TorusNormal(2, 0), np.array([CIRCLE, CIRCLE])),
    "GivenAngles": lambda: (GivenAngles(torch.zeros(3, 0, dtype=torch.float64), 1), np.array([LINE])),
    "NormalMixture": lambda: (
        NormalMixture(
            torch.tensor([[2.9, -1.0], [0.3, 1.0]]),
            torch.tensor([[0.7, 0.5], [2.5, 1.1]]),
            weights=torch.tensor([1.0, 3.0]),
            periods=(2 * math.pi, None),
        ),
        np.array([CIRCLE, LINE]),
    ),
    "ParticleNormal": lambda: (ParticleNormal.isotropic(2, 1, scale=0.8, centre_scale=1.2), np.array([LINE, LINE])),
    "Flat": lambda: (Flat([-1.0, 0.5], [2.0, 0.75]), np.array([(-1.0, 2.0), (0.5, 0.75)])),
    "Mixture": lambda: (Mixture([TorusNormal(0, 1), NormalMixture(noise(2, 1), noise(2, 1).exp())], [0.2, 0.8]), np.array([LINE])),
    "Flow": lambda: (Flow(TorusNormal(0, 1), Exponential(1)), np.array([(0.0, 60.0)])),
}


def mapped() -> tuple[Objective, Transform]:
    """A map between two normal states."""
    start, goal = Gaussian(torch.zeros(2), covariance=torch.eye(2)), Gaussian(noise(2), covariance=torch.tensor([[1.0, 0.3], [0.3, 0.5]]))
    ends = [EndState.of(target, noise(20, 2)) for target in (start, goal)]
    scale, mean = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return TargetedPerturbation(*ends, batch_size=8), ConditionalTriangular(0, mean=mean, scale=scale, hidden=(), generator=seeded())


def trained(make: Callable[[Flow], Objective]) -> tuple[Objective, Flow]:
    flow = Flow(TorusNormal(0, 2), Exponential(2))
    return make(flow), flow


def moved(make: Callable[[Flow], Objective]) -> tuple[Objective, Flow]:
    transform, _ = continuous(2)
    with torch.no_grad():
        for parameter in transform.double().parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64)
    flow = Flow(ParticleNormal.isotropic(3, 2), transform)
    return make(flow), flow


def moved_angles() -> tuple[Objective, Flow]:
    """Flow matching along shortest arcs."""
    field = TorusField(1, 1, hidden=(8,), generator=seeded()).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64)
    flow = Flow(TorusNormal(1, 1), ContinuousTransform(field, FixedStep(2)))
    return FlowMatching(field, flow.base, noise(40, 2), batch_size=8, coupling=NearestImages(1)), flow


CLUSTERS = noise(40, 3, 2)
POSITIVE = noise(40, 2).exp()

OBJECTIVES: dict[str, Callable[[], tuple[Objective, torch.nn.Module]]] = {
    "ForwardKL": lambda: trained(lambda _: ForwardKL(POSITIVE, batch_size=8)),
    "ForwardKL with forces": lambda: trained(lambda _: ForwardKL(POSITIVE, batch_size=8, u_gradient=POSITIVE, outlier_limit=3.0)),
    "ReverseKL": lambda: trained(lambda _: ReverseKL(double_well(), batch_size=8)),
    "LogVariance": lambda: trained(lambda _: LogVariance(POSITIVE, -POSITIVE.sum(1), batch_size=8)),
    "LogVariance with own samples": lambda: trained(
        lambda _: LogVariance(POSITIVE, -double_well().reduced_potential(POSITIVE), batch_size=8, target=double_well())
    ),
    "WeightedSum": lambda: trained(
        lambda _: WeightedSum((0.5, ForwardKL(POSITIVE, batch_size=8)), (2.0, ReverseKL(double_well(), batch_size=8)))
    ),
    "FlowMatching": lambda: moved(lambda flow: FlowMatching(flow.transform.field, flow.base, CLUSTERS, batch_size=8)),  # type: ignore[arg-type]
    "FlowMatching on a circle and a line": moved_angles,
    "DenoisingScore": lambda: moved(lambda flow: DenoisingScore(flow.transform.field, flow.base, CLUSTERS, batch_size=8)),  # type: ignore[arg-type]
    "ForwardKL through a solver": lambda: moved(lambda _: ForwardKL(CLUSTERS, batch_size=8)),
    "ForwardKL through a solver, with forces": lambda: moved(lambda _: ForwardKL(CLUSTERS, batch_size=8, u_gradient=CLUSTERS)),
    "ReverseKL through a solver": lambda: moved(lambda _: ReverseKL(DoubleWellCluster(3, 2), batch_size=8)),
    "TargetedPerturbation": mapped,
    "OfPart": lambda: trained(lambda flow: OfPart(flow, ForwardKL(POSITIVE, batch_size=8), name="part")),
}


class FieldCase(NamedTuple):
    """``make(n, d, labels)`` makes a field at rest; ``mirrored``: whether v(mirror x) = mirror v(x)."""

    make: Callable[[int, int, Sequence[int] | None], ParticleField]
    dimensions: tuple[int, ...] = (2, 3)
    mirrored: bool = True


def embedded(n: int, d: int, labels: Sequence[int] | None, *, n_layers: int = 2, pair_scales: bool = False) -> ParticleField:
    statistics = PairStatistics.of(ParticleNormal.isotropic(n, d).mean_squares, noise(50, n, d)) if pair_scales else None
    return EmbeddedField(
        n, d, length=0.8, labels=labels, n_layers=n_layers, n_radial=8, n_scalars=5, n_vectors=3, hidden=8, statistics=statistics,
        generator=seeded(),
    )  # fmt: skip


def egnn(n: int, d: int, labels: Sequence[int] | None, *, cutoff: float | None = None) -> ParticleField:
    return EGNN(n, d, length=0.8, labels=labels, n_layers=2, n_radial=8, hidden=10, cutoff=cutoff, generator=seeded())


def gradient(n: int, d: int, labels: Sequence[int] | None) -> ParticleField:
    return GradientField(n, d, length=0.8, labels=labels, n_radial=8, n_scalars=5, n_vectors=3, hidden=10, generator=seeded())


def hollow(n: int, d: int, labels: Sequence[int] | None) -> ParticleField:
    return HollowField(n, d, length=0.8, labels=labels, n_radial=8, n_channels=5, n_vectors=3, hidden=10, generator=seeded())


def tensor(n: int, d: int, labels: Sequence[int] | None, *, reflections: bool = True) -> ParticleField:
    sizes = {"n_layers": 2, "n_channels": 3, "n_radial": 8, "hidden": 10}
    return TensorField(n, d, length=0.8, labels=labels, reflections=reflections, **sizes, generator=seeded())


FIELDS: dict[str, FieldCase] = {
    "EmbeddedField": FieldCase(embedded),
    "EmbeddedField of one layer": FieldCase(lambda n, d, labels: embedded(n, d, labels, n_layers=1)),
    "EmbeddedField of three layers": FieldCase(lambda n, d, labels: embedded(n, d, labels, n_layers=3)),
    "EmbeddedField with pair scales": FieldCase(lambda n, d, labels: embedded(n, d, labels, pair_scales=True)),
    "EGNN": FieldCase(egnn),
    "EGNN with a cutoff": FieldCase(lambda n, d, labels: egnn(n, d, labels, cutoff=2.5)),
    "GradientField": FieldCase(gradient),
    "HollowField": FieldCase(hollow),
    "RadialField": FieldCase(lambda n, d, labels: RadialField(n, d, length=0.8, labels=labels, n_radial=8)),
    "TensorField": FieldCase(tensor, dimensions=(3,)),
    "TensorField without reflections": FieldCase(
        lambda n, d, labels: tensor(n, d, labels, reflections=False), dimensions=(3,), mirrored=False
    ),
}
