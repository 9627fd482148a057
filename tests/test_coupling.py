"""Layers of the flow: compiled and eager splines, circular symmetry, borders, adapters, domains and the Gaussian block."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, RandomPermutation
from torch import Tensor

from boltzgen.core import Chain, Flow, Inverse
from boltzgen.distributions import TorusNormal
from boltzgen.errors import DomainError, TopologyError
from boltzgen.transforms import coupling
from boltzgen.transforms.coupling import (
    BoundedSplineCoupling,
    CircularSplineCoupling,
    CompiledSpline,
    NflowsAdapter,
    Spline,
    eager_spline,
    fast_spline,
    wrap,
)
from boltzgen.transforms.domains import Domains, InternalDomains
from boltzgen.transforms.triangular import ConditionalTriangular
from tests.registry import internal, noise, seeded
from tests.test_contract_transforms import check_round_trip, stir

THIRD = 2 * math.pi / 3


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    """The compiled spline of other tests is neither used nor replaced."""
    kept = fast_spline
    coupling.fast_spline.cache_clear()
    yield
    kept.cache_clear()


def knots(scale: float = 1.0) -> list[Tensor]:
    """Values, widths, heights and slopes for 12 rows, 3 columns and 5 bins, float32."""
    values = (2 * torch.rand(12, 3, generator=seeded()) - 1).float()
    return [values, *(scale * noise(12, 3, k).float() for k in (5, 5, 6))]


@pytest.mark.slow
def test_compiled_splines_equal_eager_ones(fresh_cache: None) -> None:
    compiled = fast_spline()
    assert compiled is not eager_spline, "this machine has a compiler that torch.compile cannot use"
    for inverse in (False, True):
        results = []
        for spline in (compiled, eager_spline):
            leaves = [tensor.clone().requires_grad_(True) for tensor in knots()]
            y, log_slope = spline(*leaves, inverse)  # type: ignore[call-arg]
            gradients = torch.autograd.grad((y * noise(12, 3).float()).sum() + log_slope.sum(), leaves)
            results.append([y, log_slope, *gradients])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


def check_fallback(caplog: pytest.LogCaptureFixture, *words: str) -> None:
    """Splines are eager, a layer works with them, and the log says why."""
    with caplog.at_level(logging.WARNING):
        assert fast_spline() is eager_spline
    assert all(word in caplog.text for word in (*words, "uncompiled"))
    layer = BoundedSplineCoupling(2, transformed=(0,), angles=(), linear=(1,), bins=4, hidden=(4,), generator=seeded(), compiled=True)
    x, log_det = layer(torch.zeros(3, 2))
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_det).all()


def test_splines_run_eagerly_without_a_compiler(
    fresh_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coupling.shutil, "which", lambda name: None)
    check_fallback(caplog, "no C++ compiler")


def test_splines_run_eagerly_with_a_broken_compiler(
    fresh_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_compile(function: Callable, **options: object) -> Callable:
        def fails(*arguments: object) -> None:
            raise RuntimeError("cc1plus: no such file")

        return fails

    monkeypatch.setattr(coupling.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(coupling.torch, "compile", broken_compile)
    check_fallback(caplog, "torch.compile failed", "RuntimeError")


@pytest.fixture
def compiled_without_compiler(fresh_cache: None, monkeypatch: pytest.MonkeyPatch) -> CompiledSpline:
    """The compiled spline with a graph that is the function itself; like in a real graph, a failed assertion is a RuntimeError."""

    def compiled(function: Callable, **options: object) -> Callable:
        def graph(*arguments: object) -> object:
            try:
                return function(*arguments)
            except AssertionError as error:
                raise RuntimeError("assertion error") from error

        return graph

    monkeypatch.setattr(coupling.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(coupling.torch, "compile", compiled)
    spline = fast_spline()
    assert isinstance(spline, CompiledSpline)
    return spline


def check_steep_round_trip(spline: Spline) -> None:
    """Splines of large logits in float32 come back to where they began, as closely as their slope allows."""
    generator = seeded()
    x = 2 * torch.rand(512, 27, generator=generator) - 1
    parameters = [10 * torch.randn(512, 27, k, generator=generator) for k in (16, 16, 17)]
    y, log_slope = spline(x, *parameters, False)  # type: ignore[call-arg]
    y = y.clamp(-1, 1)
    back, log_slope_back = spline(y, *parameters, True)  # type: ignore[call-arg]
    assert back.dtype == log_slope_back.dtype == torch.float32
    assert ((back - x).abs() / (1 + torch.exp(-log_slope))).max() < 2e-4
    exact, exact_log_slope = eager_spline(y.double(), *(p.double() for p in parameters), True)  # type: ignore[call-arg]
    torch.testing.assert_close(back.double(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_slope_back.double(), exact_log_slope, atol=1e-5, rtol=0)


def turned_round(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Mutant: the repetition forgets its direction."""
    try:
        return coupling._spline(x, widths, heights, slopes, inverse)
    except AssertionError:
        return eager_spline(x, widths, heights, slopes, False)


