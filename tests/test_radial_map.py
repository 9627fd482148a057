"""Maps of the solvent around a solute: their symmetry, their limits, and a free energy that quadrature knows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.core import Bridge, Context, Target
from boltzgen.errors import InexactDensityError, InputError, ShapeError
from boltzgen.estimators.perturbation import acceptance_ratio, bound
from boltzgen.estimators.works import Works
from boltzgen.networks.solvent_field import SolventField
from boltzgen.recipes import SolventSize, radial_solvent_map, solvent_flow_map
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.targeted import EndState, TargetedPerturbation
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep, measure_work_error
from boltzgen.transforms.radial_map import RadialMap
from tests.registry import noise, radial_map, seeded
from tests.test_contract_transforms import stir

EDGE, N = 2.0, 12


def test_symmetry() -> None:
    """Permutations of solvent, translations, rotations by a right angle of a cube, and periodic images."""
    _, x = radial_map()
    transform = stir(RadialMap(6, centre=0, inner=0.2, outer=1.0, box=torch.full((3,), 2.1, dtype=torch.float64), n_bins=5))
    y, log_det = transform(x)
    assert float((y - x).detach().abs().max()) > 0.05
    assert torch.equal(y[:, 0], x[:, 0])
    order, turn = torch.tensor([0, 3, 1, 5, 2, 4]), torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    image = torch.zeros_like(x)
    image[:, 2, 1] = 4.2
    for change in (lambda x: x[:, order], lambda x: x + 0.7, lambda x: x @ turn, lambda x: x + image):
        changed, changed_log_det = transform(change(x))
        torch.testing.assert_close(changed, change(y), atol=1e-12, rtol=0)
        torch.testing.assert_close(changed_log_det, log_det, atol=1e-12, rtol=0)


def test_it_starts_as_the_identity_and_moves_nothing_outside_its_shell() -> None:
    transform, x = radial_map()
    torch.testing.assert_close(transform(x)[0], x, atol=1e-12, rtol=0)
    moved = stir(transform)(x)[0].detach() - x
    d = x - x[:, :1]
    box = transform.box
    r = (d - box * torch.round(d / box)).norm(dim=2)
    still = (r <= transform.inner) | (r >= transform.outer)
    assert 5 < int(still.sum()) < still.numel() - 5
    assert float(moved[still].abs().max()) == 0.0
    assert float(moved[~still].norm(dim=1).min()) > 0


def test_maps_that_cannot_be_are_refused() -> None:
    box = torch.tensor([2.0, 2.2, 2.4])
    with pytest.raises(InputError, match=r"half the shortest edge of the box, 1.0000 nm, not 1.1"):
        RadialMap(3, centre=0, inner=0.2, outer=1.1, box=box)
    with pytest.raises(InputError, match="inner < outer"):
        RadialMap(3, centre=0, inner=0.5, outer=0.4)
    with pytest.raises(InputError, match="central atom from 0 to 2, got 3"):
        RadialMap(3, centre=3, inner=0.1, outer=0.4)
    with pytest.raises(ShapeError, match=r"\[b, 3, 3\]"):
        RadialMap(3, centre=0, inner=0.1, outer=0.4)(noise(2, 4, 3))
    xs = [noise(5, 3, 3).numpy()]
    with pytest.raises(InputError, match=r"give map\.outer"):
        radial_solvent_map(xs, centre=0)
    with pytest.raises(InputError, match="skewed"):
        radial_solvent_map(xs, centre=0, box=torch.tensor([[2.0, 0, 0], [0.5, 2, 0], [0, 0, 2]], dtype=torch.float64))
    with pytest.raises(InputError, match=r"map\.centre: expected an atom from 0 to 2"):
        radial_solvent_map(xs, centre=3, outer=1.0)


class IdealGas(Target):
    """Particles that feel a repulsive sphere at the first one, φ(r) = (s/r)⁶ − 1 up to r = s, and not each other, in a periodic cube."""

    def __init__(self, size: float) -> None:
        self.event_shape, self.size, self.box = (N + 1, 3), size, EDGE * torch.eye(3, dtype=torch.float64)

    def energy(self, r: Tensor) -> Tensor:
        return ((self.size / r) ** 6 - 1).clamp(min=0.0)

    def reduced_potential(self, x: Tensor) -> Tensor:
        d = x[:, 1:] - x[:, :1]
        return self.energy((d - EDGE * torch.round(d / EDGE)).norm(dim=2)).sum(dim=1).double()

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """By rejection."""
        x = EDGE * (torch.rand(20 * n * N, 3, generator=generator, dtype=torch.float64) - 0.5)
        kept = torch.rand(len(x), generator=generator, dtype=torch.float64) < torch.exp(-self.energy(x.norm(dim=1)))
        return torch.cat([torch.zeros(n, 1, 3, dtype=torch.float64), x[kept][: n * N].reshape(n, N, 3)], dim=1)

    def free_energy(self) -> float:
        """−ln Z of the particles, by quadrature over the sphere."""
        r = torch.linspace(1e-3, self.size, 200_001, dtype=torch.float64)
        lost = torch.trapezoid(4 * math.pi * r**2 * (1 - torch.exp(-self.energy(r))), r)
        return -N * math.log(EDGE**3 - float(lost))


class WithoutJacobian(RadialMap):
    """Mutant: the stretch of the sphere's surface is lost."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, context)
        return x, 0.0 * log_det

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().inverse(x, context)
        return z, 0.0 * log_det


