"""Handedness: which centres have one, and folded densities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from boltzgen.chirality import Folded, Handedness, handedness
from boltzgen.core import Context, Distribution
from boltzgen.errors import InputError, ShapeError
from boltzgen.targets.analytic import Gaussian
from tests.molecules import ethane, graph, read, water
from tests.registry import noise, seeded

METHANE = graph("CHHHH", [(0, 1), (0, 2), (0, 3), (0, 4)])
LEFT = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], dtype=torch.float64)
HAND = Handedness.of(METHANE, LEFT)


def test_every_atom_with_four_neighbours_is_a_centre() -> None:
    molecule, x = read("alanine_dipeptide_vacuum")
    hand = Handedness.of(molecule, x[0])
    assert hand.centres[:, 0].tolist() == [1, 8, 10, 18]  # two terminal methyls, the alpha carbon and its methyl
    assert bool(hand.contains(x))
    assert not bool(hand.contains(-x))
    swapped = x.clone()
    methyl = [atom for atom in molecule.neighbours(10) if atom != 8]
    swapped[:, methyl[:2]] = x[:, methyl[:2]].flip(1)
    assert hand.agrees(swapped).tolist() == [[True, True, False, True]]
    assert len(Handedness.of(ethane(), noise(8, 3)).centres) == 2
    assert len(Handedness.of(water(), noise(3, 3)).centres) == 0


def test_handedness_turns_with_the_mirror_only() -> None:
    q, _ = torch.linalg.qr(noise(3, 3))
    q = q * torch.linalg.det(q)
    assert bool(HAND.contains((LEFT @ q.T + 2.0)[None]))
    assert not bool(HAND.contains(-LEFT[None]))
    assert torch.equal(handedness(-LEFT[None], HAND.centres), -handedness(LEFT[None], HAND.centres))


def test_flat_centres_are_refused() -> None:
    with pytest.raises(InputError, match="C0 and three of its neighbours lie in a plane"):
        Handedness.of(METHANE, torch.cat([LEFT[:, :2], torch.zeros(5, 1, dtype=torch.float64)], dim=1))


class Even(Distribution):
    """½ N(c, 1) + ½ N(−c, 1): the same for mirror images."""

    event_shape = (5, 3)
    log_det_error = 0.0

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        signs = torch.randint(0, 2, (n, 1, 1), generator=generator) * 2 - 1
        x = signs * LEFT + torch.randn(n, 5, 3, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        parts = torch.stack([-0.5 * (x - sign * LEFT).square().sum(dim=(1, 2)) for sign in (1, -1)])
        return torch.logsumexp(parts, dim=0) - math.log(2) - 7.5 * math.log(2 * math.pi)


def mass_inside(folded: Distribution) -> tuple[float, float]:
    """∫ of the folded density, and its standard error, by samples of a wide normal."""
    x = 2.0 * torch.randn(40_000, 5, 3, generator=seeded(), dtype=torch.float64)
    log_p = -0.125 * x.square().sum(dim=(1, 2)) - 7.5 * math.log(8 * math.pi)
    ratios = torch.exp(folded.log_prob(x) - log_p)
    return float(ratios.mean()), float(ratios.std()) / len(x) ** 0.5


class Unfolded(Folded):
    """Mutant: forgets that two images became one."""

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().log_prob(x, context) - math.log(2.0)


def test_a_folded_density_is_normalised_on_one_hand_and_knows_its_samples() -> None:
    folded = Folded(Even(), HAND)
    x, log_q = folded.sample(2000, generator=seeded())
    assert bool(HAND.contains(x).all())
    torch.testing.assert_close(folded.log_prob(x), log_q)
    assert bool(torch.isneginf(folded.log_prob(-x)).all())
    mass, error = mass_inside(folded)
    assert mass == pytest.approx(1.0, abs=4.5 * error)
    wrong, error = mass_inside(Unfolded(Even(), HAND))
    assert abs(wrong - 1.0) > 4.5 * error
    with pytest.raises(ShapeError, match="configurations"):
        Folded(Gaussian(torch.zeros(2), covariance=torch.eye(2)), HAND)
    with pytest.raises(InputError, match="without a centre"):
        Folded(Even(), Handedness.of(water(), noise(3, 3)))
