"""Maps of a molecule that depend on what is around it, which stays where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from boltzgen.config.tfep import MapConfig
from boltzgen.core import Bridge, Chain, Context, Target, Transform
from boltzgen.errors import InputError
from boltzgen.estimators.perturbation import acceptance_ratio
from boltzgen.estimators.works import Works
from boltzgen.networks.surroundings import Surroundings
from boltzgen.recipes import StateMap, SurroundingsSize, internal_coordinate_map, matched_domains, surroundings_layers
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.targeted import EndState, TargetedPerturbation
from boltzgen.transforms.surrounded import SurroundedShape
from tests import molecules
from tests.assertions import assert_z
from tests.registry import noise, seeded, surrounded
from tests.test_contract_transforms import check_log_det, check_round_trip, stir


class WithoutFrame(SurroundedShape):
    """Mutant: what belongs to the first three atoms is not counted."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, context)
        return x, log_det + self._of_frame(z) - self._of_frame(x)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().inverse(x, context)
        return z, log_det + self._of_frame(x) - self._of_frame(z)

    def _of_frame(self, x: Tensor) -> Tensor:
        coordinates = self.shape.coordinates
        q, _ = coordinates.inverse(x[:, self.molecule.atoms])
        return 2 * q[:, coordinates.bond_columns[:2]].log().sum(1) + q[:, coordinates.angle_columns[0]].sin().log()


class SeesItself(SurroundedShape):
    """Mutant: surroundings of the atoms that move, not of what is kept."""

    def kept(self, x: Tensor) -> Tensor:
        return x[:, self.molecule.atoms]


@pytest.mark.parametrize("torsions", [False, True])
def test_what_a_map_may_see_is_what_it_keeps(torsions: bool) -> None:
    """Against all derivatives of all coordinates, carried ones too; mutants are found out."""

    def made(kind: type[SurroundedShape]) -> tuple[SurroundedShape, Tensor]:
        transform, x = surrounded(torsions=torsions)
        transform.__class__ = kind
        stir(transform)
        return transform, x

    check_log_det(*made(SurroundedShape))
    with pytest.raises(AssertionError):
        check_log_det(*made(SeesItself))
    with pytest.raises(AssertionError):
        check_round_trip(*made(SeesItself))
    if not torsions:  # a torsion moves no atom of the frame
        with pytest.raises(AssertionError):
            check_log_det(*made(WithoutFrame))


@pytest.mark.parametrize("torsions", [False, True])
def test_it_starts_as_the_identity_and_then_follows_its_surroundings(torsions: bool) -> None:
    transform, x = surrounded(torsions=torsions)
    same, log_det = transform(x)
    torch.testing.assert_close(same, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-10, rtol=0)
    stir(transform)
    moved, _ = transform(x)
    assert torch.equal(moved[:, transform.others], x[:, transform.others])
    elsewhere = x.index_copy(1, transform.others, x[:, transform.others] + 0.05)
    other, _ = transform(elsewhere)
    assert float((other - moved)[:, transform.molecule.atoms].detach().abs().max()) > 1e-4


def test_symmetries() -> None:
    """Translations, images, permutations of equal atoms; rotations where there is no box."""
    transform, x = surrounded()
    stir(transform)
    y, log_det = transform(x)
    shift, edges = torch.tensor([0.7, -2.0, 0.3], dtype=torch.float64), torch.tensor([1.9, 2.0, 2.1], dtype=torch.float64)
    images = torch.zeros_like(x)
    images[:, 4], images[:, 8] = edges * torch.tensor([1.0, -2.0, 0.0]), edges * torch.tensor([0.0, 0.0, 1.0])
    order = torch.tensor([8, 1, 2, 3, 4, 5, 6, 7, 0])  # equal kinds; 4 is of another
    for changed, expected in ((x + shift, y + shift), (x + images, y + images), (x[:, order], y[:, order])):
        found, same = transform(changed)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(same, log_det, atol=1e-9, rtol=0)
    unequal = x[:, [4, 1, 2, 3, 0, 5, 6, 7, 8]]
    assert not torch.allclose(transform(unequal)[1], log_det, atol=1e-4)
    transform.surroundings.box = None
    turn = torch.linalg.qr(noise(3, 3)).Q
    turn = turn * torch.linalg.det(turn)
    (y, log_det), (turned, same) = transform(x), transform(x @ turn)
    torch.testing.assert_close(turned, y @ turn, atol=1e-9, rtol=0)
    torch.testing.assert_close(same, log_det, atol=1e-9, rtol=0)


