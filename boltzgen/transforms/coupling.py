"""Rational-quadratic spline coupling layers on nflows' spline function, and an adapter for nflows transforms.

Durkan et al., Neural Spline Flows, NeurIPS 2019 (monotonic rational quadratics, eqs. 4–8);
Rezende et al., Normalizing Flows on Tori and Spheres, ICML 2020 (circular splines: end points and their slopes agree).
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from nflows.transforms import Transform as NflowsTransform
from nflows.transforms.splines.rational_quadratic import DEFAULT_MIN_DERIVATIVE, rational_quadratic_spline
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.errors import DomainError
from boltzgen.networks.mlp import MLP

logger = logging.getLogger(__name__)

#: Unnormalised derivative at which a knot has slope 1.
UNIT_SLOPE = math.log(math.exp(1 - DEFAULT_MIN_DERIVATIVE) - 1)

Spline = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def eager_spline(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """nflows' monotonic rational-quadratic spline of [−1, 1] onto itself.

    Args:
        x: Values ``[b, d]`` inside the interval.
        widths: Unnormalised bin widths ``[b, d, K]``.
        heights: Unnormalised bin heights ``[b, d, K]``.
        slopes: Unnormalised slopes at the knots ``[b, d, K + 1]``.
        inverse: Whether to evaluate the inverse function. Where rounding breaks it in float32 (logits of 6 and more), the whole call
            is repeated in float64.

    Returns:
        Values ``[b, d]`` and ln of the derivative ``[b, d]``, in the precision of ``x``.

    Raises:
        DomainError: If values are not finite, or knots of an inverse.
    """
    _require_finite(x)
    try:
        return _spline(x, widths, heights, slopes, inverse)
    except AssertionError:  # nflows asserts that a discriminant is not negative: it may be by rounding, or because knots are NaN
        _require_finite(x, widths, heights, slopes)
    y, log_slope = _spline(x.double(), widths.double(), heights.double(), slopes.double(), inverse)
    return y.to(x.dtype), log_slope.to(x.dtype)


def _spline(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return rational_quadratic_spline(x, widths, heights, slopes, inverse=inverse, left=-1.0, right=1.0, bottom=-1.0, top=1.0)


def _require_finite(*arguments: Tensor) -> None:
    """Refuse values ``[b, d]`` or knots ``[b, d, K]`` that are not finite.

    Raises:
        DomainError: With the number of rows.
    """
    if all(math.isfinite(float(argument.detach().sum())) for argument in arguments):  # a sum is several times faster than isfinite
        return
    finite = torch.stack([torch.isfinite(argument).flatten(1).all(1) for argument in arguments]).all(0)
    if not bool(finite.all()):
        raise DomainError(
            f"{int((~finite).sum())} of {len(finite)} rows of a spline have values or knots that are not finite; expected finite ones: "
            "the coordinates or the weights of the flow have diverged, train with a smaller learning rate"
        )


class CompiledSpline:
    """:func:`eager_spline` compiled by ``torch.compile``, in one graph for every number of columns; same values to rounding.

    A call that the graph refuses is left to the eager spline, which repeats it in float64 or says what is wrong.

    Attributes:
        calls: Number of calls that the compiled graph has answered.
    """

    def __init__(self) -> None:
        self._compiled = torch.compile(_spline, dynamic=True)
        self.calls = 0

    def __call__(self, x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if inverse and x.device.type != "cpu":  # a failed assertion in a compiled graph would end the whole process's use of a GPU
            return eager_spline(x, widths, heights, slopes, inverse)
        _require_finite(x)
        try:
            return self.evaluate(x, widths, heights, slopes, inverse)
        except (AssertionError, RuntimeError):  # inside a graph nflows' assertion is a RuntimeError
            return eager_spline(x, widths, heights, slopes, inverse)

    def evaluate(self, x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The compiled graph's own answer, or its error."""
        w, h, s = (knots.reshape(-1, 1, knots.shape[-1]) for knots in (widths, heights, slopes))
        y, log_slope = self._compiled(x.reshape(-1, 1), w, h, s, inverse)
        self.calls += 1
        return y.view_as(x), log_slope.view_as(x)


@functools.cache
def fast_spline() -> Spline:
    """A :class:`CompiledSpline` where a C++ compiler exists that works, else :func:`eager_spline`."""
    if not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        logger.warning("no C++ compiler was found: splines run uncompiled, about 1.5 to 3 times slower")
        return eager_spline
    compiled = CompiledSpline()
    try:
        knots, slopes = torch.zeros(3, 2, 4, requires_grad=True), torch.zeros(3, 2, 5, requires_grad=True)
        y, log_slope = compiled.evaluate(torch.zeros(3, 2), knots, knots, slopes, False)
        (y.sum() + log_slope.sum()).backward()
    except Exception as error:  # a compiler that is there but does not work: any exception of the toolchain
        logger.warning("torch.compile failed (%s): splines run uncompiled, about 1.5 to 3 times slower", type(error).__name__)
        return eager_spline
    return compiled


