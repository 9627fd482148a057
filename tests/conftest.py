"""Fixtures and assertions shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("PYMBAR_DISABLE_JAX", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one thread each; read at the first import of torch or numpy
os.environ.setdefault("OPENMM_CPU_THREADS", "1")  # OpenMM's threads wait for each other by spinning

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
