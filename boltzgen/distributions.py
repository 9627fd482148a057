"""Base distributions of flows, and densities that a solver cannot tell everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from boltzgen.core import Context, Distribution
from boltzgen.errors import EnergyError, InputError, SolverError
from boltzgen.networks.pairs import shared_by_kinds

#: Images of a wrapped normal count up to this many widths.
_REACH = 9.0


class TorusNormal(Distribution):
    """Independent uniform angles on [−π, π) and standard normal coordinates: the base of internal-coordinate flows.

    ln p(z) = −n_angles ln 2π − ½ Σ z² − ½ n_normal ln 2π, the first ``n_angles`` columns being the angles.

    Args:
        n_angles: Number of uniform angles.
        n_normal: Number of standard normal coordinates.
        dtype: Precision of the samples: float64 for densities that are reported, float32 is enough to train.
    """

    def __init__(self, n_angles: int, n_normal: int, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.n_angles, self.n_normal, self.dtype = n_angles, n_normal, dtype
        self.event_shape = (n_angles + n_normal,)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        angles = (2 * torch.rand(n, self.n_angles, generator=generator, dtype=self.dtype) - 1) * math.pi
        normal = torch.randn(n, self.n_normal, generator=generator, dtype=self.dtype)
        z = torch.cat([angles, normal], dim=1)
        return z, self.log_prob(z)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return _normal_log_prob(x[:, self.n_angles :]) - self.n_angles * math.log(2 * math.pi)


class GivenAngles(Distribution):
    """Standard normal coordinates beside angles that are drawn from a given set: the base of the flow of y given its angles.

    ln p(z | s) = −½ Σ z² − ½ n_normal ln 2π: the density of the normal coordinates at given angles s (the first columns), whatever
    the distribution of the angles is.

    Args:
        angles: Set of angles ``[n, n_angles]``, drawn with replacement.
        n_normal: Number of standard normal coordinates.
    """

    angles: Tensor

    def __init__(self, angles: Tensor, n_normal: int) -> None:
        super().__init__()
        self.register_buffer("angles", angles, persistent=False)
        self.n_normal = n_normal
        self.event_shape = (angles.shape[1] + n_normal,)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.beside(self.angles[torch.randint(len(self.angles), (n,), generator=generator)], generator=generator)

    def beside(self, angles: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normal coordinates beside the given angles ``[n, n_angles]``, in their order: ``(z [n, n_angles + n_normal], log_prob [n])``."""
        normal = torch.randn(len(angles), self.n_normal, generator=generator, dtype=angles.dtype)
        z = torch.cat([angles, normal], dim=1)
        return z, self.log_prob(z)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return _normal_log_prob(x[:, self.angles.shape[1] :])


class NormalMixture(Distribution):
    """A mixture of normals with diagonal covariances, wrapped around the period of values that have one.

    q(x) = Σ_m w_m Π_i Σ_n N(x_i + n P_i; μ_mi, σ_mi²), n = 0 alone where x_i has no period; periodic x_i lie in [−P_i/2, P_i/2).

    Args:
        means: μ ``[m, *event]``.
        widths: σ ``[m, *event]``.
        weights: w ``[m]``, up to a factor; all equal by default.
        periods: Period of every value of a one-dimensional event, None where it has none; none by default.

    Raises:
        InputError: If the numbers do not fit, or a width or weight is not positive.
    """

    means: Tensor
    widths: Tensor
    log_weights: Tensor

    def __init__(
        self, means: Tensor, widths: Tensor, *, weights: Tensor | None = None, periods: Sequence[float | None] | None = None
    ) -> None:
        super().__init__()
        weights = torch.ones(len(means), dtype=torch.float64) if weights is None else weights.to(torch.float64)
        fits = means.shape == widths.shape and means.ndim >= 2 and len(means) and weights.shape == (len(means),)
        if not fits or not bool((widths > 0).all() and (weights > 0).all() and torch.isfinite(means).all()):
            raise InputError(f"expected means [m, ...], positive widths of that shape and m positive weights, got {list(means.shape)}, "
                             f"{list(widths.shape)} and {list(weights.shape)}")  # fmt: skip
        if periods is not None and (means.ndim != 2 or len(periods) != means.shape[1] or any(p is not None and not p > 0 for p in periods)):
            raise InputError(f"expected a positive period or None for each of the {list(means.shape[1:])} values, got {list(periods)}")
        self.event_shape = tuple(means.shape[1:])
        self.periods: tuple[float | None, ...] = tuple(periods or ())
        self.register_buffer("means", means.to(torch.float64))
        self.register_buffer("widths", widths.to(torch.float64))
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        chosen = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        x = self.means[chosen] + self.widths[chosen] * torch.randn(n, *self.event_shape, generator=generator, dtype=torch.float64)
        for i, period in enumerate(self.periods):
            if period is not None:
                x[:, i] = torch.remainder(x[:, i] + 0.5 * period, period) - 0.5 * period
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        away = x.to(torch.float64)[:, None] - self.means
        log_normal = self._log_normal(away, self.widths)
        for i, period in enumerate(self.periods):
            if period is not None:
                reach = math.ceil(0.5 + _REACH * float(self.widths[:, i].max()) / period)
                images = period * torch.arange(-reach, reach + 1, dtype=torch.float64)
                nearest = torch.remainder(away[:, :, i] + 0.5 * period, period) - 0.5 * period
                log_normal[:, :, i] = self._log_normal(nearest[..., None] + images, self.widths[:, i, None]).logsumexp(dim=-1)
        return (self.log_weights + log_normal.flatten(2).sum(dim=2)).logsumexp(dim=1)

    @staticmethod
    def _log_normal(away: Tensor, width: Tensor) -> Tensor:
        return -0.5 * (away / width) ** 2 - width.log() - 0.5 * math.log(2 * math.pi)