def test_steep_splines_are_inverted_in_single_precision(compiled_without_compiler: CompiledSpline) -> None:
    check_steep_round_trip(eager_spline)
    calls = compiled_without_compiler.calls
    check_steep_round_trip(compiled_without_compiler)
    assert compiled_without_compiler.calls == calls + 1, "forward is answered by the graph, inverse by the repetition in float64"
    with pytest.raises(AssertionError, match=r"^$"):  # nflows' own assertion: this is the case that fails in float32
        check_steep_round_trip(coupling._spline)
    with pytest.raises(AssertionError, match=r".+"):
        check_steep_round_trip(turned_round)


@pytest.mark.slow
def test_really_compiled_splines_are_inverted_where_they_are_steep(fresh_cache: None) -> None:
    spline = fast_spline()
    assert isinstance(spline, CompiledSpline)
    calls = spline.calls
    check_steep_round_trip(spline)
    assert spline.calls == calls + 1
    x, *parameters = knots()
    x[3, 1] = math.nan
    for inverse in (False, True):
        with pytest.raises(DomainError, match=r"^1 of 12 rows"):
            spline(x, *parameters, inverse)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_their_number(value: float, compiled_without_compiler: CompiledSpline) -> None:
    for spline in (eager_spline, compiled_without_compiler):
        for inverse in (False, True):
            x, *parameters = knots()
            x[3, 1] = x[7, 0] = x[7, 2] = value
            with pytest.raises(DomainError, match=r"^2 of 12 rows of a spline have values or knots that are not finite"):
                spline(x, *parameters, inverse)
        for broken in range(2):
            x, *parameters = knots()
            parameters[broken][5, 0, 1] = math.nan
            with pytest.raises(DomainError, match=r"^1 of 12 rows"):
                spline(x, *parameters, True)


def test_values_whose_sum_overflows_are_finite() -> None:
    coupling._require_finite(torch.full((4, 2), 3e38))
    with pytest.raises(DomainError, match=r"^4 of 4 rows"):
        coupling._require_finite(torch.full((4, 2), math.nan))


def rotor(fold: int = 3, *, bins: int = 6) -> CircularSplineCoupling:
    """One angle of a given fold, conditioned on another angle and a line coordinate, away from the identity."""
    layer = CircularSplineCoupling(
        3, transformed=(0,), fold=(fold,), angles=(1,), linear=(2,), bins=bins, hidden=(8,), generator=seeded(), compiled=False
    )
    return stir(layer)  # type: ignore[return-value]


def rows_at(angle: Tensor) -> Tensor:
    """Rows whose first column is ``angle`` and whose others are the same everywhere."""
    return torch.stack([angle, torch.full_like(angle, 0.7), torch.full_like(angle, -0.4)], dim=1)


def check_symmetry(layer: CircularSplineCoupling, turn: float) -> None:
    """The map commutes with a rotation, so its density on a uniform base has that symmetry."""
    z = rows_at(torch.linspace(-math.pi, math.pi, 200, dtype=torch.float64)[:-1])
    turned = z.clone()
    turned[:, 0] = wrap(z[:, 0] + turn)
    for direction in (layer.forward, layer.inverse):
        (x, log_det), (x_turned, log_det_turned) = direction(z), direction(turned)
        assert wrap(x_turned[:, 0] - x[:, 0] - turn).abs().max() < 1e-9
        torch.testing.assert_close(log_det_turned, log_det, atol=1e-9, rtol=0)
    assert float(log_det.detach().std()) > 0.05, "a uniform density has every symmetry"


def test_a_rotor_of_three_is_exactly_threefold() -> None:
    check_symmetry(rotor(3), THIRD)
    check_symmetry(rotor(2), math.pi)
    check_symmetry(rotor(1), 2 * math.pi)
    with pytest.raises(AssertionError):
        check_symmetry(rotor(1), THIRD)
    with pytest.raises(AssertionError):
        check_symmetry(rotor(2), THIRD)


def test_the_density_of_a_chain_of_rotor_layers_is_threefold() -> None:
    flow = Flow(TorusNormal(2, 1), Chain(rotor(3), rotor(3, bins=4)))
    x = rows_at(torch.linspace(-3.0, 3.0, 50, dtype=torch.float64))
    turned = x.clone()
    turned[:, 0] = wrap(x[:, 0] + THIRD)
    torch.testing.assert_close(flow.log_prob(turned), flow.log_prob(x), atol=1e-9, rtol=0)


