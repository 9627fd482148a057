"""What every velocity field of particles promises, checked on every registered one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import boltzgen.networks
from boltzgen.networks import field as field_module
from boltzgen.networks.compiled import CompiledField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.solvent_field import SolventField
from tests.registry import FIELDS
from tests.test_contract_transforms import public_classes

CASES = [(name, n, d) for name, case in FIELDS.items() for n, d in ((4, 2), (7, 3)) if d in case.dimensions]
SMALLEST = [(name, 4, case.dimensions[0]) for name, case in FIELDS.items()]
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

Method = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_kinds(n: int) -> list[int]:
    """Labels that are neither in order nor counted from zero."""
    return [(7, -2)[k % 2] for k in range(n)]


def stirred(name: str, n: int, d: int, labels: list[int] | None = None) -> tuple[ParticleField, Tensor]:
    """The registered field in float64 with parameters away from their initial values, and positions ``[3, n, d]``."""
    return stir(FIELDS[name].make(n, d, labels)), random(3, n, d)


def stir(field: ParticleField) -> ParticleField:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in field.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.8 * noise / parameter.shape[-1] ** 0.5
    return field


def orthogonal(d: int, *, reflect: bool) -> Tensor:
    q, _ = torch.linalg.qr(random(d, d, seed=3))
    q[:, 0] *= torch.sign(torch.linalg.det(q)) * (-1 if reflect else 1)
    return q


def both_divergences(field: ParticleField) -> tuple[Method, Method]:
    """The field's own and that of the base class."""
    return field.divergence, lambda t, x: ParticleField.divergence(field, t, x)


