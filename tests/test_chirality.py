"""Handedness: which centres have one, and folded densities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from boltzgen.chirality import Folded, Handedness, equal_hydrogens, handedness
from boltzgen.core import Context, Distribution
from boltzgen.errors import InputError, ShapeError
from boltzgen.md.loading import load
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.target import OpenMMTarget
from boltzgen.targets.analytic import Gaussian
from tests.molecules import SYSTEMS, ethane, graph, read, water
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


def test_hydrogens_that_the_energy_does_not_tell_apart_are_equal() -> None:
    loaded = load(SYSTEMS / "alanine_dipeptide_vacuum/topology.pdb", SYSTEMS / "alanine_dipeptide_vacuum/system.xml")
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0, platform=PlatformChoice(name="Reference"))
    molecule, x = loaded.molecule, torch.from_numpy(loaded.positions)
    labels = equal_hydrogens(molecule, target.reduced_potential, x)
    alike = [[name for name, label in zip(molecule.names, labels, strict=True) if label == one] for one in dict.fromkeys(labels)]
    assert [len(names) for names in alike if len(names) > 1] == [3, 3, 3]
    one = molecule.neighbours(10)[1]
    told = equal_hydrogens(molecule, lambda x: target.reduced_potential(x) + 0.1 * x[:, one].square().sum(1), x)
    assert len(set(told)) == len(set(labels)) + 2  # the methyl group of that hydrogen has three different ones now


def test_every_image_is_folded_onto_the_one_of_the_structure() -> None:
    molecule, x = read("alanine_dipeptide_vacuum")
    labels = [
        f"hydrogen of {molecule.neighbours(atom)}" if element == "H" else molecule.names[atom]
        for atom, element in enumerate(molecule.elements)
    ]
    hand = Handedness.of(molecule, x[0], labels=labels)
    assert hand.exchangeable.tolist() == [True, False, True, True]
    assert hand.anchor == 1
    assert (hand.n_images(mirror=True), hand.n_images(mirror=False)) == (16, 8)
    images = []
    for turned in itertools.product([False, True], repeat=4):
        image = -x[0] if turned[0] else x[0].clone()
        for exchange, centre in zip(turned[1:], hand.centres[hand.exchangeable], strict=True):
            if exchange:
                image[centre[1:3]] = image[centre[[2, 1]]]
        images.append(image)
    stack = torch.stack(images)
    assert len(torch.unique(hand.agrees(stack), dim=0)) == 16
    folded = hand.folded(stack, mirror=True)
    assert bool(hand.contains(folded).all())
    assert bool(torch.isclose(folded.abs().sum((1, 2)), x.abs().sum()).all())
    assert int(hand.contains(hand.folded(stack, mirror=False)).sum()) == 8
    assert torch.equal(stack[1], images[1])  # folding leaves its argument as it was


def test_handedness_turns_with_the_mirror_only() -> None:
    q, _ = torch.linalg.qr(noise(3, 3))
    q = q * torch.linalg.det(q)
    assert bool(HAND.contains((LEFT @ q.T + 2.0)[None]))
    assert not bool(HAND.contains(-LEFT[None]))
    assert torch.equal(handedness(-LEFT[None], HAND.centres), -handedness(LEFT[None], HAND.centres))


def test_flat_centres_are_refused() -> None:
    with pytest.raises(InputError, match="C0 and three of its neighbours lie in a plane"):
        Handedness.of(METHANE, torch.cat([LEFT[:, :2], torch.zeros(5, 1, dtype=torch.float64)], dim=1))


class OfImages(Distribution):
    """Mean of N(c, 1) over images c of a configuration: the same for all of them."""

    event_shape = (5, 3)
    log_det_error = 0.0

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(self.images), (n,), generator=generator)
        x = self.images[chosen] + torch.randn(n, 5, 3, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        parts = torch.stack([-0.5 * (x - image).square().sum(dim=(1, 2)) for image in self.images])
        return torch.logsumexp(parts, dim=0) - math.log(len(self.images)) - 7.5 * math.log(2 * math.pi)


EXCHANGED = LEFT[[0, 2, 1, 3, 4]]
EVEN = (OfImages(torch.stack([LEFT, -LEFT])), HAND)
EQUAL = (OfImages(torch.stack([LEFT, EXCHANGED])), Handedness.of(METHANE, LEFT, labels=["C", "H", "H", "H", "H"]))


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


@pytest.mark.parametrize(("flow", "hand"), [EVEN, EQUAL], ids=["mirror", "exchange"])
def test_a_folded_density_is_normalised_on_one_hand_and_knows_its_samples(flow: Distribution, hand: Handedness) -> None:
    folded = Folded(flow, hand)
    x, log_q = folded.sample(2000, generator=seeded())
    assert bool(hand.contains(x).all())
    torch.testing.assert_close(folded.log_prob(x), log_q)
    assert bool(torch.isneginf(folded.log_prob(-x)).all())
    mass, error = mass_inside(folded)
    assert mass == pytest.approx(1.0, abs=4.5 * error)
    wrong, error = mass_inside(Unfolded(flow, hand))
    assert abs(wrong - 1.0) > 4.5 * error


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(ShapeError, match="configurations"):
        Folded(Gaussian(torch.zeros(2), covariance=torch.eye(2)), HAND)
    for hand, mirror in ((Handedness.of(water(), noise(3, 3)), True), (HAND, False)):
        with pytest.raises(InputError, match="nothing to fold"):
            Folded(EVEN[0], hand, mirror=mirror)
