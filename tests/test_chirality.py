"""Handedness: which centres have one, one stereoisomer as a target, folded densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.chirality import Folded, Stereoisomer, handedness, stereocentres
from boltzgen.core import Context, Distribution
from boltzgen.errors import InputError, ShapeError
from boltzgen.targets.analytic import Gaussian
from tests.molecules import ethane, graph, neopentane, read
from tests.registry import noise, seeded

CENTRE = np.array([[0, 1, 2, 3]])
LEFT = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], dtype=torch.float64)


def test_stereocentres_are_found_by_what_hangs_behind_their_neighbours() -> None:
    molecule, _ = read("alanine_dipeptide_vacuum")
    ((centre, *arms),) = stereocentres(molecule).tolist()
    assert centre == 8  # the alpha carbon
    assert set(arms) < set(molecule.neighbours(centre))
    for achiral in (ethane(), neopentane(), graph("CHNHN", [(0, 1), (0, 2), (0, 3), (0, 4)])):
        assert len(stereocentres(achiral)) == 0
    assert stereocentres(graph("CHNOC", [(0, 1), (0, 2), (0, 3), (0, 4)]))[0, 0] == 0


def test_the_order_of_the_atoms_does_not_choose_the_sign() -> None:
    """The same molecule with its atoms in another order has the same handedness."""
    order = [3, 0, 4, 2, 1]
    elements, place = "CHNOC", {old: new for new, old in enumerate(order)}
    original = graph(elements, [(0, k) for k in range(1, 5)])
    shuffled = graph("".join(elements[k] for k in order), [(place[0], place[k]) for k in range(1, 5)])
    ours, theirs = handedness(LEFT[None], stereocentres(original)), handedness(LEFT[None, order], stereocentres(shuffled))
    assert abs(float(ours)) == 1
    assert torch.equal(ours, theirs)


def test_handedness_turns_with_the_mirror_only() -> None:
    q, _ = torch.linalg.qr(noise(3, 3))
    q = q * torch.linalg.det(q)
    assert float(handedness((LEFT @ q.T + 2.0)[None], CENTRE)) == float(handedness(LEFT[None], CENTRE))
    assert float(handedness(-LEFT[None], CENTRE)) == -float(handedness(LEFT[None], CENTRE))


def test_a_stereoisomer_leaves_no_weight_to_the_others() -> None:
    target = Gaussian(torch.zeros(5, 3), covariance=torch.eye(15))
    isomer = Stereoisomer(target, CENTRE, like=LEFT)
    x = torch.stack([LEFT, -LEFT])
    u, gradient = isomer.value_and_grad(x)
    assert torch.equal(u, isomer.reduced_potential(x))
    assert float(u[0]) == float(target.reduced_potential(x)[0])
    assert float(u[1]) == math.inf
    assert torch.equal(gradient[1], torch.zeros(5, 3, dtype=torch.float64))
    assert isomer.event_shape == (5, 3)
    with pytest.raises(InputError, match="flat"):
        Stereoisomer(target, CENTRE, like=torch.zeros(5, 3, dtype=torch.float64))


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
    sign = float(handedness(LEFT[None], CENTRE))
    folded = Folded(Even(), CENTRE[0], sign=sign)
    x, log_q = folded.sample(2000, generator=seeded())
    assert bool((handedness(x, CENTRE) == sign).all())
    torch.testing.assert_close(folded.log_prob(x), log_q)
    assert bool(torch.isneginf(folded.log_prob(-x)).all())
    mass, error = mass_inside(folded)
    assert mass == pytest.approx(1.0, abs=4.5 * error)
    wrong, error = mass_inside(Unfolded(Even(), CENTRE[0], sign=sign))
    assert abs(wrong - 1.0) > 4.5 * error
    with pytest.raises(ShapeError, match="configurations"):
        Folded(Gaussian(torch.zeros(2), covariance=torch.eye(2)), CENTRE[0], sign=1.0)
