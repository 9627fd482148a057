"""Velocity fields: symmetry, exact divergence, finite where particles coincide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField

SIZES = [(2, 2), (4, 2), (7, 3)]


def field(n: int, d: int, *, labels: list[int] | None = None) -> EmbeddedField:
    """A field with random weights in every layer, in double precision."""
    generator = torch.Generator().manual_seed(1)
    made = EmbeddedField(n, d, length=0.8, labels=labels, n_scalars=5, n_vectors=3, hidden=11, generator=generator).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


def points(n: int, d: int, *, b: int = 3) -> Tensor:
    return 1.2 * torch.randn(b, n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


TIMES = torch.linspace(0, 1, 3, dtype=torch.float64)


def rotation(d: int, *, reflect: bool) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    q[:, 0] *= torch.sign(torch.linalg.det(q)) * (-1 if reflect else 1)
    return q


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("reflect", [False, True])
def test_rotations_reflections_translations_and_permutations(n: int, d: int, reflect: bool) -> None:
    made, x = field(n, d), points(n, d)
    v = made(TIMES, x)
    q, order = rotation(d, reflect=reflect), torch.randperm(n, generator=torch.Generator().manual_seed(4))
    moved = (x @ q.T + 3.0)[:, order]
    torch.testing.assert_close(made(TIMES, moved), (v @ q.T)[:, order], atol=1e-10, rtol=0)
    torch.testing.assert_close(v.mean(dim=1), torch.zeros(3, d, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(v.detach().abs().max()) > 0.1


def test_labels_break_the_permutation_symmetry_between_kinds_only() -> None:
    made, x = field(4, 3, labels=[0, 0, 1, 1]), points(4, 3)
    v = made(TIMES, x)
    torch.testing.assert_close(made(TIMES, x[:, [1, 0, 3, 2]]), v[:, [1, 0, 3, 2]], atol=1e-10, rtol=0)
    assert float((made(TIMES, x[:, [2, 1, 0, 3]]) - v[:, [2, 1, 0, 3]]).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="one label for each of 4 particles, got 3"):
        field(4, 3, labels=[0, 0, 1])


def exact_divergence(made: ParticleField, t: Tensor, x: Tensor) -> Tensor:
    """Trace of the autograd Jacobian, row by row."""
    rows = []
    for k in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda y, k=k: made(t[k : k + 1], y[None])[0], x[k])
        rows.append(jacobian.reshape(x[k].numel(), -1).trace())
    return torch.stack(rows)


class WithoutOwnStates(EmbeddedField):
    """Mutant: forgets that a particle changes its own state."""

    def _own_states(self, *arguments: object) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_divergences_are_exact(n: int, d: int, labelled: bool) -> None:
    made, x = field(n, d, labels=[k % 2 for k in range(n)] if labelled else None), points(n, d)
    exact = exact_divergence(made, TIMES, x)
    for method in (made.divergence, lambda t, y: ParticleField.divergence(made, t, y)):
        v, divergence = method(TIMES, x)
        torch.testing.assert_close(v, made(TIMES, x), atol=1e-12, rtol=0)
        torch.testing.assert_close(divergence, exact, atol=1e-10, rtol=0)
    if n > 2:
        made.__class__ = WithoutOwnStates
        with pytest.raises(AssertionError):
            torch.testing.assert_close(made.divergence(TIMES, x)[1], exact, atol=1e-3, rtol=0)


def test_divergences_carry_gradients_of_the_weights() -> None:
    made, x = field(4, 2), points(4, 2)
    _, divergence = made.divergence(TIMES, x)
    divergence.sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}
    made.zero_grad()
    exact = sum(
        torch.autograd.functional.jacobian(lambda y, k=k: made(TIMES[k : k + 1], y[None])[0], x[k], create_graph=True).reshape(8, 8).trace()
        for k in range(len(x))
    )
    exact.backward()  # type: ignore[union-attr]
    for name, parameter in made.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours.get(name, torch.zeros_like(parameter)), expected, atol=1e-9, rtol=0)


def test_rows_do_not_depend_on_their_batch() -> None:
    made, x = field(7, 3), points(7, 3)
    v, divergence = made.divergence(TIMES, x)
    alone = made.divergence(TIMES[2:3], x[2:3])
    torch.testing.assert_close(v[2:3], alone[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(divergence[2:3], alone[1], atol=1e-12, rtol=0)


def test_coinciding_particles_have_finite_velocities() -> None:
    made, x = field(4, 3), points(4, 3)
    x[:, 1] = x[:, 0]
    v, divergence = made.divergence(TIMES, x)
    assert torch.isfinite(v).all()
    assert torch.isfinite(divergence).all()


def test_a_new_field_is_at_rest() -> None:
    made = EmbeddedField(5, 3, length=1.0, generator=torch.Generator().manual_seed(0))
    assert float(made(torch.tensor(0.3), torch.randn(4, 5, 3)).abs().max()) == 0.0
