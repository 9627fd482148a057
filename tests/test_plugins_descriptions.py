"""Collective variables written down and made again."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import numpy as np
import openmm
import pytest
import torch

from boltzgen import cvs
from boltzgen.config import VariableConfig
from boltzgen.cvs import (
    RMSD,
    Angle,
    CollectiveVariable,
    CollectiveVariables,
    Combination,
    Coordination,
    Cosine,
    Dihedral,
    Distance,
    RadiusOfGyration,
    Sine,
)  # fmt: skip
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.cv_forces import cv_force
from boltzgen.md.force_variable import ForceVariable
from boltzgen.md.named_variables import _build
from boltzgen.workflows.plugins.descriptions import built, described, in_box

BOX = 3.0 * np.eye(3)
TORSION = Dihedral("phi", (0, 1, 2, 3))


def bond_force() -> openmm.Force:
    force = openmm.CustomBondForce("r")
    force.addBond(0, 3, [])
    force.setUsesPeriodicBoundaryConditions(True)
    return force


VARIABLES: list[CollectiveVariable] = [
    Distance("free", (0, 4)),
    Distance("image", (0, 4), box=BOX),
    Angle("angle", (0, 1, 2)),
    TORSION,
    RadiusOfGyration("rg", (0, 1, 4)),
    RadiusOfGyration("heavy", (0, 1, 4), masses=[1.0, 2.0, 3.0]),
    RMSD("rmsd", (0, 2, 3, 4), reference=np.arange(18.0).reshape(6, 3) ** 1.1),
    Coordination("within", (0, 1, 2, 3), r0=0.5),
    Coordination("pair", (0, 1), r0=0.5),
    Coordination("single", (0,), (3,), r0=0.5, n=4, m=9),
    Coordination("between", (4, 1), (0, 2, 3), r0=0.7, box=BOX),
    Cosine(TORSION),
    Sine(TORSION, name="s"),
    Combination("mix", [Cosine(TORSION), Distance("image", (0, 4), box=BOX)], [0.3, -2.0], offset=0.5),
    ForceVariable("own", bond_force(), n_particles=6, unit="nm", period=7.0, box=BOX),
]


@pytest.mark.parametrize("cv", VARIABLES, ids=lambda cv: cv.name)
def test_a_variable_comes_back(cv: CollectiveVariable) -> None:
    x = torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    again = built(json.loads(json.dumps(described(cv))))
    assert type(again) is type(cv)
    assert (again.name, again.unit, again.period, again.atoms) == (cv.name, cv.unit, cv.period, cv.atoms)
    torch.testing.assert_close(again(x), cv(x), rtol=0, atol=0)
    assert described(again) == described(cv)


def test_every_kind_is_known_wherever_kinds_are_told_apart() -> None:
    """As a description, as OpenMM forces, and from the configuration, where cosines and sines are terms of combinations."""
    public = {kind for kind in vars(cvs).values() if isinstance(kind, type) and issubclass(kind, CollectiveVariable)}
    kinds = {*public, ForceVariable} - {CollectiveVariable}
    assert {type(cv) for cv in VARIABLES} == kinds
    assert {kind for kind in kinds if described.dispatch(kind) is not described.dispatch(CollectiveVariable)} == kinds
    assert all(isinstance(cv_force(cv), openmm.Force) for cv in VARIABLES)
    named = {config: get_type_hints(build)["return"] for config, build in _build.registry.items() if config is not object}
    told_apart = set(get_args(get_args(VariableConfig)[0]))
    assert set(named) == told_apart
    assert set(named.values()) == kinds - {Cosine, Sine}


def test_a_box_is_exchanged_wherever_there_is_one() -> None:
    x = torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    larger = in_box(CollectiveVariables(VARIABLES), 3.5 * np.eye(3))
    image = Distance("image", (0, 4), box=3.5 * np.eye(3))
    torch.testing.assert_close(larger(x)[:, 1], image(x))
    torch.testing.assert_close(larger(x)[:, 13], 0.5 + 0.3 * Cosine(TORSION)(x) - 2 * image(x))
    torch.testing.assert_close(larger(x)[:, 0], VARIABLES[0](x))
    assert not torch.allclose(larger(x)[:, 14], VARIABLES[14](x))
    free = CollectiveVariables(VARIABLES[:1])
    assert in_box(free, 3.5 * np.eye(3)) is free


def test_what_is_unknown_is_refused() -> None:
    class Own(CollectiveVariable):
        def _value(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 0, 0]

    with pytest.raises(InputError, match="'mine' is a Own, which cannot be written down"):
        described(Own("mine", (0,)))
    with pytest.raises(CheckpointError, match="got 'spin'"):
        built({"kind": "spin"})
