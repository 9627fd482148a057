"""Fixtures and assertions shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("PYMBAR_DISABLE_JAX", "1")

import pytest
import torch

from boltzgen.allocator import keep_freed_memory

keep_freed_memory()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # more hardly help tensors of this size, and wait for each other on a busy machine


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
