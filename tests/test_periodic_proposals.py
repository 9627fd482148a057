"""Steered moves along periodic variables refuse proposals that are no density on the circle, which would bias them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from boltzgen.core import Distribution
from boltzgen.distributions import NormalMixture
from boltzgen.errors import InputError
from boltzgen.mixtures import Flat, Mixture
from boltzgen.paths import Restraint, Schedule
from boltzgen.recipes.cv_flow import CVFlowSize, cv_flow
from boltzgen.sampling import steered
from boltzgen.sampling.cv_learner import FixedProposal
from boltzgen.sampling.periodic_proposals import require_same_circles
from boltzgen.sampling.steered import SteeredMove
from boltzgen.sampling.steering import TargetSteering
from boltzgen.targets.analytic import VonMisesProduct
from tests.assertions import z_score

TURN = 2 * math.pi
TARGET = VonMisesProduct(torch.tensor([3.0]), concentration=torch.tensor([2.0]))
#: ⟨cos(x − 3)⟩.
EXACT = float(torch.special.i1(torch.tensor(2.0)) / torch.special.i0(torch.tensor(2.0)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def move(proposal: Distribution) -> SteeredMove:
    engine = TargetSteering(TARGET, lambda x: x, Restraint([20.0], (TURN,)), step_size=0.2)
    return SteeredMove(engine, proposal, schedule=Schedule(10))


def flow(period: float | None) -> Distribution:
    values = torch.randn(200, 1, generator=seeded(1), dtype=torch.float64)
    return cv_flow(values, (period,), size=CVFlowSize(bins=4), generator=seeded(2)).requires_grad_(False)


def hill(*periods: float | None, width: float = 0.8) -> NormalMixture:
    return NormalMixture(torch.tensor([[3.0]]), torch.tensor([[width]]), periods=periods or None)


class Rarely(Distribution):
    """Beyond π once in a thousand draws, which those of a check do not show; no density there, so that its limits are its only fault."""

    event_shape = (1,)

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[Tensor, Tensor]:
        x = (torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5) * TURN * 1.001
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: object = None) -> Tensor:
        return torch.where(x[:, 0].abs() <= 0.5 * TURN * 1.001, -math.log(TURN * 1.001), -torch.inf).to(torch.float64)


@pytest.mark.parametrize("proposal", [flow(TURN), hill(TURN), Flat([-math.pi], [math.pi]), Flat([-1.0], [2.0]),
                                      Mixture([Mixture([flow(TURN), hill(TURN)], [0.5, 0.5]), Flat([-math.pi], [math.pi])], [0.9, 0.1])],
                         ids=["flow", "normal", "circle", "arc", "mixture"])  # fmt: skip
def test_densities_on_the_circle_are_taken(proposal: Distribution) -> None:
    made = move(proposal)
    made.step(made.init(TARGET.sample(50, generator=seeded())), generator=seeded())


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (flow(None), "not periodic in variable 0, whose period is 6.283"),
        (hill(), r"expected a proposal with the periods \[6.28\d*\], got one with \[\]"),
        (hill(TURN / 2), r"got one with \[3.14"),
        (Flat([0.0], [TURN]), r"expected proposed values of variable 0 from -3.142 to 3.142"),
        (Mixture([flow(TURN), Mixture([flow(TURN), flow(None)], [1.0, 1.0])], [0.9, 0.1]), "give the proposal the periods"),
    ],
    ids=["flow on a line", "normal on a line", "normal of another period", "other limits", "in a mixture"],
)
def test_other_densities_are_refused(proposal: Distribution, message: str) -> None:
    with pytest.raises(InputError, match=message):
        move(proposal)
    with pytest.raises(InputError, match=message):
        FixedProposal(move(flow(TURN)).engine, proposal, schedule=Schedule(5))


def test_a_periodic_density_of_a_variable_on_a_line_is_refused() -> None:
    require_same_circles(hill(), (None,))
    with pytest.raises(InputError, match="periods"):
        require_same_circles(hill(TURN), (None,))


def test_a_rare_value_outside_stops_the_move_that_draws_it() -> None:
    made = move(Rarely())
    with pytest.raises(InputError, match="expected proposed values of variable 0"):
        made.step(made.init(TARGET.sample(20_000, generator=seeded())), generator=seeded())


def test_what_is_refused_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin without the checks: an angle drawn beyond π is denied when met wrapped, so that nothing comes back from there."""
    monkeypatch.setattr(steered, "require_same_circles", lambda *arguments: None)
    monkeypatch.setattr(steered, "require_inside", lambda *arguments: None)
    for proposal, biased in ((Flat([0.0], [TURN]), True), (Flat([-math.pi], [math.pi]), False)):
        made, generator = move(proposal), seeded(5)
        state = made.init(TARGET.sample(20_000, generator=generator))
        for _ in range(10):
            state, _ = made.step(state, generator=generator)
        cosine = torch.cos(state.x[:, 0] - 3.0)
        score = z_score(float(cosine.mean()), EXACT, float(cosine.std()) / math.sqrt(len(cosine)))
        assert abs(score) > 8 if biased else abs(score) < 4.5
