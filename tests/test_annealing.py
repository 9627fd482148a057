"""Annealing in temperature: the next temperature, and a double well cooled to an answer known by quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import boltzgen.training.annealing as annealing
from boltzgen.core import Flow, Target
from boltzgen.distributions import TorusNormal
from boltzgen.errors import InexactDensityError, InputError, Interrupted, WeightsError
from boltzgen.targets.analytic import DoubleWell
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.targets.views import Regularised, Tempered
from boltzgen.training.annealing import AnnealingStep, anneal, next_temperature
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import ForwardKL
from boltzgen.transforms.coupling import BoundedSplineCoupling
from tests.assertions import assert_z
from tests.registry import Exponential, noise, seeded

HOT, COLD = 1200.0, 300.0


class Well(Target):
    """A double well whose energy is that of 4 barriers of kT at 300 K, at any temperature."""

    event_shape = (1,)

    def __init__(self, kelvin: float = COLD) -> None:
        self.kelvin = kelvin
        self.exact = DoubleWell(1, barrier=4.0 * COLD / kelvin, tilt=0.8 * COLD / kelvin)
        self.rows = 0

    def reduced_potential(self, x: Tensor) -> Tensor:
        return self.exact.reduced_potential(x)

    def reduced_potentials(self, x: Tensor, states: Sequence[float]) -> Tensor:
        self.rows += len(x)
        return torch.stack([self.reduced_potential(x) * self.kelvin / state for state in states])

    def at(self, temperature_kelvin: float) -> Well:
        return Well(temperature_kelvin)


def gaussian_samples(n: int = 4000) -> tuple[Tensor, Tensor]:
    """Exact samples of u = ½ x² at 1000 K in ten dimensions: u there, and ln q."""
    u = 0.5 * noise(n, 10).square().sum(1)
    return u, -u - 5 * math.log(2 * math.pi)


def coldest(minimum_ess: float, **changed: float) -> float:
    u, log_q = gaussian_samples()
    kelvins = {"reference_kelvin": 1000.0, "current_kelvin": 1000.0, "target_kelvin": 100.0} | changed
    return next_temperature(u, log_q, minimum_ess=minimum_ess, **kelvins)  # type: ignore[arg-type]


def test_the_next_temperature_keeps_the_effective_sample_size() -> None:
    """Ten-dimensional Gaussian, f = T/T': w = exp(−(f − 1) u), so (E w)² / E w² = [(2f − 1)/f²]^{10/2}."""
    for minimum in (0.8, 0.5):
        factor = 1000.0 / coldest(minimum)
        assert ((2 * factor - 1) / factor**2) ** 5 == pytest.approx(minimum, abs=0.03)