class SplineCoupling(Transform):
    """Coupling layer on flat vectors: some columns pass through splines whose knots depend on other columns.

    Splines are evaluated in the precision of their input (training may use float32, densities that are reported float64).

    Args:
        size: Length of the vectors.
        transformed: Columns that are transformed.
        angles: Conditioning columns that are angles, seen as cos and sin of their multiples up to three.
        angles_fold: Fold m of those angles, 1 by default: only multiples of m are seen (m itself at least), which keeps the symmetry.
        linear: Conditioning columns that are seen as they are.
        bins: Number of spline bins.
        hidden: Widths of the hidden layers of the conditioner.
        generator: Source of the initial weights.
        compiled: Whether to compile the spline for float32 (see :func:`fast_spline`); float64 always runs eagerly.
    """

    #: Largest multiple of conditioning angles that the conditioner sees.
    HARMONICS = 3

    transformed: Tensor
    angles: Tensor
    multiples: Tensor
    linear: Tensor

    def __init__(
        self,
        size: int,
        *,
        transformed: Sequence[int],
        angles: Sequence[int],
        linear: Sequence[int],
        bins: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        compiled: bool = True,
        angles_fold: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if set(transformed) & (set(angles) | set(linear)):
            raise ValueError("a coupling layer cannot be conditioned on the columns it transforms")
        self.size, self.bins, self.compiled = size, bins, compiled
        fold_of_angles = [1] * len(angles) if angles_fold is None else angles_fold
        seen = [(a, f * k) for a, f in zip(angles, fold_of_angles, strict=True) for k in range(1, max(1, self.HARMONICS // f) + 1)]
        buffers = {
            "transformed": transformed, "linear": linear, "angles": [a for a, _ in seen], "multiples": [m for _, m in seen],
        }  # fmt: skip
        for name, values in buffers.items():
            self.register_buffer(name, torch.as_tensor(list(values), dtype=torch.int64), persistent=False)
        n_in = 2 * len(seen) + len(linear)
        self.conditioner = MLP(n_in, len(transformed) * self._parameters_per_column(), hidden=hidden, generator=generator)

    @abstractmethod
    def _parameters_per_column(self) -> int:
        """Number of conditioner outputs that one transformed column needs."""

    @abstractmethod
    def _transform(self, values: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Transformed columns ``[b, d]`` and ln of the derivatives ``[b, d]``."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(z, inverse=False)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(x, inverse=True)

    def _couple(self, values: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        turned = self.multiples * values[:, self.angles]
        features = torch.cat([turned.cos(), turned.sin(), values[:, self.linear]], dim=1)
        weight = next(self.conditioner.parameters())
        parameters = self.conditioner(features.to(weight.dtype)).to(values.dtype)
        parameters = parameters.reshape(len(values), len(self.transformed), self._parameters_per_column())
        new, log_slope = self._transform(values[:, self.transformed], parameters, inverse)
        return values.index_copy(1, self.transformed, new), log_slope.sum(dim=1, dtype=torch.float64)

    def _spline(self, x: Tensor, knots: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        spline = fast_spline() if self.compiled and x.dtype == torch.float32 else eager_spline
        return spline(x.clamp(-1.0, 1.0), knots[..., : self.bins], knots[..., self.bins :], slopes + UNIT_SLOPE, inverse)


class BoundedSplineCoupling(SplineCoupling):
    """Spline coupling of real coordinates: a spline inside [−bound, bound], the identity outside, with slope 1 at the border."""

    bound = 5.0

    def _parameters_per_column(self) -> int:
        return 3 * self.bins - 1

    def _transform(self, values: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        slopes = torch.nn.functional.pad(parameters[..., 2 * self.bins :], (1, 1))
        inside = values.abs() < self.bound
        new, log_slope = self._spline(values / self.bound, parameters[..., : 2 * self.bins], slopes, inverse)
        return torch.where(inside, self.bound * new, values), torch.where(inside, log_slope, torch.zeros_like(log_slope))


class CircularSplineCoupling(SplineCoupling):
    """Spline coupling of angles on [−π, π): a circular spline followed by a rotation.

    A column with fold m (the torsion of a rotor with m interchangeable hydrogens) gets a map that commutes with the
    rotation by 2π/m: with mφ = u + 2πk, u in [−π, π), it is φ ↦ (spline(u) + 2πk)/m. Its density therefore has
    exactly that symmetry, given conditioners that have it too (``angles_fold``), and no weight is lost to unequal copies.

    Args:
        fold: Fold m of every transformed column; 1 for ordinary torsions.
    """

    fold: Tensor

    def __init__(
        self,
        size: int,
        *,
        transformed: Sequence[int],
        fold: Sequence[int],
        angles: Sequence[int],
        linear: Sequence[int],
        bins: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        compiled: bool = True,
        angles_fold: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            size, transformed=transformed, angles=angles, linear=linear, bins=bins, hidden=hidden, generator=generator,
            compiled=compiled, angles_fold=angles_fold,
        )  # fmt: skip
        self.register_buffer("fold", torch.as_tensor(list(fold), dtype=torch.int64), persistent=False)

    def _parameters_per_column(self) -> int:
        return 3 * self.bins + 1

    def _transform(self, values: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, slopes = parameters[..., -1], parameters[..., 2 * self.bins : -1]
        slopes = torch.cat([slopes, slopes[..., :1]], dim=-1)
        if inverse:
            values = values - shift
        unfolded = self.fold * values
        reduced = wrap(unfolded)
        new, log_slope = self._spline(reduced / math.pi, parameters[..., : 2 * self.bins], slopes, inverse)
        angles = (math.pi * new + (unfolded - reduced)) / self.fold
        return wrap(angles if inverse else angles + shift), log_slope


class NflowsAdapter(Transform):
    """Any ``nflows.transforms.Transform`` as a boltzgen transform.

    nflows maps data to noise, so its ``forward`` is our ``inverse``.

    Args:
        transform: The nflows transform, acting on ``[b, d]``.
    """

    def __init__(self, transform: NflowsTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.transform.inverse(z, None if context is None else context.features)
        return x, log_det.to(torch.float64)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform.forward(x, None if context is None else context.features)
        return z, log_det.to(torch.float64)


def wrap(angle: Tensor) -> Tensor:
    """An angle in radians brought into [−π, π)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
