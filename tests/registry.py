"""Every public transform, target, distribution and objective, one line each: what is registered here is put under the contract tests.

A line is a name and a function that makes the object (the same each time) together with what the contract needs:
transforms a few latent rows ``z``, targets a few configurations ``x``, distributions the box ``[d, 2]``, d ≤ 2, that holds
their mass, objectives a flow. ``test_contract_*.py`` fails when a public class is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from nflows.transforms import LULinear
from torch import Tensor

from boltzgen.core import Chain, Context, Distribution, Flow, Inverse, Objective, Target, Transform
from boltzgen.distributions import GivenAngles, TorusNormal
from boltzgen.targets.analytic import DoubleWell, Gaussian, GaussianMixture, VonMisesProduct
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.targets.views import Regularised, Restricted, Tempered
from boltzgen.training.objectives import ForwardKL, LogVariance, OfPart, ReverseKL, WeightedSum
from boltzgen.transforms.coupling import BoundedSplineCoupling, CircularSplineCoupling, NflowsAdapter
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
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


def triangular() -> tuple[ConditionalTriangular, Tensor]:
    scale = torch.eye(3, dtype=torch.float64) + 0.3 * torch.ones(3, 3, dtype=torch.float64).tril()
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    return ConditionalTriangular(2, mean=mean, scale=scale, hidden=(8,), generator=seeded()), noise(5, 5)


def circular() -> tuple[CircularSplineCoupling, Tensor]:
    layer = CircularSplineCoupling(
        4, transformed=(0, 2), fold=(1, 3), angles=(1,), linear=(3,), bins=5, hidden=(8,), generator=seeded(), compiled=False
    )
    return layer, noise(6, 4)


def bounded() -> tuple[BoundedSplineCoupling, Tensor]:
    layer = BoundedSplineCoupling(4, transformed=(1, 3), angles=(0,), linear=(2,), bins=5, hidden=(8,), generator=seeded(), compiled=False)
    return layer, noise(6, 4, scale=3.0)


TRANSFORMS: dict[str, Callable[[], tuple[Transform, Tensor]]] = {
    "Chain": lambda: (Chain(Exponential(3), Inverse(Exponential(3)), Exponential(3)), noise(5, 3)),
    "Inverse": lambda: (Inverse(Exponential(3)), noise(5, 3).exp()),
    "InternalCoordinates": internal,
    "InternalDomains": internal_domains,
    "ConditionalTriangular": triangular,
    "CircularSplineCoupling": circular,
    "BoundedSplineCoupling": bounded,
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
    "Tempered": lambda: (Tempered(double_well(), factor=0.5), noise(4, 2)),
    "Regularised": lambda: (Regularised(double_well(), u_cut=2.0, u_max=50.0), noise(4, 2, scale=2.0)),
    "Regularised, wide": lambda: (Regularised(double_well(), u_cut=2.0, u_max=500.0, scale=30.0), noise(4, 2, scale=2.0)),
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
    "Flow": lambda: (Flow(TorusNormal(0, 1), Exponential(1)), np.array([(0.0, 60.0)])),
}


def trained(make: Callable[[Flow], Objective]) -> tuple[Objective, Flow]:
    flow = Flow(TorusNormal(0, 2), Exponential(2))
    return make(flow), flow


POSITIVE = noise(40, 2).exp()

OBJECTIVES: dict[str, Callable[[], tuple[Objective, Flow]]] = {
    "ForwardKL": lambda: trained(lambda _: ForwardKL(POSITIVE, batch_size=8)),
    "ForwardKL with forces": lambda: trained(lambda _: ForwardKL(POSITIVE, batch_size=8, u_gradient=POSITIVE, outlier_limit=3.0)),
    "ReverseKL": lambda: trained(lambda _: ReverseKL(double_well(), batch_size=8)),
    "LogVariance": lambda: trained(lambda _: LogVariance(POSITIVE, -POSITIVE.sum(1), batch_size=8)),
    "WeightedSum": lambda: trained(
        lambda _: WeightedSum((0.5, ForwardKL(POSITIVE, batch_size=8)), (2.0, ReverseKL(double_well(), batch_size=8)))
    ),
    "OfPart": lambda: trained(lambda flow: OfPart(flow, ForwardKL(POSITIVE, batch_size=8), name="part")),
}
