"""Batches of matrices are factorised right, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.transforms.matrices import log_determinants, solutions
from boltzgen.transforms.newton import through_inverse
from boltzgen.transforms.volume import StepJacobian
from tests.registry import noise


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def factorised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that LAPACK was given; a batch of large ones would be wrong or hang, so that it is never let through."""
    batches: list[int] = []

    def watched(name: str) -> None:
        original = getattr(torch.linalg, name)

        def call(matrices: Tensor, *rest: Tensor) -> object:
            assert matrices.ndim == 2 or matrices.shape[-1] <= 64, "a batch of large matrices on several threads"
            batches.append(1 if matrices.ndim == 2 else len(matrices))
            return original(matrices, *rest)

        monkeypatch.setattr(torch.linalg, name, call)

    for name in ("slogdet", "solve_ex"):
        watched(name)
    return batches


@pytest.mark.parametrize(("n", "calls"), [(39, [5]), (165, [1] * 5)])
def test_large_matrices_are_factorised_one_by_one(n: int, calls: list[int], two_threads: None, factorised: list[int]) -> None:
    matrices = torch.eye(n, dtype=torch.float64) + 0.1 * noise(5, n, n)
    right = noise(5, n)
    sign, log_det = log_determinants(matrices)
    expected = np.linalg.slogdet(matrices.numpy())
    np.testing.assert_allclose(log_det, expected.logabsdet, atol=1e-10)
    np.testing.assert_array_equal(sign, expected.sign)
    assert factorised == calls
    x = solutions(matrices, right)
    torch.testing.assert_close((matrices @ x.unsqueeze(-1)).squeeze(-1), right, atol=1e-8, rtol=0)
    assert factorised == 2 * calls


def test_steps_of_a_solver_use_them(two_threads: None, factorised: list[int]) -> None:
    jacobian = torch.eye(81, dtype=torch.float64) + 0.05 * noise(3, 81, 81)
    log_det, _ = StepJacobian().total(jacobian)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian.numpy()).logabsdet, atol=1e-10)
    through_inverse(noise(3, 27, 3), jacobian)
    assert factorised == [1] * 6


def test_gradients_pass_through_single_matrices(two_threads: None) -> None:
    matrices = (torch.eye(70, dtype=torch.float64) + 0.05 * noise(2, 70, 70)).requires_grad_(True)
    (slope,) = torch.autograd.grad(log_determinants(matrices)[1].sum(), matrices)
    np.testing.assert_allclose(slope, np.linalg.inv(matrices.detach().numpy()).transpose(0, 2, 1), atol=1e-10)