class ParticleNormal(Distribution):
    """A Gaussian of n particles in d dimensions that knows no direction: u(x) = ½ Σ_ij K_ij x_i·x_j, K the same for every dimension.

    Every row of K sums to zero: translation has no weight. The density is that on the mean-free subspace Σ_i x_i = 0, which has
    d(n − 1) dimensions and its natural Euclidean volume,

        ln p(x) = −½ Σ_ij K_ij x_i·x_j − ½ d (n − 1) ln 2π + ½ d ln det' K

    with det' the product of all eigenvalues but that of translation. With ``centre_scale`` s, the centre of mass x̄ is normal too,
    with standard deviation s in each dimension, and the density is that on all d n coordinates: the volume elements are related
    by dx = n^{d/2} dx̄ dx_mean-free.

    Args:
        precision: K ``[n, n]`` in 1/nm², symmetric, rows summing to zero, all other eigenvalues positive.
        n_dimensions: d.
        centre_scale: Standard deviation of the centre in nm, for systems that are held in place; None for mean-free ones.
        dtype: Precision of the samples.

    Raises:
        InputError: If K is not such a matrix.

    References:
        Köhler, Klein & Noé, ICML 2020, section 4 (mean-free Gaussian); Jing et al., EigenFold, 2023, eq. 3 (harmonic prior).
    """

    precision: Tensor
    modes: Tensor
    scales: Tensor

    def __init__(
        self, precision: Tensor, n_dimensions: int, *, centre_scale: float | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        k = precision.to(torch.float64)
        if (
            k.ndim != 2
            or k.shape[0] != k.shape[1]
            or not torch.allclose(k, k.T)
            or float(k.sum(1).abs().max()) > 1e-8 * float(k.abs().max())
        ):
            raise InputError("expected a symmetric matrix between particles whose rows sum to zero")
        values, vectors = torch.linalg.eigh(k)
        if len(k) < 2 or float(values[1]) <= 1e-10 * float(values[-1]):
            raise InputError("expected a connected matrix: every particle must be tied to every other, directly or through others")
        self.event_shape, self.centre_scale, self.dtype = (len(k), n_dimensions), centre_scale, dtype
        self.register_buffer("precision", k, persistent=False)
        self.register_buffer("modes", vectors[:, 1:], persistent=False)
        self.register_buffer("scales", values[1:].rsqrt(), persistent=False)
        self._log_norm = 0.5 * n_dimensions * ((len(k) - 1) * math.log(2 * math.pi) - float(values[1:].log().sum()))

    @classmethod
    def isotropic(
        cls,
        n_particles: int,
        n_dimensions: int,
        *,
        scale: float = 1.0,
        centre_scale: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> ParticleNormal:
        """The mean-free standard normal times ``scale`` in nm: K = (1 − 1/n) / scale²."""
        k = (torch.eye(n_particles, dtype=torch.float64) - 1.0 / n_particles) / scale**2
        return cls(k, n_dimensions, centre_scale=centre_scale, dtype=dtype)

    @classmethod
    def harmonic(cls, bonds: Tensor, *, n_particles: int, length: float, dtype: torch.dtype = torch.float64) -> ParticleNormal:
        """Springs along bonds in three dimensions with ⟨|x_i − x_j|²⟩ = ``length``² (nm) for a bond of a tree: K = 3 / length² · Laplacian.

        Args:
            bonds: Bonded pairs ``[m, 2]``; they must connect all particles.
            n_particles: n.
            length: Length of a bond in nm.
            dtype: Precision of the samples.
        """
        k = torch.zeros(n_particles, n_particles, dtype=torch.float64)
        for i, j in bonds.tolist():
            for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
                k[a, b] += sign * 3.0 / length**2
        return cls(k, 3, dtype=dtype)

    @classmethod
    def fitted(
        cls, x: Tensor, *, kinds: Tensor | None = None, narrowest: float = 0.0, dtype: torch.dtype = torch.float64
    ) -> ParticleNormal:
        """The one closest to data ``[m, n, d]``: it has their mean squared distance for every pair of particles.

        Combinations of atoms that hardly vary, such as a flat group's centre against its corners, are as narrow in it as in the data. A
        flow that starts there has to keep them narrow all the way, and whatever it misses counts in units of that width; with a wider
        start it forgets early errors while it contracts. ``narrowest`` widens them.

        Args:
            x: Data in nm.
            kinds: Kind of every particle ``[n]``; those of equal kinds are treated alike. All differ by default.
            narrowest: Least standard deviation of any normal mode, in nm; modes that are wider keep theirs.
            dtype: Precision of the samples.
        """
        centred = x.to(torch.float64) - x.to(torch.float64).mean(dim=1, keepdim=True)
        n = x.shape[1]
        covariance = torch.einsum("mid,mjd->ij", centred, centred) / (len(x) * x.shape[2])
        covariance = covariance if kinds is None else shared_by_kinds(covariance, kinds)
        one = torch.full((n, n), 1.0 / n, dtype=torch.float64)
        variances, modes = torch.linalg.eigh(covariance + one)
        precision = (modes / variances.clamp_min(narrowest**2)) @ modes.T
        return cls(precision - one / max(1.0, narrowest**2), x.shape[2], dtype=dtype)

    @property
    def mean_squares(self) -> Tensor:
        """Mean squared distance of every pair of particles ``[n, n]`` in nm²."""
        covariance = (self.modes * self.scales.square()) @ self.modes.T
        variances = torch.diagonal(covariance)
        return self.event_shape[1] * (variances + variances[:, None] - 2 * covariance)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn(n, len(self.scales), self.event_shape[1], generator=generator, dtype=self.dtype).to(self.modes.device)
        x = (self.modes * self.scales).to(self.dtype) @ noise
        if self.centre_scale is not None:
            x = x + self.centre_scale * torch.randn(n, 1, self.event_shape[1], generator=generator, dtype=self.dtype).to(x.device)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        x = x.to(torch.float64)
        n, d = self.event_shape
        log_prob = -0.5 * (x * (self.precision @ x)).sum(dim=(1, 2)) - self._log_norm
        if self.centre_scale is None:
            return log_prob
        centre = _normal_log_prob(x.mean(dim=1) / self.centre_scale) - d * math.log(self.centre_scale)
        return log_prob + centre - 0.5 * d * math.log(n)


def where_solved(solve: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``solve`` makes of the rows of ``x`` that its solver can follow, ``[k, ...]``, and their numbers ``[k]``.

    Rows that fail cost the others nothing but another call.

    Raises:
        SolverError: If all rows fail, or it is not known which.
    """
    rows = torch.arange(len(x), device=x.device)
    while True:
        try:
            return solve(x[rows]), rows
        except SolverError as failure:
            well = torch.ones(len(rows), dtype=torch.bool, device=x.device)
            well[list(failure.rows)] = False
            if bool(well.all()) or not bool(well.any()):
                raise
            rows = rows[well]


def log_prob_where_known(density: Distribution, x: Tensor, context: Context | None = None) -> Tensor:
    """ln of a density at ``x``, ``[b]``; NaN at configurations where its solver fails, which other rows do not suffer for.

    Raises:
        EnergyError: If the density itself is not a number.
        SolverError: If the solver fails and does not say where.
    """
    log_q = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
    try:
        found, rows = where_solved(lambda at: density.log_prob(at, context), x)
    except SolverError as failure:
        if failure.rows:
            return log_q
        raise
    n_broken = int(torch.isnan(found).sum())
    if n_broken:
        raise EnergyError(f"{n_broken} log densities of {len(x)} are not a number: the flow is broken there")
    log_q[rows] = found
    return log_q


def _normal_log_prob(x: Tensor) -> Tensor:
    """ln of the standard normal density at ``x`` ``[b, d]``: ``[b]``, float64."""
    return -0.5 * x.to(torch.float64).square().sum(dim=1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