def check_continuity(layer: CircularSplineCoupling, *, at: float) -> None:
    """Value and slope agree on both sides of an angle, in both directions."""
    sides = rows_at(torch.tensor([at - 1e-9, at + 1e-9], dtype=torch.float64))
    sides[:, 0] = wrap(sides[:, 0])
    for direction in (layer.forward, layer.inverse):
        x, log_det = direction(sides)
        assert float(wrap(x[0, 0] - x[1, 0]).detach().abs()) < 1e-7
        assert float((log_det[0] - log_det[1]).detach().abs()) < 1e-6


class WithFreeEnds(CircularSplineCoupling):
    """Mutant: the slopes at −π and π need not agree."""

    def _transform(self, values: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        new, log_slope = super()._transform(values, parameters, inverse)
        return new, log_slope + 0.1 * values.sign()


@pytest.mark.parametrize("fold", [1, 3])
def test_circular_splines_are_smooth_across_every_border(fold: int) -> None:
    layer = rotor(fold)
    for k in range(2 * fold):
        check_continuity(layer, at=-math.pi + k * math.pi / fold)
    shifted = layer(rows_at(torch.tensor([-math.pi], dtype=torch.float64)))[0][0, 0]
    check_continuity(layer, at=float(shifted.detach()))


def test_a_kink_at_the_border_is_caught() -> None:
    layer = WithFreeEnds(
        3, transformed=(0,), fold=(1,), angles=(1,), linear=(2,), bins=6, hidden=(8,), generator=seeded(), compiled=False
    )  # fmt: skip
    with pytest.raises(AssertionError):
        check_continuity(stir(layer), at=math.pi)  # type: ignore[arg-type]


def bounded(*, dtype: torch.dtype = torch.float64) -> BoundedSplineCoupling:
    layer = BoundedSplineCoupling(3, transformed=(0,), angles=(1,), linear=(2,), bins=6, hidden=(8,), generator=seeded(), compiled=False)
    return stir(layer).to(dtype)  # type: ignore[return-value]


def test_layers_are_the_identity_at_initialisation() -> None:
    z = noise(50, 3, scale=1.5).clamp(-3, 3)
    circular = CircularSplineCoupling(
        3, transformed=(0, 2), fold=(1, 3), angles=(1,), linear=(), bins=8, hidden=(8,), generator=seeded(), compiled=False
    )
    line = BoundedSplineCoupling(3, transformed=(0, 2), angles=(1,), linear=(), bins=8, hidden=(8,), generator=seeded(), compiled=False)
    for layer in (circular, line):
        for direction in (layer.forward, layer.inverse):
            x, log_det = direction(z)
            torch.testing.assert_close(x, z, atol=1e-6, rtol=0)
            torch.testing.assert_close(log_det, torch.zeros(50, dtype=torch.float64), atol=1e-5, rtol=0)


def test_bounded_splines_are_the_identity_outside_with_a_smooth_border() -> None:
    layer = bounded()
    far = rows_at(torch.tensor([-1e6, -30.0, -5.0, 5.0, 7.5, 1e6], dtype=torch.float64))
    inside = rows_at(torch.linspace(-4.9, 4.9, 50, dtype=torch.float64))
    for direction in (layer.forward, layer.inverse):
        x, log_det = direction(far)
        assert torch.equal(x, far)
        assert torch.equal(log_det, torch.zeros(6, dtype=torch.float64))
        assert float(direction(inside)[1].detach().abs().max()) > 0.05
        for border in (-5.0, 5.0):
            near = rows_at(torch.tensor([border * (1 - 1e-9)], dtype=torch.float64))
            x, log_det = direction(near)
            torch.testing.assert_close(x, near, atol=1e-7, rtol=0)
            assert float(log_det.detach().abs()) < 1e-6


def test_single_and_double_precision_agree() -> None:
    z = torch.cat([wrap(noise(200, 2, scale=2.0)), noise(200, 1)], dim=1)
    for layer in (rotor(3), bounded()):
        for direction in ("forward", "inverse"):
            double = getattr(layer.double(), direction)(z)
            single = getattr(layer.float(), direction)(z.float())
            assert single[0].dtype == torch.float32
            assert single[1].dtype == double[1].dtype == torch.float64
            assert wrap(single[0].double() - double[0]).abs().max() < 1e-4
            torch.testing.assert_close(single[1], double[1], atol=2e-3, rtol=0)


def test_columns_that_condition_cannot_be_transformed() -> None:
    with pytest.raises(ValueError, match="cannot be conditioned on the columns it transforms"):
        BoundedSplineCoupling(2, transformed=(0,), angles=(), linear=(0, 1), bins=4, hidden=(), generator=seeded())


def nflows_transform() -> CompositeTransform:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [MaskedAffineAutoregressiveTransform(3, hidden_features=8), RandomPermutation(3), MaskedAffineAutoregressiveTransform(3, 8)]
        return CompositeTransform(parts).double()


def check_density(flow: Flow, x: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(flow.log_prob(x), exact, atol=1e-6, rtol=0)
    drawn, log_prob = flow.sample(100, generator=seeded())
    torch.testing.assert_close(log_prob, flow.log_prob(drawn), atol=1e-6, rtol=0)


def test_a_real_nflows_transform_works_through_the_adapter() -> None:
    """The density is that of nflows' own flow: ln N(z) + log_det of its data-to-noise direction."""
    theirs = nflows_transform()
    x = noise(20, 3)
    noise_of_x, log_det = theirs(x)
    exact = -0.5 * noise_of_x.square().sum(1) - 1.5 * math.log(2 * math.pi) + log_det
    assert float(log_det.detach().abs().max()) > 0.01
    check_density(Flow(TorusNormal(0, 3), NflowsAdapter(theirs)), x, exact)
    check_round_trip(NflowsAdapter(theirs), noise(20, 3))
    with pytest.raises(AssertionError):  # mutant: the direction turned round
        check_density(Flow(TorusNormal(0, 3), Inverse(NflowsAdapter(theirs))), x, exact)


@pytest.mark.parametrize("sigma", [30.0, 100.0])
def test_no_latent_leaves_the_domains(sigma: float) -> None:
    """Bonds stay positive, angles inside (0, π), signed torsions on their side, and densities finite, for very wild latents."""
    coordinates, q = internal()
    domains = Domains.from_data(coordinates, coordinates.zmatrix, q.numpy(), names=tuple(f"atom {i}" for i in range(6)))
    layer = InternalDomains(domains)
    z = torch.cat([noise(200, q.shape[1], scale=sigma / 3).clamp(-sigma, sigma), sigma * noise(200, q.shape[1]).sign()])
    z[:, : domains.n_soft] = wrap(z[:, : domains.n_soft])
    wild, log_det = layer(z)
    assert torch.isfinite(log_det).all()
    assert (wild[:, coordinates.bond_columns] > 0).all()
    angles = wild[:, coordinates.angle_columns]
    assert ((angles > 0) & (angles < math.pi)).all()
    chiral = [
        column
        for column, row in zip(coordinates.torsion_columns.tolist(), coordinates.torsion_rows.tolist(), strict=True)
        if coordinates.zmatrix.chiral[row]
    ]
    assert chiral, "methanol's methyl hydrogens carry a sign"
    assert (wild[:, chiral].sign() == q[0, chiral].sign()).all()
    coordinates(wild)


def test_both_mirror_images_in_the_data_are_refused() -> None:
    coordinates, q = internal()
    torsions = coordinates.torsion_columns
    mirrored = torch.cat([q, q])
    mirrored[5:, torsions] *= -1
    with pytest.raises(TopologyError, match=r"got both around atom \d in the data .* of the other kind\); relabel those frames or remove"):
        Domains.from_data(coordinates, coordinates.zmatrix, mirrored.numpy(), names=tuple(f"atom {i}" for i in range(6)))


def test_the_domains_of_one_mirror_image_are_those_of_the_other_mirrored() -> None:
    coordinates, q = internal()
    names = tuple(f"atom {i}" for i in range(6))
    ours = Domains.from_data(coordinates, coordinates.zmatrix, q.numpy(), names=names)
    mirrored = q.clone()
    mirrored[:, coordinates.torsion_columns] *= -1
    theirs = Domains.from_data(coordinates, coordinates.zmatrix, mirrored.numpy(), names=names)
    n_signed = len(ours.low) - len(coordinates.angle_columns)
    np.testing.assert_allclose(theirs.low[-n_signed:], -ours.high[-n_signed:], atol=1e-9)
    np.testing.assert_array_equal(theirs.intervals, ours.intervals)


def check_gaussian(layer: ConditionalTriangular, mean: Tensor, covariance: Tensor) -> None:
    """At initialisation the density of the stiff columns is the multivariate normal, and that of the angles uniform."""
    flow = Flow(TorusNormal(2, 3), layer)
    x = torch.cat([wrap(noise(40, 2)), noise(40, 3, scale=2.0)], dim=1)
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x[:, 2:]) - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.log_prob(x), exact, atol=1e-9, rtol=0)


def test_the_triangular_map_starts_as_the_gaussian_of_the_data() -> None:
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    scale = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.9, 2.0]], dtype=torch.float64)
    layer = ConditionalTriangular(2, mean=mean, scale=scale, hidden=(8,), generator=seeded())
    check_gaussian(layer, mean, scale @ scale.T)
    with pytest.raises(AssertionError):
        check_gaussian(layer, mean, scale.T @ scale)
    with pytest.raises(AssertionError):
        check_gaussian(layer, mean, scale.diagonal().square().diag())
