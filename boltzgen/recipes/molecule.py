"""Flows over the internal coordinates of one molecule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Chain, Flow, Molecule, Transform
from boltzgen.distributions import GivenAngles, TorusNormal
from boltzgen.transforms.coupling import BoundedSplineCoupling, CircularSplineCoupling
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.triangular import ConditionalTriangular
from boltzgen.transforms.zmatrix import build_zmatrix, check_geometry

#: Added to the variances of the standardised data before their Cholesky factor is taken.
_JITTER = 1e-4

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
    about_torsions = torsion_layers(domains, size, generator)
    given_torsions: list[Transform] = stiff_layers(domains, size, generator)
    given_torsions.append(ConditionalTriangular(n_soft, mean=mean, scale=scale, hidden=size.hidden, generator=generator))
    layers = [*about_torsions, *given_torsions]
    latent = Flow(TorusNormal(n_soft, n_stiff, dtype=torch.float32), Chain(*layers))
    flow = Flow(TorusNormal(n_soft, n_stiff), Chain(*layers, *fixed.transforms), event_shape=(molecule.n_atoms, 3))  # type: ignore[arg-type]
    torsions = Flow(TorusNormal(n_soft, 0, dtype=torch.float32), Chain(*about_torsions)) if n_soft else None
    return InternalCoordinateFlow(flow=flow, latent=latent, torsions=torsions, stiff=Chain(*given_torsions), fixed=fixed, domains=domains)


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


def torsion_layers(domains: Domains, size: CouplingSize, generator: torch.Generator, *, mixed: bool = False) -> list[Transform]:
    """Couplings between the soft torsions; a single torsion gets one unconditional spline.

    Args:
        domains: Their domains.
        size: How many layers, and how large.
        generator: Source of the splits and of the initial weights.
        mixed: Whether each half holds half of the torsions that are no rotors: two of them, such as φ and ψ, always see each other.
    """
    n = domains.n_soft
    if n == 0:
        return []
    layers: list[Transform] = []
    apart = np.flatnonzero(domains.fold == 1).tolist() if mixed else []
    for transformed, rest in halves(n, size.torsion_layers if n > 1 else 1, generator, apart=apart):
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


def stiff_layers(domains: Domains, size: CouplingSize, generator: torch.Generator) -> list[Transform]:
    """Couplings between the stiff coordinates, conditioned on the soft torsions."""
    n = domains.n_soft
    layers: list[Transform] = []
    for transformed, rest in halves(domains.n_stiff, size.stiff_layers, generator):
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


def halves(n: int, n_layers: int, generator: torch.Generator, *, apart: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
    """Random halves of n columns, each used twice, once either way round; those to be kept apart are spread evenly over both."""
    pairs: list[tuple[list[int], list[int]]] = []
    while len(pairs) < n_layers:
        order = torch.randperm(n, generator=generator).tolist()
        half = (n + 1) // 2
        if apart:
            first, others = [k for k in order if k in apart], [k for k in order if k not in apart]
            cut = len(first) // 2
            order = [*first[:cut], *others[: half - cut], *first[cut:], *others[half - cut :]]
        pairs += [(order[:half], order[half:]), (order[half:], order[:half])] if n > 1 else [(order, [])]
    return pairs[:n_layers]
