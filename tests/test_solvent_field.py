"""The velocity field of a solvent around its solute: divergence, periodicity, symmetry, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from boltzgen.networks.field import ParticleField
from boltzgen.networks.solvent_field import SolventField
from tests.test_contract_fields import TIMES, check_divergence, check_permutation, check_symmetry, random, stir

BOX = torch.tensor([1.1, 1.2, 1.3], dtype=torch.float64)
N, CENTRE = 8, 2


def solvent_field(box: Tensor | None = BOX, kind: type[SolventField] = SolventField) -> SolventField:
    field = kind(N, centre=CENTRE, inner=0.2, outer=1.4, length=0.3, box=box, n_central=5, n_places=3, n_radial=4)
    assert isinstance(stir(field), SolventField)
    return field


def liquid() -> Tensor:
    """Three rows of positions, some outside the box; all particles have neighbours within reach."""
    return 0.35 * random(3, N, 3)


@pytest.mark.parametrize("box", [BOX, None])
def test_divergence(box: Tensor | None) -> None:
    check_divergence(solvent_field(box), liquid())


class WithoutPlaces(SolventField):
    """Mutant: the divergence forgets that what neighbours do depends on where the particle is."""

    def _from_neighbours(self, d: Tensor, place: Tensor, slope: Tensor, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        return super()._from_neighbours(d, place, 0 * slope, here, there)


def test_a_divergence_without_the_slope_of_places_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_divergence(solvent_field(kind=WithoutPlaces), liquid())


def test_without_a_box_it_has_all_symmetries() -> None:
    for reflect in (False, True):
        check_symmetry(solvent_field(None), liquid(), reflect=reflect)


def test_solvent_can_be_relabelled_and_the_solute_cannot() -> None:
    field, x = solvent_field(), liquid()
    check_permutation(field, x, [1, 7, 2, 0, 3, 6, 5, 4])
    across = [2, 1, 0, *range(3, N)]
    assert float((field(TIMES, x[:, across]) - field(TIMES, x)[:, across]).detach().abs().max()) > 1e-3


def test_it_is_periodic_and_smooth_where_nearest_images_change() -> None:
    field, x = solvent_field(), liquid()
    v, divergence = field.divergence(TIMES, x)
    for atom in (CENTRE, 5):
        image = torch.zeros_like(x)
        image[:, atom] = BOX * torch.tensor([2.0, -1.0, 1.0])
        again = field.divergence(TIMES, x + image)
        torch.testing.assert_close(again[0], v, atol=1e-10, rtol=0)
        torch.testing.assert_close(again[1], divergence, atol=1e-9, rtol=0)
    x = x[:1]
    sides = []
    for side in (-1e-7, 1e-7):  # one particle on either side of the plane halfway to the next image of the solute
        x[0, 5] = x[0, CENTRE] + torch.tensor([0.5 * float(BOX[0]) + side, 0.1, 0.05])
        sides.append(field.divergence(TIMES[:1], x))
    torch.testing.assert_close(sides[0][0], sides[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(sides[0][1], sides[1][1], atol=1e-4, rtol=0)
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    cubic, x = solvent_field(torch.full((3,), 1.1, dtype=torch.float64)), liquid()
    torch.testing.assert_close(cubic(TIMES, x @ turn), cubic(TIMES, x) @ turn, atol=1e-10, rtol=0)


def test_every_parameter_gets_a_gradient_and_rows_are_on_their_own() -> None:
    field, x = solvent_field(), liquid()
    v, divergence = field.divergence(TIMES, x)
    (v.square().sum() + divergence.square().sum()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in field.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).all()), name
    alone = field.divergence(TIMES[1], x[1:2])
    torch.testing.assert_close(alone[0], v[1:2], atol=1e-12, rtol=0)
    torch.testing.assert_close(alone[1], divergence[1:2], atol=1e-11, rtol=0)


def test_it_starts_at_rest_and_coinciding_particles_are_finite() -> None:
    fresh, x = SolventField(N, centre=CENTRE, inner=0.2, outer=1.4, length=0.3, box=BOX).double(), liquid()
    assert float(fresh(TIMES, x).detach().abs().max()) == 0.0
    field = solvent_field().float()
    x[:, 4], x[:, 6] = x[:, 5], x[:, CENTRE]
    rows = x.float().requires_grad_(True)
    v, divergence = field.divergence(TIMES.float(), rows)
    (gradient,) = torch.autograd.grad(v.square().sum() + divergence.sum(), rows)
    assert v.dtype == torch.float32
    for values in (v, divergence, gradient):
        assert bool(torch.isfinite(values).all())


def test_fields_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="centre from 0 to 7"):
        SolventField(N, centre=8, inner=0.2, outer=1.0, length=0.3)
    with pytest.raises(ValueError, match=r"within 1\.5 times the shortest edge 1\.1"):
        SolventField(N, centre=0, inner=0.2, outer=1.7, length=0.3, box=BOX)
    with pytest.raises(ValueError, match="at least two functions"):
        SolventField(N, centre=0, inner=0.2, outer=1.0, length=0.3, n_radial=1)
    assert isinstance(solvent_field(), ParticleField)
