"""Fixtures and assertions shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("PYMBAR_DISABLE_JAX", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
