"""Continuous maps between two ensembles of a molecule: determinant, symmetry, exactness where steps fold, and what they give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from boltzgen.core import Bridge, Chain, Context, Target, Transform
from boltzgen.errors import InputError, SolverError
from boltzgen.estimators.perturbation import acceptance_ratio
from boltzgen.estimators.works import Works
from boltzgen.networks.field import ParticleField
from boltzgen.recipes import EnsembleFlowSize, StateMap, ensemble_flow_map
from boltzgen.training.couplings import Aligned
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.flow_matching import FlowMatching, Frames
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep, measure_work_error
from boltzgen.transforms.one_to_one import OneToOne
from tests.assertions import assert_z
from tests.registry import internal, noise, seeded
from tests.test_contract_transforms import check_log_det, check_round_trip
from tests.test_targeted import Forgetful

SIZE = EnsembleFlowSize(n_layers=1, hidden=8, n_radial=6, pair_scales=True, training_steps=2, steps=1)
#: Methanol's atoms; the hydrogens of the methyl group are equal.
LABELS = ("C", "O", "H", "H", "H", "HO")


def methanol(*, stirred: float = 0.005) -> tuple[StateMap, Tensor]:
    """A map of methanol, away from the identity, and some configurations."""
    coordinates, q = internal()
    x = coordinates(q.repeat(20, 1) + noise(100, q.shape[1], scale=0.02))[0].detach()
    made = ensemble_flow_map([x.numpy(), (1.05 * x).numpy()], size=SIZE, labels=LABELS, generator=seeded())
    with torch.no_grad():
        for parameter in made.learned.double().parameters():
            parameter += stirred * torch.randn(parameter.shape, generator=seeded(5), dtype=torch.float64)
    return made, x[:4]


def test_the_determinant_is_that_of_all_coordinates() -> None:
    made, x = methanol()
    moved, log_det = made.transform(x)
    assert float((moved - x).detach().abs().max()) > 1e-3
    assert float(log_det.detach().abs().min()) > 1e-2
    check_log_det(made.transform, x[:2])
    check_round_trip(made.transform, x)
    with pytest.raises(AssertionError):
        check_log_det(Forgetful(made.transform), x[:2])


def test_it_starts_as_the_identity_and_shares_its_weights() -> None:
    made, x = methanol(stirred=0.0)
    moved, log_det = made.transform(x)
    torch.testing.assert_close(moved, x, atol=1e-15, rtol=0)
    assert float(log_det.detach().abs().max()) < 1e-12
    fresh = made.reported(made.learned)
    assert isinstance(fresh, OneToOne)
    assert {id(p) for p in fresh.parameters()} == {id(p) for p in made.transform.parameters()} == {id(p) for p in made.learned.parameters()}


def test_single_precision_weights_give_double_precision_works() -> None:
    made, x = methanol()
    made.learned.float()
    moved, log_det = made.transform(x)
    back, log_det_back = made.transform.inverse(moved)
    assert moved.dtype == torch.float64
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-9, rtol=0)


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_the_whole_map_commutes_with_the_symmetries_of_molecules(way: str) -> None:
    made, x = methanol()
    there = getattr(made.transform, way)
    moved, log_det = there(x)
    turn = torch.linalg.qr(noise(3, 3)).Q
    turn = turn * torch.linalg.det(turn)
    for image in (turn, -turn):  # a rotation, and one with a reflection
        turned, same = there(x @ image + 0.7)
        torch.testing.assert_close(turned, moved @ image + 0.7, atol=1e-10, rtol=0)
        torch.testing.assert_close(same, log_det, atol=1e-9, rtol=0)
    exchanged = [0, 1, 3, 2, 4, 5]
    relabelled, same = there(x[:, exchanged])
    torch.testing.assert_close(relabelled, moved[:, exchanged], atol=1e-10, rtol=0)
    torch.testing.assert_close(same, log_det, atol=1e-9, rtol=0)
    unequal = [0, 1, 2, 3, 5, 4]
    assert float((there(x[:, unequal])[0] - moved[:, unequal]).detach().abs().max()) > 1e-4
    torch.testing.assert_close(moved.mean(dim=1), x.mean(dim=1), atol=1e-12, rtol=0)


# --- steps that fold


class Wave(ParticleField):
    """v = −s sin(2 x) on a line: one step of x − s sin(2 x) folds it where 2 s > 1."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = 1, 1
        self.strength = torch.nn.Parameter(torch.tensor(strength, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.strength * torch.sin(2 * x)


class Springs(Target):
    """u = ½ |x|²/σ² over all coordinates of n particles."""

    def __init__(self, n: int, d: int, scale: float) -> None:
        self.event_shape, self.scale = (n, d), scale
        self.log_z = 0.5 * n * d * math.log(2 * math.pi * scale**2)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return 0.5 * (x.double() / self.scale).square().sum(dim=(1, 2))


class Anyhow(OneToOne):
    """Mutant: takes every log determinant, wherever the way back leads."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._exact().signed(z, context)[:2]


def check_bennett(kind: type[OneToOne], strength: float, *, n: int = 20_000, c: float = 0.3) -> None:
    """Z_A ⟨f(Φ_F − c)⟩_A = e^c Z_B ⟨f(Φ_R + c)⟩_B on a line, f(w) = 1/(1 + e^w), from independent samples of both states."""
    a, b = Springs(1, 1, 1.0), Springs(1, 1, 0.8)
    bridge = Bridge(a, b, kind.of(ContinuousTransform(Wave(strength), FixedStep(1)), FixedStep(1, method="midpoint")))
    x, y = (state.scale * torch.randn(n, 1, 1, generator=seeded(k), dtype=torch.float64) for k, state in ((1, a), (2, b)))
    with torch.no_grad():
        forward = torch.sigmoid(c - bridge.works(x))
        reverse = math.exp(c + b.log_z - a.log_z) * torch.sigmoid(-c - bridge.reverse_works(y))
    stderr = float((forward.var() / n + reverse.var() / n).sqrt())
    assert_z(float(forward.mean()), float(reverse.mean()), stderr)


def test_bennetts_identity_holds_where_steps_fold() -> None:
    for strength in (0.3, 0.9):  # one to one, and folded in most places
        check_bennett(OneToOne, strength)
    with pytest.raises(AssertionError):
        check_bennett(Anyhow, 0.9)


def folding() -> OneToOne:
    return OneToOne.of(ContinuousTransform(Wave(0.9), FixedStep(1)), FixedStep(1, method="midpoint"))


def test_works_of_rows_that_have_no_partner_are_infinite() -> None:
    bridge = Bridge(Springs(1, 1, 1.0), Springs(1, 1, 0.8), folding())
    x = torch.linspace(-3, 3, 401, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        for works in (bridge.works(x), bridge.reverse_works(x)):
            assert bool(torch.isposinf(works).any() & torch.isfinite(works).any())
            assert not bool(torch.isnan(works).any())
        assert bridge.transform.log_det_error is None
        with pytest.raises(SolverError, match="one to one at"):
            measure_work_error(bridge, x[torch.isposinf(bridge.works(x))], x)
    with pytest.raises(InputError, match="StepJacobian"):
        OneToOne(ContinuousTransform(Wave(0.1), FixedStep(1)))


# --- what it learns


def works(transform: Transform, a: Springs, b: Springs, *, n: int = 500) -> tuple[Works, Works]:
    bridge = Bridge(a, b, transform)
    x, y = (state.scale * torch.randn(n, *state.event_shape, generator=seeded(k), dtype=torch.float64) for k, state in ((11, a), (12, b)))
    with torch.no_grad():
        if not isinstance(transform, Chain):
            assert measure_work_error(bridge, x[:50], y[:50]) < 1e-8
        found = bridge.works(x), bridge.reverse_works(y)
    return tuple(Works.of(w, role="evaluate", log_det_error=transform.log_det_error) for w in found)  # type: ignore[return-value]


def test_flow_matching_between_two_ensembles_gives_their_difference() -> None:
    """Four equal particles on springs get closer; the centre, which no map moves, does so by itself: ΔF = −3 n ln(σ_B/σ_A)."""
    a, b = Springs(4, 3, 1.0), Springs(4, 3, 0.7)
    truth = a.log_z - b.log_z
    x0, x1 = (state.scale * torch.randn(4000, 4, 3, generator=seeded(k), dtype=torch.float64) for k, state in ((1, a), (2, b)))
    size = EnsembleFlowSize(n_layers=1, hidden=8, n_radial=6, pair_scales=False, training_steps=1, steps=1)
    made = ensemble_flow_map([x0.numpy(), x1.numpy()], size=size, labels=["P"] * 4, length=1.0, generator=seeded())
    assert isinstance(made.learned, ContinuousTransform)
    y0, y1 = ((x - x.mean(dim=1, keepdim=True)).float() for x in (x0, x1))
    loss = FlowMatching(made.learned.field, Frames(y0), y1, batch_size=64, coupling=Aligned([0] * 4, reflections=False, across_batch=True))
    settings = FitSettings(steps=100, learning_rate=5e-3, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=1000, evaluate_every=100)
    fit(made.learned, loss, settings=settings, generator=seeded(), progress=False)
    found = acceptance_ratio(*works(made.transform, a, b), seed=1)
    plain = acceptance_ratio(*works(Chain(), a, b), seed=1)
    wrong = acceptance_ratio(*works(Forgetful(made.transform), a, b), seed=1)
    for estimate in (found.difference, plain.difference):
        assert_z(float(estimate.value), truth, float(estimate.stderr))
    assert found.overlap > plain.overlap + 0.1
    assert float(found.difference.stderr) < 0.8 * float(plain.difference.stderr)
    with pytest.raises(AssertionError):
        assert_z(float(wrong.difference.value), truth, float(wrong.difference.stderr))


def test_frames_are_drawn_from_the_ensemble() -> None:
    x = noise(5, 3, 2)
    frames = Frames(x)
    (drawn,) = frames.sample(1000, generator=seeded())
    assert frames.event_shape == (3, 2)
    counts = (drawn.flatten(1)[:, None] == x.flatten(1)).all(dim=2).sum(dim=0)
    assert int(counts.sum()) == 1000
    assert int(counts.min()) > 150