def test_surroundings_are_smooth_where_atoms_come_into_sight_and_images_change() -> None:
    seen = Surroundings(1, (0,), inner=0.2, cutoff=1.0, n_functions=5, box=torch.tensor([2.0, 2.0, 2.0]))
    point = torch.zeros(1, 1, 3, dtype=torch.float64)
    for edge in (torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 0.3, 0.0]), torch.tensor([0.6, 0.8, 0.0])):
        atom = edge.double().view(1, 1, 3)
        near, far = (torch.cat([part.flatten() for part in seen(point, atom * scale)]) for scale in (1 - 1e-4, 1 + 1e-4))
        torch.testing.assert_close(near, far, atol=1e-9, rtol=0)
    closer, _ = seen(point, torch.tensor([[[0.3, 0.0, 0.0]]], dtype=torch.float64))
    image, _ = seen(point, torch.tensor([[[-1.7, 2.0, 0.0]]], dtype=torch.float64))
    torch.testing.assert_close(closer, image)
    assert float(closer.max()) > 0.5
    for wrong in ({"cutoff": 1.1}, {"inner": 1.2}, {"n_functions": 1}):
        with pytest.raises(ValueError, match="expected"):
            Surroundings(1, (0,), **({"inner": 0.2, "cutoff": 1.0, "n_functions": 5, "box": torch.tensor([2.0, 2.0, 2.0])} | wrong))  # type: ignore[arg-type]


#: Constants in kT/nm², kT/rad² and nm: bonds, angle, and where the carried particle lives.
STRETCH, BEND, HOLD, FAR = 20_000.0, 120.0, 300.0, 0.35


class Felt(Target):
    """A triatomic molecule whose bonds are longer the nearer a particle is: b₀(d) = 0.1 + reach tanh((0.35 − d)/0.1)."""

    def __init__(self, reach: float, *, longer: float = 0.0) -> None:
        self.reach, self.longer, self.event_shape = reach, longer, (4, 3)

    def rest(self, d: Tensor) -> Tensor:
        """Length of the bonds at rest in nm, with the particle at distances d from the first atom."""
        return 0.1 + self.longer + self.reach * torch.tanh((FAR - d) / 0.1)

    def reduced_potential(self, x: Tensor) -> Tensor:
        oxygen, particle = x[:, 0], x[:, 3]
        d = (particle - oxygen).norm(dim=1)
        a, b = x[:, 1] - oxygen, x[:, 2] - oxygen
        lengths = torch.stack([a.norm(dim=1), b.norm(dim=1)], dim=1)
        angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(dim=1))
        bonds = 0.5 * STRETCH * (lengths - self.rest(d).unsqueeze(1)).square().sum(dim=1)
        return bonds + 0.5 * BEND * (angle - 1.9).square() + 0.5 * HOLD * (d - FAR).square()

    def of_bond(self, d: np.ndarray) -> np.ndarray:
        """∫ b² e^{−u} db at distances d, from the moments of a normal density (bonds near zero do not occur)."""
        rest = self.rest(torch.as_tensor(d, dtype=torch.float64)).numpy()
        return (2 * np.pi / STRETCH) ** 0.5 * (rest**2 + 1 / STRETCH)

    def log_norm(self) -> float:
        """ln ∫ d² e^{−u(d)} (∫ b² e^{−u} db)² dd, up to what all such states share."""
        value, _ = quad(lambda d: d**2 * np.exp(-0.5 * HOLD * (d - FAR) ** 2) * self.of_bond(d) ** 2, 1e-6, 1.2, points=[FAR])
        return float(np.log(value))

    def sample(self, n: int, *, seed: int) -> Tensor:
        """Independent configurations, in any placement."""
        random = np.random.default_rng(seed)
        grid = np.linspace(1e-6, 1.0, 20_001)
        weight = grid**2 * np.exp(-0.5 * HOLD * (grid - FAR) ** 2) * self.of_bond(grid) ** 2
        d = np.interp(random.random(n), np.cumsum(weight) / weight.sum(), grid)
        rest = self.rest(torch.from_numpy(d)).numpy()
        lengths = np.stack([_accepted(random, rest, STRETCH, lambda b: (b / 0.2) ** 2) for _ in range(2)], axis=1)
        angle = _accepted(random, np.full(n, 1.9), BEND, np.sin)
        towards = random.normal(size=(n, 3))
        particle = d[:, None] * towards / np.linalg.norm(towards, axis=1, keepdims=True)
        x = np.zeros((n, 4, 3))
        x[:, 1, 0] = lengths[:, 0]
        x[:, 2, 0], x[:, 2, 1] = lengths[:, 1] * np.cos(angle), lengths[:, 1] * np.sin(angle)
        x[:, 3] = particle
        turns = np.linalg.qr(random.normal(size=(n, 3, 3)))[0]
        turns *= np.linalg.det(turns)[:, None, None]
        return torch.from_numpy(x @ turns + random.normal(size=(n, 1, 3)))


