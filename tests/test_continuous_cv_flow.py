"""Continuous flows over collective variables: normalised, exact, learned, stored, and proposals of exact moves."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.config import PathsConfig
from boltzgen.core import Flow
from boltzgen.distributions import NormalMixture
from boltzgen.errors import InexactDensityError, InputError
from boltzgen.mixtures import Mixture
from boltzgen.networks.field import VelocityField
from boltzgen.networks.torus_field import TorusField
from boltzgen.paths import Periods, Schedule
from boltzgen.recipes import continuous_cv_flow as module
from boltzgen.recipes.continuous_cv_flow import ContinuousCVFlowSize, ContinuousCVRecipe
from boltzgen.recipes.cv_flow import CVFlowRecipe
from boltzgen.sampling.steered import SteeredMove
from boltzgen.training.checkpoints import save_weights
from boltzgen.training.couplings import NearestImages
from boltzgen.transforms.continuous import FixedStep
from boltzgen.workflows.path_proposals import PROPOSAL, broad_proposal, flow_recipe, stored_proposal
from tests.assertions import assert_z
from tests.steering_problems import stationary_scores, two_hills
from tests.test_path_report import PEPTIDE

SMALL = ContinuousCVFlowSize(hidden=(32, 32), steps=800, batch_size=256, learning_rate=0.01)
TURN = 2 * math.pi


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(means: list[list[float]], widths: list[list[float]], periods: Periods) -> NormalMixture:
    return NormalMixture(torch.tensor(means), torch.tensor(widths), weights=torch.tensor([1.0, 2.0]), periods=periods)


#: Two peaks each; that of 360 degrees lies across the seam.
CASES = {
    "line": mixture([[1.0], [2.2]], [[0.15], [0.2]], (None,)),
    "circle in degrees": mixture([[-70.0], [175.0]], [[18.0], [25.0]], (360.0,)),
    "torus": mixture([[-1.4, 1.2], [1.0, -3.0]], [[0.4, 0.4], [0.4, 0.5]], (TURN, TURN)),
}
LIMITS = {"line": ((-2.0, 5.5),), "circle in degrees": ((-180.0, 180.0),), "torus": ((-math.pi, math.pi),) * 2}


@functools.cache
def learned(name: str) -> tuple[Flow, dict[str, float]]:
    values, _ = CASES[name].sample(2000, generator=seeded(1))
    flow, numbers = ContinuousCVRecipe(CASES[name].periods, SMALL).learned(values, generator=seeded(2))
    return flow, dict(numbers)


def grid(name: str) -> tuple[Tensor, float]:
    """Midpoints of cells within the limits, and the volume of a cell."""
    n = 1000 if len(LIMITS[name]) == 1 else 60
    axes = [low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n for low, high in LIMITS[name]]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)), math.prod((high - low) / n for low, high in LIMITS[name])


@pytest.mark.parametrize(("n_angles", "n_linear"), [(2, 0), (0, 1), (2, 3)])
def test_derivatives_of_the_field_are_those_of_autodiff(n_angles: int, n_linear: int) -> None:
    field = stirred(n_angles, n_linear)
    t, x = (
        torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64),
        2 * torch.randn(3, n_angles + n_linear, generator=seeded(), dtype=torch.float64),
    )
    for own, general in ((field.divergence, VelocityField.divergence), (field.jacobian, VelocityField.jacobian)):
        for found, expected in zip(own(t, x), general(field, t, x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_the_field_is_periodic_in_angles_and_the_same_everywhere_far_out() -> None:
    field, t = stirred(2, 1), torch.tensor(0.3, dtype=torch.float64)
    x = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(field(t, x + torch.tensor([TURN, -2 * TURN, 0.0], dtype=torch.float64)), field(t, x))
    far = x.clone()
    far[:, 2] = 1e4
    torch.testing.assert_close(field.divergence(t, far), field.divergence(t, far + torch.tensor([0.0, 0.0, 1e4])), atol=1e-5, rtol=0)


def stirred(n_angles: int, n_linear: int) -> TorusField:
    field, generator = TorusField(n_angles, n_linear, hidden=(8, 8), generator=seeded()).double(), seeded(4)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return field


def test_nearest_images_are_the_same_angles_by_the_shortest_arc() -> None:
    x0, x1 = (math.pi * (2 * torch.rand(100, 3, generator=seeded(seed), dtype=torch.float64) - 1) for seed in (1, 2))
    start, end = NearestImages(2)(x0, x1)
    assert torch.equal(start, x0)
    assert torch.equal(end[:, 2], x1[:, 2])
    assert float((end - x0)[:, :2].abs().max()) <= math.pi
    torch.testing.assert_close(torch.exp(1j * end[:, :2]), torch.exp(1j * x1[:, :2]))
    assert float((x1 - x0)[:, :2].abs().max()) > math.pi, "nothing had to be moved"


@pytest.mark.parametrize("name", CASES)
def test_densities_are_normalised_and_samples_follow_them(name: str) -> None:
    flow, _ = learned(name)
    points, cell = grid(name)
    density = flow.log_prob(points).exp() * cell
    assert float(density.sum()) == pytest.approx(1.0, abs=2e-3)
    x, log_prob = flow.sample(4000, generator=seeded(5))
    torch.testing.assert_close(log_prob, flow.log_prob(x), atol=2e-3, rtol=0)
    for column, period in enumerate(CASES[name].periods):
        if period is not None:
            assert bool(((x[:, column] >= -period / 2) & (x[:, column] < period / 2)).all())
        for moment in (torch.sin, torch.cos):
            of = functools.partial(_moment, moment, column, period or 4.0)
            assert_z(float(of(x).mean()), float((density * of(points)).sum()), float(of(x).std()) / math.sqrt(len(x)))


def _moment(function, column: int, period: float, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return function(TURN / period * x[:, column])


@pytest.mark.parametrize("name", CASES)
def test_two_peaks_are_learned(name: str) -> None:
    """Closer to the exact density than the normal with the same moments, or the wrapped one, by far."""
    flow, numbers = learned(name)
    exact = CASES[name]
    x, log_p = exact.sample(2000, generator=seeded(6))
    one = torch.stack([_one_peak(x[:, i], period) for i, period in enumerate(exact.periods)])
    single = NormalMixture(one[None, :, 0], one[None, :, 1], periods=exact.periods)
    off, single_off = (float((log_p - density.log_prob(x)).mean()) for density in (flow, single))
    assert -0.01 < off < 0.15
    assert single_off > 5 * off
    assert numbers["held_out_loss"] == pytest.approx(-float(log_p.mean()), abs=0.25)


def _one_peak(values: Tensor, period: float | None) -> Tensor:
    """Centre and width of the one normal, wrapped where there is a period, with the moments of the values."""
    if period is None:
        return torch.stack([values.mean(), values.std()])
    mean = torch.exp(1j * TURN / period * values).mean()
    return period / TURN * torch.stack([mean.angle(), (-2 * mean.abs().log()).sqrt()])


def test_a_rebuilt_flow_is_the_flow_that_was_learned() -> None:
    """With the steps of its solver, which are stored with the weights."""
    flow, numbers = learned("circle in degrees")
    again = ContinuousCVRecipe((360.0,), SMALL).rebuilt(flow.state_dict())
    points, _ = grid("circle in degrees")
    torch.testing.assert_close(again.log_prob(points), flow.log_prob(points), atol=1e-12, rtol=0)
    assert again.log_det_error == flow.log_det_error == numbers["log_det_error"] <= 1e-3
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_flow_with_other_steps_than_it_was_measured_with_is_refused() -> None:
    flow = ContinuousCVRecipe((360.0,), SMALL).rebuilt(learned("circle in degrees")[0].state_dict())
    flow.transform.transforms[0].solver = FixedStep(3)  # type: ignore[union-attr]
    with pytest.raises(InexactDensityError):
        SteeredMove(two_hills().engine(step_size=0.3, friction=0.0), flow, schedule=Schedule(8))


def test_a_density_that_stays_inexact_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_STEPS", 1)
    monkeypatch.setattr(module, "_MOST_STEPS", 1)
    values, _ = CASES["line"].sample(300, generator=seeded(1))
    size = ContinuousCVFlowSize(hidden=(16,), steps=100, batch_size=64, learning_rate=0.02)
    with pytest.raises(InexactDensityError, match="coupling flow"):
        ContinuousCVRecipe((None,), size).learned(values, generator=seeded(2))
    with pytest.raises(InputError, match="constant"):
        ContinuousCVRecipe((None,), size).learned(torch.ones(20, 1), generator=seeded(2))


class BaseDensity(Flow):
    """A wrong twin: the density without the log determinant."""

    def log_prob(self, x: Tensor, context: object = None) -> Tensor:
        return self.base.log_prob(self.transform.inverse(x)[0])

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[Tensor, Tensor]:
        x, _ = super().sample(n, generator=generator)
        return x, self.log_prob(x)


def test_moves_to_proposed_values_leave_the_target_as_it_is() -> None:
    problem = two_hills()
    values = problem.variables(problem.draw(1000, seeded(1)))
    flow, _ = ContinuousCVRecipe((None,), SMALL).learned(values, generator=seeded(2))
    engine = problem.engine(step_size=0.3, friction=0.0)
    move = SteeredMove(engine, flow, schedule=Schedule(8, bend=0.5))
    scores, identity, acceptance = stationary_scores(move, problem, n_walkers=1000, n_moves=4, seed=1)
    assert np.abs(scores).max() < 4.5
    assert abs(identity) < 4.5
    assert acceptance > 0.1
    wrong = SteeredMove(engine, BaseDensity(flow.base, flow.transform), schedule=Schedule(8, bend=0.5))
    scores, _, _ = stationary_scores(wrong, problem, n_walkers=1000, n_moves=10, seed=1)
    assert np.abs(scores).max() > 4.5


def test_a_configuration_picks_the_flow_and_a_stored_one_is_read_back(tmp_path: Path) -> None:
    given = PEPTIDE.model_dump()
    given["proposal"] |= {"flow": "continuous", "field_hidden": [8], "matching_steps": 30}
    config = PathsConfig(**given)
    periods = config.periods
    recipe = flow_recipe(config, periods)
    assert isinstance(recipe, ContinuousCVRecipe)
    assert isinstance(flow_recipe(PEPTIDE, periods), CVFlowRecipe)
    flow, _ = recipe.learned(torch.randn(50, len(periods), generator=seeded()), generator=seeded())
    proposal = Mixture([flow, broad_proposal(config)], [0.9, 0.1])
    save_weights(proposal, tmp_path / PROPOSAL, fingerprint="any")
    found, points = stored_proposal(config, tmp_path), torch.randn(20, len(periods), generator=seeded(4), dtype=torch.float64)
    torch.testing.assert_close(found.log_prob(points), proposal.log_prob(points), atol=1e-12, rtol=0)
    assert found.log_det_error == proposal.log_det_error
