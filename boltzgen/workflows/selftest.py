"""A few exactness checks on the user's own machine, in less than a minute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from boltzgen.core import Chain, Flow
from boltzgen.distributions import TorusNormal
from boltzgen.estimators.reweighting import log_z
from boltzgen.md.loading import LoadedSystem, load
from boltzgen.md.platforms import PlatformChoice, available_platforms
from boltzgen.md.target import OpenMMTarget
from boltzgen.sampling.importance import importance_sample
from boltzgen.targets.analytic import Gaussian
from boltzgen.transforms.coupling import BoundedSplineCoupling, CompiledSpline, fast_spline
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import build_zmatrix

_EXAMPLE = "openmmtools/data/alanine-dipeptide-gbsa/alanine-dipeptide"
_SEED = 20
_TEMPERATURE = 300.0

#: Largest difference between platforms, in kT, that single precision explains.
_PLATFORM_TOLERANCE = 0.01
_GRADIENT_TOLERANCE = 1e-5
_LOG_DET_TOLERANCE = 1e-6
#: Largest difference between compiled and uncompiled splines that float32 explains.
_COMPILED_TOLERANCE = 1e-5
_N_SIGMA = 4.5


@dataclass(frozen=True)
class CheckResult:
    """One check: what it is, whether it held, and the numbers behind that."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'}  {self.name}: {self.detail}"


def run_selftest() -> Iterator[CheckResult]:
    """Run every check, one after the other, each reported as soon as it is done."""
    for name, check in _CHECKS.items():
        try:
            ok, detail = check()
        except Exception as error:  # reported, not hidden: a broken installation may raise anything here
            ok, detail = False, f"{type(error).__name__}: {error}"
        yield CheckResult(name, ok, detail)


def _example() -> LoadedSystem:
    """Alanine dipeptide in vacuum, from the files that openmmtools brings."""
    stem = str(metadata.distribution("openmmtools").locate_file(_EXAMPLE))
    return load(Path(stem + ".prmtop"), coordinates=Path(stem + ".pdb"))


def _target(loaded: LoadedSystem, platform: str) -> OpenMMTarget:
    return OpenMMTarget.from_loaded(loaded, temperature_kelvin=_TEMPERATURE, platform=PlatformChoice(name=platform, contexts=1))


def _moved(loaded: LoadedSystem, n: int) -> torch.Tensor:
    """``n`` slightly moved copies of the positions."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.from_numpy(loaded.positions)
    return x + 0.002 * torch.randn(n, *x.shape, generator=generator, dtype=torch.float64)


def _platforms_agree() -> tuple[bool, str]:
    loaded = _example()
    x = _moved(loaded, 8)
    exact = _target(loaded, "Reference").reduced_potential(x)
    others = [platform.name for platform in available_platforms() if platform.usable and platform.name != "Reference"]
    worst = {name: float((_target(loaded, name).reduced_potential(x) - exact).abs().max()) for name in others}
    ok = all(difference < _PLATFORM_TOLERANCE for difference in worst.values())
    return ok, ", ".join(f"{name} within {difference:.1e} kT of Reference" for name, difference in worst.items()) or "Reference only"


def _gradient_is_the_slope() -> tuple[bool, str]:
    loaded = _example()
    target = _target(loaded, "Reference")
    x = _moved(loaded, 4)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    step = 1e-6
    slope = (target.reduced_potential(x + step * direction) - target.reduced_potential(x - step * direction)) / (2 * step)
    _, gradient = target.value_and_grad(x)
    error = float(((gradient * direction).sum(dim=(1, 2)) / slope - 1).abs().max())
    return error < _GRADIENT_TOLERANCE, f"relative error {error:.1e}"


def _internal_coordinates_are_exact() -> tuple[bool, str]:
    """Round trip, and log_det against the determinant of ∂x/∂(q, translation, rotation) with ∫dR = 8π²."""
    loaded = _example()
    transform = InternalCoordinates(build_zmatrix(loaded.molecule))
    q, minus_log_det = transform.inverse(_moved(loaded, 1))
    x, log_det = transform(q)
    again, _ = transform.inverse(x)
    n = x.shape[1]
    internal = torch.autograd.functional.jacobian(lambda row: transform(row[None])[0].flatten(), q[0])
    axes = torch.eye(3, dtype=torch.float64)
    translations = axes.repeat(n, 1)
    rotations = torch.stack([torch.linalg.cross(axis.expand(n, 3), x[0]).flatten() for axis in axes], dim=1)
    jacobian = torch.cat([internal, translations, rotations], dim=1)
    expected = float(torch.linalg.slogdet(jacobian).logabsdet) + math.log(8 * math.pi**2)
    trip = float((again - q).abs().max())
    error = max(abs(float(log_det) - expected), abs(float(log_det + minus_log_det)))
    return trip < 1e-9 and error < _LOG_DET_TOLERANCE, f"round trip {trip:.1e}, log det {error:.1e} nats"


def _importance_sampling_finds_a_known_constant() -> tuple[bool, str]:
    """ln Z of a Gaussian of which it is known, through a spline flow with random weights."""
    generator = torch.Generator().manual_seed(_SEED)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.4]])
    target = Gaussian(torch.tensor([0.3, -0.2]), covariance=covariance)
    exact = math.log(2 * math.pi) + 0.5 * math.log(float(torch.linalg.det(covariance)))
    layers = (_random_layer(column, generator) for column in (0, 1))
    flow = Flow(TorusNormal(0, 2), Chain(*layers))
    samples = importance_sample(flow, target, n=20_000, batch_size=5_000, generator=generator, progress=False)
    estimate = log_z(samples, seed=_SEED)
    deviation = abs(float(estimate.value) - exact)
    return deviation < _N_SIGMA * float(estimate.stderr), f"ln Z = {estimate.value:.4f} ± {estimate.stderr:.4f}, exact {exact:.4f}"


def _splines_compile() -> tuple[bool, str]:
    """A compiled layer against the same one uncompiled, in float32: in float64 layers never use the compiled spline."""
    spline = fast_spline()
    if not isinstance(spline, CompiledSpline):
        return True, "no working C++ compiler: splines run uncompiled, 1.5 to 3 times slower (install g++ or clang++)"
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float32)
    calls = spline.calls
    layers = (_random_layer(0, torch.Generator().manual_seed(_SEED), compiled=compiled) for compiled in (True, False))
    (x, log_det), (x_eager, log_det_eager) = (layer(z) for layer in layers)
    if spline.calls == calls:
        return False, "the compiled spline was not used although it is there"
    error = max(float((x - x_eager).detach().abs().max()), float((log_det - log_det_eager).detach().abs().max()))
    return error < _COMPILED_TOLERANCE, f"compiled splines differ from uncompiled ones by {error:.1e}"


def _random_layer(column: int, generator: torch.Generator, *, compiled: bool = False) -> BoundedSplineCoupling:
    """A spline of one of two columns, given the other, far from the identity."""
    layer = BoundedSplineCoupling(2, transformed=[column], angles=[], linear=[1 - column], bins=8, hidden=[16], generator=generator,
                                  compiled=compiled)  # fmt: skip
    for weights in layer.parameters():
        weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
    return layer


_CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "OpenMM platforms agree": _platforms_agree,
    "forces are slopes of the energy": _gradient_is_the_slope,
    "internal coordinates and their volume factor": _internal_coordinates_are_exact,
    "importance sampling finds a known ln Z": _importance_sampling_finds_a_known_constant,
    "torch.compile": _splines_compile,
}