def _accepted(random: np.random.Generator, rest: np.ndarray, constant: float, weight) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Rows of density weight(v) e^{−½ constant (v − rest)²}, weight at most one, by rejection."""
    values = np.full(len(rest), np.nan)
    while np.isnan(values).any():
        left = np.isnan(values)
        tried = rest[left] + random.normal(size=int(left.sum())) / constant**0.5
        values[left] = np.where(random.random(len(tried)) < weight(tried), tried, np.nan)
    return values


FEW = SurroundingsSize(reach=0.7, n_functions=6, hidden=(16,))


def layers(x: Tensor, y: Tensor, *, size: SurroundingsSize = FEW, box: Tensor | None = None) -> tuple[StateMap, list[Transform]]:
    """The affine map between two states of the molecule, and the layers that see the particle."""
    molecule, atoms = molecules.water(), np.arange(3)
    xs = [x.numpy(), y.numpy()]
    domains = matched_domains(molecule, [part[:, :3] for part in xs])
    made = internal_coordinate_map(molecule, *domains, size=None, generator=seeded())
    kinds = ("O", "H", "H", "Ar")
    return made, surroundings_layers(molecule, domains[1], xs, atoms=atoms, kinds=kinds, box=box, size=size, generator=seeded())


def both_works(a: Felt, b: Felt, transform: Transform) -> tuple[Works, Works]:
    bridge = Bridge(a, b, transform)
    with torch.no_grad():
        found = bridge.works(a.sample(3000, seed=11)), bridge.reverse_works(b.sample(3000, seed=12))
    return tuple(Works.of(w, role="evaluate", log_det_error=transform.log_det_error) for w in found)  # type: ignore[return-value]


def spent(works: tuple[Works, Works]) -> tuple[float, float]:
    """Mean work there and back, which vanishes for the exact map, and its standard error."""
    parts = [np.asarray(part.w) for part in works]
    return sum(float(w.mean()) for w in parts), float(np.sqrt(sum(w.var() / len(w) for w in parts)))


def test_a_map_that_sees_its_surroundings_does_less_work() -> None:
    """The bonds of B follow a particle that the map carries; both maps are right, and one of them is nearly exact."""
    torch.manual_seed(0)
    a, b = Felt(0.0), Felt(0.012, longer=0.004)
    truth = a.log_norm() - b.log_norm()
    x, y = a.sample(2000, seed=1), b.sample(2000, seed=2)
    made, after = layers(x, y)
    blind, seeing = made.carrying(np.arange(3), n_atoms=4), made.carrying(np.arange(3), n_atoms=4, after=after)
    objective = TargetedPerturbation(EndState.of(a, x), EndState.of(b, y), batch_size=48)
    settings = FitSettings(steps=80, learning_rate=1e-2, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=1000, evaluate_every=1000)
    fit(seeing.learned, objective, settings=settings, generator=seeded(), label="map", progress=False)
    works = {name: both_works(a, b, pieces.transform) for name, pieces in (("blind", blind), ("seeing", seeing))}
    for forward, reverse in works.values():
        found = acceptance_ratio(forward, reverse, seed=1).difference
        assert_z(float(found.value), truth, float(found.stderr))
    (plain, plain_error), (little, little_error) = spent(works["blind"]), spent(works["seeing"])
    assert plain - little > 8 * np.hypot(plain_error, little_error)
    assert little < 0.3 * plain
    wrong = Chain(seeing.transform, _WithoutLogDet())
    forward, reverse = both_works(a, b, wrong)
    found = acceptance_ratio(forward, reverse, seed=1).difference
    with pytest.raises(AssertionError):
        assert_z(float(found.value), truth, float(found.stderr))


class _WithoutLogDet(Transform):
    """Mutant: stretches the bonds a little, and does not say so."""

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._scaled(z, 1.02), torch.zeros(len(z), dtype=torch.float64)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._scaled(x, 1 / 1.02), torch.zeros(len(x), dtype=torch.float64)

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        return torch.cat([x[:, :1], x[:, :1] + factor * (x[:, 1:3] - x[:, :1]), x[:, 3:]], dim=1)


def test_weights_carry_what_the_data_said() -> None:
    """Means and spreads travel with the weights, into layers that saw other data."""
    a, b = Felt(0.0), Felt(0.01)
    _, (ours,) = layers(a.sample(200, seed=1), b.sample(200, seed=2))
    stir(ours)
    _, (theirs,) = layers(a.sample(200, seed=3), b.sample(200, seed=4))
    theirs.double()
    x = a.sample(5, seed=5)
    assert not torch.allclose(theirs(x)[0], ours(x)[0], atol=1e-6)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(x)[0], ours(x)[0])


def test_surroundings_that_cannot_be_seen_are_refused() -> None:
    x = Felt(0.0).sample(50, seed=1)
    with pytest.raises(InputError, match=r"map\.reach: the surroundings cannot be seen: expected a cutoff of at most half"):
        layers(x, x, size=SurroundingsSize(reach=0.7, n_functions=6, hidden=(8,)), box=1.0 * torch.eye(3))
    with pytest.raises(InputError, match=r"map\.reach"):
        layers(x, x, size=SurroundingsSize(reach=0.1, n_functions=6, hidden=(8,)))
    with pytest.raises(InputError, match="rectangular box"):
        layers(x, x, box=torch.tensor([[2.0, 0, 0], [0.5, 2, 0], [0, 0, 2]]))
    for kind in ("radial", "solvent", "identity"):
        with pytest.raises(ValueError, match=f"a map of kind {kind} carries no atoms"):
            MapConfig(kind=kind, surroundings=True)  # type: ignore[arg-type]
