"""What every objective promises, checked on every registered one."""

from __future__ import annotations

import math

import pytest
import torch

import boltzgen.training
from boltzgen.core import Objective
from tests.registry import OBJECTIVES, seeded
from tests.test_contract_transforms import public_classes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_scalars_whose_gradient_reaches_the_flow(name: str) -> None:
    objective, flow = OBJECTIVES[name]()
    loss, numbers = objective(flow, generator=seeded())
    assert loss.shape == ()
    assert loss.requires_grad
    assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
    assert numbers
    gradients = torch.autograd.grad(loss, list(flow.parameters()))
    assert all(torch.isfinite(gradient).all() and float(gradient.abs().max()) > 0 for gradient in gradients)
    assert all(parameter.requires_grad for parameter in flow.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_seed_gives_the_same_loss(name: str) -> None:
    objective, flow = OBJECTIVES[name]()
    (first, _), (second, _) = (objective(flow, generator=seeded()) for _ in range(2))
    assert torch.equal(first.detach(), second.detach())
    other, _ = objective(flow, generator=seeded(8))
    assert not torch.equal(first.detach(), other.detach())


def test_every_public_objective_is_registered() -> None:
    registered = {type(make()[0]) for make in OBJECTIVES.values()}
    missing = public_classes(Objective, boltzgen.training) - registered
    assert not missing, f"add a line to tests/registry.py for {sorted(cls.__name__ for cls in missing)}"
