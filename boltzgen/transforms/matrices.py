"""Determinants and solutions of batches of matrices that stay right with several threads."""

from __future__ import annotations

import torch
from torch import Tensor

#: Size up to which batches are handed over whole.
_SMALL = 64


def log_determinants(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Signs and ln |det| of matrices ``[b, n, n]``, each ``[b]``.

    PyTorch factorises the matrices of a batch on several threads at once, which its LAPACK does not bear where they are large: ln |det| of
    165 × 165 is then off by whole units, with no more than a line on stderr, or the call hangs (PyTorch issues 141358 and 142815, open
    in 2026). Large matrices are therefore factorised one by one on processors.
    """
    if _whole(matrices):
        sign, log_det = torch.linalg.slogdet(matrices)
        return sign, log_det
    found = [torch.linalg.slogdet(matrix) for matrix in matrices]
    return torch.stack([sign for sign, _ in found]), torch.stack([log_det for _, log_det in found])


def solutions(matrices: Tensor, right: Tensor) -> Tensor:
    """x ``[b, n]`` of M x = ``right`` ``[b, n]`` for ``matrices`` M ``[b, n, n]``, not finite where M is singular; one by one where
    :func:`log_determinants` does so."""
    if _whole(matrices):
        return torch.linalg.solve_ex(matrices, right).result
    return torch.stack([torch.linalg.solve_ex(matrix, row).result for matrix, row in zip(matrices, right, strict=True)])


def _whole(matrices: Tensor) -> bool:
    return matrices.is_cuda or matrices.shape[-1] <= _SMALL or len(matrices) < 2 or torch.get_num_threads() == 1