def test_growing_a_solute_in_an_ideal_gas() -> None:
    """The learned map narrows the bounds and gives the difference that quadrature knows; without its Jacobian it does not."""
    a, b = IdealGas(0.6), IdealGas(0.85)
    exact = b.free_energy() - a.free_energy()
    x, y = (state.sample(2000, generator=seeded(k)) for k, state in enumerate((a, b)))
    made = radial_solvent_map([x[:1000].numpy(), y[:1000].numpy()], centre=0, box=a.box, n_bins=8)
    states = [EndState.of(state, rows[:1000]) for state, rows in ((a, x), (b, y))]
    settings = FitSettings(steps=150, learning_rate=2e-2, gradient_clip=10.0, ema_decay=0.9, evaluate_every=150, checkpoint_every=150)
    fit(made.learned, TargetedPerturbation(*states, batch_size=64), settings=settings, generator=seeded(), progress=False)

    @torch.no_grad()
    def works(transform: RadialMap) -> tuple[Works, Works]:
        bridge = Bridge(a, b, transform)
        found = (bridge.works(x[1000:]), bridge.reverse_works(y[1000:]))
        forward, reverse = (Works.of(w, role="evaluate", log_det_error=0.0).decorrelated() for w in found)
        return forward, reverse

    assert isinstance(made.learned, RadialMap)
    fresh = RadialMap(N + 1, centre=0, inner=made.learned.inner, outer=made.learned.outer, box=torch.full((3,), EDGE), n_bins=8)
    learned, plain = works(made.learned), works(fresh)
    found, before = acceptance_ratio(*learned, seed=1).difference, acceptance_ratio(*plain, seed=1).difference
    assert abs(float(found.value) - exact) < 4 * float(found.stderr)
    assert float(found.stderr) < 0.6 * float(before.stderr)
    assert float(bound(learned[1], reverse=True).value) < exact < float(bound(learned[0]).value)
    assert np.var(learned[0].w) < 0.3 * np.var(plain[0].w)
    wrong = WithoutJacobian(N + 1, centre=0, inner=made.learned.inner, outer=made.learned.outer, box=torch.full((3,), EDGE), n_bins=8)
    wrong.load_state_dict(made.learned.state_dict())
    mutant = acceptance_ratio(*works(wrong), seed=1).difference
    assert abs(float(mutant.value) - exact) > 8 * float(mutant.stderr)


class WithoutDivergence(SolventField):
    """Mutant: volumes seem to stay as they are."""

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v, divergence = super().divergence(t, x)
        return v, 0.0 * divergence


def test_growing_a_solute_by_a_continuous_map() -> None:
    """It is right to its measured error, which falls with more steps and is needed for an estimate; without divergence it is caught."""
    a, b = IdealGas(0.6), IdealGas(0.8)
    exact = b.free_energy() - a.free_energy()
    x, y = (state.sample(1500, generator=seeded(k)) for k, state in enumerate((a, b)))
    size = SolventSize(n_central=6, n_radial=3, n_times=2, training_steps=2, steps=3)
    made = solvent_flow_map([x[:500].numpy(), y[:500].numpy()], size=size, centre=0, box=a.box)
    states = [EndState.of(state, rows[:500].float()) for state, rows in ((a, x), (b, y))]
    settings = FitSettings(steps=60, learning_rate=3e-2, gradient_clip=10.0, ema_decay=0.9, evaluate_every=60, checkpoint_every=60)
    fit(made.learned, TargetedPerturbation(*states, batch_size=32), settings=settings, generator=seeded(), progress=False)
    transform = made.reported(made.learned)
    assert isinstance(transform, ContinuousTransform)
    bridge, finer = Bridge(a, b, transform), Bridge(a, b, transform.with_solver(FixedStep(8)))
    unmeasured = Works.of(bridge.works(x[500:510]).detach(), role="evaluate", log_det_error=transform.log_det_error)
    with pytest.raises(InexactDensityError):
        acceptance_ratio(unmeasured, unmeasured, seed=1)
    assert measure_work_error(finer, x[500:550], y[500:550]) < min(measure_work_error(bridge, x[500:550], y[500:550]), 0.005)
    with torch.no_grad():
        works = [
            Works.of(w, role="evaluate", log_det_error=finer.transform.log_det_error).decorrelated()
            for w in (finer.works(x[500:]), finer.reverse_works(y[500:]))
        ]
    found = acceptance_ratio(works[0], works[1], seed=1).difference
    assert abs(float(found.value) - exact) < 4 * float(found.stderr)
    assert float(found.stderr) < 0.05
    finer.transform.field.__class__ = WithoutDivergence  # type: ignore[union-attr,assignment]
    with torch.no_grad():
        wrong = [Works.of(w, role="evaluate", log_det_error=0.0) for w in (finer.works(x[500:]), finer.reverse_works(y[500:]))]
    mutant = acceptance_ratio(wrong[0], wrong[1], seed=1).difference
    assert abs(float(mutant.value) - exact) > 8 * float(mutant.stderr)
    assert measure_work_error(finer, x[500:520], y[500:520]) < 0.005  # both ways forget the same: quadrature is what catches it


def test_solvent_maps_that_cannot_be_are_refused() -> None:
    size, xs = SolventSize(n_central=6, n_radial=3, n_times=2, training_steps=2, steps=3), [noise(5, 3, 3).numpy()]
    with pytest.raises(InputError, match=r"give map\.outer"):
        solvent_flow_map(xs, size=size, centre=0)
    with pytest.raises(InputError, match=r"within 1\.5 times the shortest edge"):
        solvent_flow_map(xs, size=size, centre=0, outer=4.0, box=2 * torch.eye(3, dtype=torch.float64))