def trace_of_jacobian(field: ParticleField, t: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Σ ∂v/∂x ``[b]``, by one backward pass per coordinate."""
    x = x.detach().requires_grad_(True)
    v = field(t, x).flatten(1)
    rows = [torch.autograd.grad(v[:, k].sum(), x, retain_graph=True, create_graph=create_graph)[0].flatten(1) for k in range(v.shape[1])]
    return torch.stack([row[:, k] for k, row in enumerate(rows)]).sum(dim=0)


def check_symmetry(field: ParticleField, x: Tensor, *, reflect: bool) -> None:
    """Rotated (or reflected) and shifted positions give rotated velocities; the centre of mass stays."""
    q = orthogonal(x.shape[2], reflect=reflect)
    v, divergence = field.divergence(TIMES, x)
    turned, same = field.divergence(TIMES, x @ q.T + 3.0)
    torch.testing.assert_close(turned, v @ q.T, atol=1e-10, rtol=0)
    torch.testing.assert_close(same, divergence, atol=1e-10, rtol=0)
    torch.testing.assert_close(v.mean(dim=1), torch.zeros_like(v[:, 0]), atol=1e-12, rtol=0)
    assert 0.01 < float(v.detach().abs().max()) < 1000  # it moves, and rounding alone stays below the tolerance


def check_permutation(field: ParticleField, x: Tensor, order: list[int]) -> None:
    torch.testing.assert_close(field(TIMES, x[:, order]), field(TIMES, x)[:, order], atol=1e-10, rtol=0)


def check_divergence(field: ParticleField, x: Tensor) -> None:
    """Velocity and divergence are those of ``forward``, by the field's own way and by the base class's."""
    v, exact = field(TIMES, x), trace_of_jacobian(field, TIMES, x)
    for method in both_divergences(field):
        same, divergence = method(TIMES, x)
        torch.testing.assert_close(same, v, atol=1e-12, rtol=0)
        torch.testing.assert_close(divergence, exact, atol=1e-10, rtol=0)
        assert divergence.shape == (len(x),)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("name", "n", "d"), SMALLEST)
def test_the_jacobian_is_that_of_the_velocity(name: str, n: int, d: int, labelled: bool) -> None:
    field, x = stirred(name, n, d, two_kinds(n) if labelled else None)
    moved = x.detach().requires_grad_(True)
    v = field(TIMES, moved).flatten(1)
    columns = [torch.autograd.grad(v[:, k].sum(), moved, retain_graph=True)[0].flatten(1) for k in range(n * d)]
    same, jacobian = field.jacobian(TIMES, x)
    torch.testing.assert_close(same.flatten(1), v, atol=1e-12, rtol=0)
    torch.testing.assert_close(jacobian, torch.stack(columns, dim=2), atol=1e-10, rtol=0)
    asymmetry = float((jacobian - jacobian.transpose(1, 2)).detach().abs().max())
    assert (asymmetry > 1e-3) == (name not in ("GradientField", "RadialField"))  # those are gradients: for all others the order is told


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("name", "n", "d"), CASES)
def test_rotations_translations_and_stated_reflections(name: str, n: int, d: int, labelled: bool) -> None:
    field, x = stirred(name, n, d, two_kinds(n) if labelled else None)
    check_symmetry(field, x, reflect=False)
    if FIELDS[name].mirrored:
        check_symmetry(field, x, reflect=True)
    else:
        q = orthogonal(d, reflect=True)
        v, divergence = field.divergence(TIMES, x)
        mirrored, other = field.divergence(TIMES, x @ q.T)
        assert float((mirrored - v @ q.T).detach().abs().max()) > 0.01
        assert float((other - divergence).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "n", "d"), CASES)
def test_permutations_of_equal_particles_and_of_no_others(name: str, n: int, d: int) -> None:
    field, x = stirred(name, n, d)
    check_permutation(field, x, torch.randperm(n, generator=torch.Generator().manual_seed(4)).tolist())
    field, x = stirred(name, n, d, two_kinds(n))
    within = [2, 3, 0, 1, *range(4, n)]
    check_permutation(field, x, within)
    across = [1, 0, *range(2, n)]
    assert float((field(TIMES, x[:, across]) - field(TIMES, x)[:, across]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "n", "d"), CASES)
def test_numbers_of_labels_mean_nothing(name: str, n: int, d: int) -> None:
    ours, x = stirred(name, n, d, [5] * n)
    torch.testing.assert_close(ours(TIMES, x), stirred(name, n, d)[0](TIMES, x), atol=0, rtol=0)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("name", "n", "d"), CASES)
def test_divergences_are_exact(name: str, n: int, d: int, labelled: bool) -> None:
    check_divergence(*stirred(name, n, d, two_kinds(n) if labelled else None))


@pytest.mark.parametrize("numbers", [1, 20_000])
def test_chunks_of_directions_add_up(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction at a time, and a few; test sizes fit into one chunk otherwise."""
    transform, x = stirred("EGNN", 5, 3)[0], random(2, 5, 3)
    whole = transform.divergence(torch.tensor(0.3), x)
    monkeypatch.setattr(field_module, "_CHUNK_NUMBERS", numbers)
    for ours, theirs in zip(transform.divergence(torch.tensor(0.3), x), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("name", "n", "d"), SMALLEST)
def test_every_parameter_gets_a_gradient(name: str, n: int, d: int) -> None:
    """Through velocity and divergence; those of the divergence are those of the Jacobian's trace."""
    field, x = stirred(name, n, d, two_kinds(n))
    parameters = dict(field.named_parameters())
    v, divergence = field.divergence(TIMES, x)
    weighted = random(len(x), seed=6)
    ours = torch.autograd.grad((divergence * weighted).sum(), list(parameters.values()), retain_graph=True, materialize_grads=True)
    exact = (trace_of_jacobian(field, TIMES, x, create_graph=True) * weighted).sum()
    expected = torch.autograd.grad(exact, list(parameters.values()), materialize_grads=True)
    by_velocity = torch.autograd.grad((v * random(*v.shape, seed=7)).sum(), list(parameters.values()), materialize_grads=True)
    for label, a, b, c in zip(parameters, ours, expected, by_velocity, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=label)
        assert torch.isfinite(c).all(), label
        assert (c != 0).any(), f"the velocity gives {label} no gradient"


@pytest.mark.parametrize(("name", "n", "d"), SMALLEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_and_distant_particles_are_finite(name: str, n: int, d: int, dtype: torch.dtype) -> None:
    field, x = stirred(name, n, d)
    field, x = field.to(dtype), x.to(dtype)
    x[0, 1] = x[0, 0]
    x[1] = 0.0
    x[2] *= 1e4
    x.requires_grad_(True)
    for method in both_divergences(field):
        v, divergence = method(TIMES.to(dtype), x)
        assert v.dtype == divergence.dtype == dtype
        gradients = torch.autograd.grad(v.square().sum() + divergence.sum(), [x, *field.parameters()], materialize_grads=True)
        for values in (v, divergence, *gradients):
            assert torch.isfinite(values).all()
        assert float(v[1].detach().abs().max()) < 1e-12


@pytest.mark.parametrize(("name", "n", "d"), CASES)
def test_rows_do_not_depend_on_their_batch(name: str, n: int, d: int) -> None:
    field, x = stirred(name, n, d)
    v, divergence = field.divergence(TIMES, x)
    for k, t in ((0, TIMES[:1]), (2, TIMES[2:]), (2, TIMES[2])):
        alone = field.divergence(t, x[k : k + 1])
        torch.testing.assert_close(alone[0], v[k : k + 1], atol=1e-11, rtol=0)
        torch.testing.assert_close(alone[1], divergence[k : k + 1], atol=1e-11, rtol=0)
    assert float((field(TIMES[1], x) - field(TIMES[2], x)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "n", "d"), SMALLEST)
def test_single_precision_is_close(name: str, n: int, d: int) -> None:
    field, x = stirred(name, n, d)
    v, divergence = field.divergence(TIMES, x)
    rough, rough_divergence = field.float().divergence(TIMES.float(), x.float())
    torch.testing.assert_close(rough.double(), v, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(rough_divergence.double(), divergence, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(("name", "n", "d"), SMALLEST)
def test_state_dict_round_trip(name: str, n: int, d: int) -> None:
    field, x = stirred(name, n, d, two_kinds(n))
    fresh = FIELDS[name].make(n, d, two_kinds(n)).double()
    fresh.load_state_dict(field.state_dict())
    assert torch.equal(fresh(TIMES, x), field(TIMES, x))


@pytest.mark.parametrize(("name", "n", "d"), SMALLEST)
def test_a_new_field_is_at_rest_and_the_same_each_time(name: str, n: int, d: int) -> None:
    field, again = (FIELDS[name].make(n, d, None) for _ in range(2))
    v, divergence = field.divergence(torch.tensor(0.3), random(3, n, d).float())
    assert float(v.detach().abs().max()) == float(divergence.detach().abs().max()) == 0.0
    for a, b in zip(field.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FIELDS)
def test_labels_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="one label for each of 4 particles, got 3"):
        FIELDS[name].make(4, 3, [0, 0, 1])


class Swirl(ParticleField):
    """A simple field with all symmetries: v_i = Σ_j exp(−r_ij²) r_ij, with its closed-form divergence."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__()
        self.n_particles, self.n_dimensions = n, d

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        r = x.unsqueeze(2) - x.unsqueeze(1)
        return ((1 + t.reshape(-1, 1, 1, 1)) * torch.exp(-r.square().sum(-1, keepdim=True)) * r).sum(2)

    def divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        square = (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1)
        terms = self.terms(square) * (1 - torch.eye(self.n_particles, dtype=x.dtype))
        return self(t, x), ((1 + t.reshape(-1, 1, 1)) * terms).sum(dim=(1, 2))

    def terms(self, square: Tensor) -> Tensor:
        return (self.n_dimensions - 2 * square) * torch.exp(-square)


class WithoutSlope(Swirl):
    """Mutant: the divergence forgets that the force changes with the distance."""

    def terms(self, square: Tensor) -> Tensor:
        return self.n_dimensions * torch.exp(-square)


class AlongAxis(Swirl):
    """Mutant: stronger along the first axis."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t, x) * torch.tensor([1.001] + [1.0] * (x.shape[2] - 1), dtype=x.dtype)


class Attracted(Swirl):
    """Mutant: falls towards the origin."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t, x) - 0.001 * x


class Drifting(Swirl):
    """Mutant: the centre of mass moves, in a direction that turns with the particles."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t, x) + 0.001 * (x[:, :1] - x[:, 1:2])


class Numbered(Swirl):
    """Mutant: the first particle is unlike the others."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v = super().forward(t, x)
        return v + 0.001 * torch.cat([v[:, :1] - v[:, 1:2], v[:, 1:2] - v[:, :1], torch.zeros_like(v[:, 2:])], dim=1)


@pytest.mark.parametrize(("n", "d"), [(4, 2), (7, 3)])
def test_fields_that_break_the_contract_are_caught(n: int, d: int) -> None:
    x, order = random(3, n, d), [1, 2, 3, 0, *range(4, n)]
    for reflect in (False, True):
        check_symmetry(Swirl(n, d), x, reflect=reflect)
    check_permutation(Swirl(n, d), x, order)
    check_divergence(Swirl(n, d), x)
    for mutant in (AlongAxis, Attracted, Drifting):
        with pytest.raises(AssertionError):
            check_symmetry(mutant(n, d), x, reflect=False)
    with pytest.raises(AssertionError):
        check_permutation(Numbered(n, d), x, order)
    with pytest.raises(AssertionError):
        check_divergence(WithoutSlope(n, d), x)


def test_every_public_field_is_registered() -> None:
    registered = {type(case.make(4, 3, None)) for case in FIELDS.values()}
    missing = (
        public_classes(ParticleField, boltzgen.networks) - registered - {CompiledField, SolventField}
    )  # a wrapper, and one with a centre: test_particles.py, test_solvent_field.py
    assert not missing, f"add a line to tests/registry.py for {sorted(cls.__name__ for cls in missing)}"