def test_a_smaller_minimum_goes_colder_and_the_target_is_not_overshot() -> None:
    temperatures = [coldest(minimum) for minimum in (0.9, 0.7, 0.5, 0.3, 0.1)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert len(set(temperatures)) == 5
    assert coldest(0.5, target_kelvin=950.0) == 950.0
    assert coldest(0.5, target_kelvin=1000.0) == 1000.0


def test_the_reference_temperature_does_not_matter() -> None:
    u, log_q = gaussian_samples()
    elsewhere = next_temperature(
        2 * u, log_q, reference_kelvin=500.0, current_kelvin=1000.0, target_kelvin=100.0, minimum_ess=0.5
    )  # fmt: skip
    assert elsewhere == pytest.approx(coldest(0.5), rel=1e-12)


def test_infinite_energies_have_weight_zero() -> None:
    u, log_q = gaussian_samples()
    u[:1000] = math.inf
    found = next_temperature(u, log_q, reference_kelvin=1000.0, current_kelvin=1000.0, target_kelvin=100.0, minimum_ess=0.5)
    assert 1000.0 > found > coldest(0.5)


def test_a_poor_flow_is_refused_with_advice() -> None:
    u, _ = gaussian_samples()
    with pytest.raises(WeightsError, match="train it longer on the hot data"):
        next_temperature(u, noise(len(u), scale=3.0), reference_kelvin=1000.0, current_kelvin=1000.0, target_kelvin=300.0, minimum_ess=0.5)


@pytest.mark.parametrize(("minimum", "changed"), [(0.0, {}), (1.0, {}), (0.5, {"target_kelvin": 1100.0}), (0.5, {"reference_kelvin": 0.0})])
def test_meaningless_numbers_are_refused(minimum: float, changed: dict[str, float]) -> None:
    with pytest.raises(InputError):
        coldest(minimum, **changed)


def settings(steps: int) -> FitSettings:
    return FitSettings(
        steps=steps, learning_rate=0.05, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=20, evaluate_every=100, warmup=10
    )


@pytest.fixture(scope="module")
def hot_weights() -> dict[str, Tensor]:
    """A flow trained on exact samples at the hot temperature."""
    flow = spline_flow()
    data = Well(HOT).exact.sample(20_000, generator=seeded())
    fit(flow, ForwardKL(data, batch_size=256), settings=settings(150), generator=seeded(), progress=False)
    return flow.state_dict()


def spline_flow() -> Flow:
    layer = BoundedSplineCoupling(1, transformed=(0,), angles=(), linear=(), bins=20, hidden=(), generator=seeded(), compiled=False)
    return Flow(TorusNormal(0, 1), layer).double()


def cool(
    weights: dict[str, Tensor], target: Target, *, steps: int = 80, folder: Path | None = None, stop_after: int | None = None
) -> tuple[Flow, tuple[AnnealingStep, ...]]:
    flow = spline_flow()
    flow.load_state_dict(weights)
    asked = iter(range(10**6))
    rounds = anneal(
        flow, target, start_kelvin=HOT, target_kelvin=COLD, minimum_ess=0.6, n_samples=4000, settings=settings(steps), batch_size=256,
        generator=seeded(11), store_for=None if folder is None else lambda k: CheckpointStore(folder / str(k), fingerprint="well"),
        should_stop=lambda: stop_after is not None and next(asked) >= stop_after, progress=False,
    )  # fmt: skip
    return flow, rounds


def check_free_energy(flow: Flow) -> None:
    """ΔF between the wells from the flow's own samples, not reweighted, is that of the cold target within 0.1 kT and its error."""
    n = 20_000
    with torch.no_grad():
        x, _ = flow.sample(n, generator=seeded(5))
    right = float((x[:, 0] > 0).double().mean())
    assert 0 < right < 1
    exact = Well(COLD).exact.free_energy_difference
    assert_z(math.log((1 - right) / right), exact, math.hypot(0.02, 1 / math.sqrt(n * right * (1 - right))))


def check_likelihood(flow: Flow) -> None:
    """KL(p‖q) on exact cold samples is small."""
    well = Well(COLD).exact
    x = well.sample(10_000, generator=seeded(6))
    with torch.no_grad():
        kl = float((-well.reduced_potential(x) - well.log_z - flow.log_prob(x)).mean())
    assert kl < 0.03, kl


def test_a_double_well_is_cooled_to_the_target(hot_weights: dict[str, Tensor]) -> None:
    target = Well()
    flow, steps = cool(hot_weights, target)
    temperatures = [HOT, *(step.temperature_kelvin for step in steps)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == COLD
    assert len(steps) > 1
    assert all(step.ess >= 0.6 and step.steps == 80 and step.n_energies == 4000 for step in steps)
    assert target.rows == 4000 * len(steps), "every energy is evaluated once"
    check_free_energy(flow)
    check_likelihood(flow)


def test_the_hot_flow_and_flipped_weights_are_caught(hot_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    hot = spline_flow()
    hot.load_state_dict(hot_weights)
    with pytest.raises(AssertionError):
        check_likelihood(hot)

    def flipped(u_reference: Tensor, log_q: Tensor, *, factor: float) -> Tensor:
        return factor * u_reference + log_q

    monkeypatch.setattr(annealing, "log_weights", flipped)
    with pytest.raises((AssertionError, WeightsError)):
        check_likelihood(cool(hot_weights, Well())[0])


def test_weights_that_forget_the_density_are_caught(hot_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing, "log_weights", lambda u_reference, log_q, *, factor: -factor * u_reference)
    with pytest.raises((AssertionError, WeightsError)):
        check_likelihood(cool(hot_weights, Well())[0])


def test_resuming_gives_the_same_flow(hot_weights: dict[str, Tensor], tmp_path: Path) -> None:
    whole, steps = cool(hot_weights, Well(), steps=30)
    with pytest.raises(Interrupted):
        cool(hot_weights, Well(), steps=30, folder=tmp_path, stop_after=44)
    resumed, resumed_steps = cool(hot_weights, Well(), steps=30, folder=tmp_path)
    assert resumed_steps == steps
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_jacobian_of_a_pulled_back_target_does_not_scale_with_temperature() -> None:
    target = PulledBack(Well(), Exponential(1).requires_grad_(False), event_shape=(1,))
    y = noise(5, 1, scale=0.3)
    together = target.reduced_potentials(y, (HOT, COLD))
    apart = torch.stack([target.at(kelvin).reduced_potential(y) for kelvin in (HOT, COLD)])
    torch.testing.assert_close(together, apart)
    flow = Flow(TorusNormal(0, 1), Exponential(1))
    x, scaling, rest = annealing._weighable_samples(flow, target, HOT, n=50, batch_size=20, generator=seeded(), label="", progress=False)
    for kelvin in (HOT, 700.0, COLD):
        expected = -target.at(kelvin).reduced_potential(x) - flow.log_prob(x)
        torch.testing.assert_close(annealing.log_weights(scaling, rest, factor=HOT / kelvin), expected, atol=1e-9, rtol=1e-9)


def test_wrong_requests_are_refused() -> None:
    flow = spline_flow()

    def request(target: Target, *, start: float = HOT, n: int = 100) -> tuple[AnnealingStep, ...]:
        return anneal(flow, target, start_kelvin=start, target_kelvin=COLD, minimum_ess=0.5, n_samples=n, settings=settings(1),
                      batch_size=10, generator=seeded(), progress=False)  # fmt: skip

    with pytest.raises(InexactDensityError, match="exact target"):
        request(Regularised(Tempered(Well(), factor=1.0), u_cut=10.0, u_max=20.0))
    with pytest.raises(InputError, match="from hot to cold"):
        request(Well(), start=200.0)
    with pytest.raises(InputError, match="positive"):
        request(Well(), n=0)
    assert request(Well(), start=COLD) == ()
